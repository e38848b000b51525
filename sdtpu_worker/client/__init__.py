"""Enqueueing a job: validation, admission, errors. Imports nothing of the worker but one lazy line in `task.py`."""
