"""The images of jobs: encoded and stored by the worker under the task id, read back and checked by the web app."""
