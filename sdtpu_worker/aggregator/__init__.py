"""Who runs when, and what a plan is. Pure: no clock, no threads, no arrays."""
