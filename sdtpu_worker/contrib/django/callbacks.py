"""The tasks that follow a job, by name."""

from __future__ import annotations

from typing import Any

from celery.app import app_or_default

SAVE_IMAGE, NOTE_FAILURE = "sdtpu.django.save_image", "sdtpu.django.note_failure"


def callbacks() -> dict[str, Any]:
    """Return the options of `apply_async` by which a job's end fills its row.

    The device worker sends them, and may have other routes: so they name the queue that this app's routes say.
    """
    app = app_or_default()

    def sign(name: str) -> Any:
        return app.signature(name, queue=app.amqp.router.route({}, name)["queue"].name)

    return {"link": sign(SAVE_IMAGE), "link_error": sign(NOTE_FAILURE)}
