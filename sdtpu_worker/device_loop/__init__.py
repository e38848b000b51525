"""The threads that feed the devices: jobs come in, plans go to the engine, images go out. Neither Celery nor JAX."""
