"""What client and worker agree on: requests, results, queues and load reports. Imports neither Celery nor JAX."""
