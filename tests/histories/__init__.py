"""Histories: what workers, clients, Redis and clocks may do to each other, drawn from a seed, in virtual time."""
