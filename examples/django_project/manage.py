"""A Django project that makes pictures: the jobs API, images that stay, the admin, a page with cards.

Four shells in this folder, after `pip install -e '../..[worker,django]'` and `python manage.py migrate`:

    redis-server
    celery -A website worker --queues sdtpu --loglevel INFO
    celery -A website worker --hostname web@%h --loglevel INFO
    python manage.py runserver

Expect, on any two-core CPU: the first worker says that it is ready after about 30 seconds. At http://localhost:8000/ a
prompt becomes a card with a progress bar, then an image, which the second worker puts into the folder `media`. The jobs
API is at `/v1/jobs`, the admin at `/admin/` after `python manage.py createsuperuser`. A parameter that is not allowed
is a 400 with the reason, a Redis that is down a 503. No process but the first worker's imports JAX.
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "website.settings")
    execute_from_command_line(sys.argv)
