"""What a model costs on devices that are not here: compiled in a child process, then counted and simulated."""
