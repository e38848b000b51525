"""Who runs when: the pure policy (`plan`) and the thread that executes it on the engine (`loop`)."""
