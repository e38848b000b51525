"""What an operator sees of a worker: health, checks of Redis at the start, a log without prompts."""
