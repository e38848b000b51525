"""The Celery app: configured by the `CELERY_*` names of the Django settings."""

import os

from celery import Celery

from sdtpu_worker import install

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "website.settings")
app = install(Celery("website"))
app.config_from_object("django.conf:settings", namespace="CELERY")
