"""The project: importing it makes the Celery app, so that web processes and workers share one."""

from website.celery import app as celery_app

__all__ = ["celery_app"]
