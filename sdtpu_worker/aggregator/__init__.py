"""The policy that decides which job runs when, and the plans that it makes. Pure: no clock, no threads, no arrays."""
