"""What an operator sees of a worker: health, checks of Redis at the start, settings and a log without secrets."""
