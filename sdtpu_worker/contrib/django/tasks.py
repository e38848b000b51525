"""The callbacks of jobs. An ordinary worker of the project runs them, which needs no device and no JAX."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from celery import Task, shared_task

from sdtpu_worker.contrib.django.callbacks import NOTE_FAILURE, SAVE_IMAGE
from sdtpu_worker.contrib.django.models import GeneratedImage
from sdtpu_worker.errors import StorageError

logger = logging.getLogger(__name__)

_TRIES = 6
"""Within about a minute: a storage that is away comes back, a row is committed."""


@shared_task(
    name=SAVE_IMAGE, bind=True, acks_late=True, ignore_result=True, autoretry_for=(Exception,),
    dont_autoretry_for=(StorageError,), max_retries=_TRIES, retry_backoff=1, retry_jitter=False,
)  # fmt: skip
def save_image(self: Task, result: Mapping[str, Any]) -> None:
    """Keep the image of a job that has succeeded."""
    try:
        row = GeneratedImage.objects.get(task_id=result["task_id"])
    except GeneratedImage.DoesNotExist:
        if self.request.retries < _TRIES:
            raise
        logger.warning("the image of job %s is not kept: its row is gone", result["task_id"])
        return
    if row.image:
        return  # the message was delivered twice
    try:
        row.keep_image(result)
    except StorageError as exc:
        row.end(GeneratedImage.Status.FAILED, str(exc))
        raise


@shared_task(name=NOTE_FAILURE, ignore_result=True)
def note_failure(task_id: str) -> None:
    """Store why a job has no image."""
    for row in GeneratedImage.objects.filter(task_id=task_id):
        row.refresh_status()
