"""A device worker's process inside Celery: boot steps, the pool, and one object that holds what the process has."""
