"""Django's settings, and Celery's under the prefix `CELERY_`: `sdtpu_model` is `CELERY_SDTPU_MODEL` here."""

import os

REDIS_URL = "redis://localhost:6379/0"

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "fit for an example only")
DEBUG = os.environ.get("DJANGO_DEBUG", "1") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "website.urls"
MIDDLEWARE = ["django.middleware.common.CommonMiddleware"]
TIME_ZONE = "UTC"

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", REDIS_URL)
CELERY_RESULT_BACKEND = os.environ.get("CELERY_RESULT_BACKEND", REDIS_URL)
CELERY_RESULT_EXPIRES = 3600  # seconds; images in Redis expire with the results
CELERY_SDTPU_MODEL = "embedded"
CELERY_SDTPU_SLOTS_PER_DEVICE = 1
