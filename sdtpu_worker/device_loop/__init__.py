"""The threads that feed the devices: jobs in, plans to the engine, images out. Neither Celery nor JAX."""
