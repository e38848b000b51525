"""A Django project that makes pictures: enqueue a prompt, ask for its state, fetch the image. No database.

Three shells in this folder, after `pip install -e '../..[worker]' django`:

    redis-server
    celery -A website worker --queues sdtpu --loglevel INFO
    python manage.py runserver

Expect, on any two-core CPU: the worker says that it is ready after about 30 seconds, and

    curl -i localhost:8000/images --json '{"prompt": "a red circle", "seed": 7}'

answers 202 with `{"task_id": …, "status_url": …}` at once; the status URL says PENDING, STARTED, then SUCCESS with an
`image_url`, a PNG. A parameter that is not allowed is a 400 with the reason, a Redis that is down a 503. The web
process never imports JAX.
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "website.settings")
    execute_from_command_line(sys.argv)
