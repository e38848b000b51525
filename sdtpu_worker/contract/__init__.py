"""What client and worker agree on: requests, results, queues and load reports. Neither Celery nor JAX."""
