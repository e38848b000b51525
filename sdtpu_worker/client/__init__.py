"""Enqueueing a job: validation, admission, errors. Imports the worker in one place only, lazily, in `task.py`."""
