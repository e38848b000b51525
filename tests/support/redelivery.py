"""One job that two workers see, with a result backend of one's choice. A command too, for a process of its own:

python -m tests.support.redelivery URL [DATABASE]
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.support.in_process import Broker, backend_app, in_process_worker

STEPS = 1000
"""Ten seconds on the first worker, whose job must not be done before it is handed over."""


def follow_a_job(backend: str, **conf: Any) -> dict[str, Any]:
    """Hand a job over to a second worker, which ends it; redeliver it once more; say what came of it.

    Args:
        backend: URL of the result backend.
        conf: settings of Celery.
    """
    broker = Broker()
    with backend_app(backend, sdtpu_progress_s=0.01, **conf) as app:
        options = {"reply_to": app.thread_oid}  # as a client of rpc:// sends it
        with in_process_worker(app, broker, step_s=0.01) as first:
            request = first.take(steps=STEPS, **options)
            first.wait_for_slot(request)
            first.pool.hand_over()
            handed_over = first.wait_for_end(request)
        with in_process_worker(app, broker, step_s=0.0001) as second:
            request = second.take(request.id, redelivered=True, steps=STEPS, **options)
            ended = second.wait_for_end(request)
            events, images = second.events.of(request.id), len(second.images.data)
            continues = request.id not in second.engine.inserted
        with in_process_worker(app, broker, step_s=0.0001) as third:
            again = third.wait_for_end(third.take(request.id, redelivered=True, steps=STEPS, **options))
            ran_again = bool(third.images.data)
    return {"told": [handed_over, ended, again], "events": events, "images": images,
            "continues": continues, "ran_again": ran_again}  # fmt: skip


def main(backend: str, database: str = "") -> None:
    """Follow a job and print what came of it; with a database as a worker of a Django project with `django-db`."""
    if database:
        import django
        from django.conf import settings
        from django.core.management import call_command

        settings.configure(
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
            INSTALLED_APPS=["django_celery_results"],
            DEFAULT_AUTO_FIELD="django.db.models.AutoField",
            USE_TZ=True,
        )
        django.setup()
        call_command("migrate", verbosity=0)
    print(json.dumps(follow_a_job(backend)))


if __name__ == "__main__":
    main(*sys.argv[1:])
