"""The rows of jobs: each job of the jobs API gets one, and the jobs API finds those that have only a row."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from celery.app import app_or_default
from django.utils import timezone

from sdtpu_worker.contrib.django.callbacks import callbacks
from sdtpu_worker.contrib.django.models import GeneratedImage
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.owners import PREFIX


class RowKeeper:
    """Keeps jobs as `GeneratedImage`."""

    def enqueue(self, record: JobRecord, send: Callable[..., None]) -> None:
        """Enqueue a job with its row; a job that was not enqueued has none.

        Args:
            record: of the job.
            send: enqueues it, with further options of `apply_async`.
        """
        row = GeneratedImage.objects.create(
            task_id=record.id,
            owner=record.caller.removeprefix(PREFIX),
            prompt=str(record.parameters["prompt"]),
            parameters=dict(record.parameters),
            created_at=datetime.fromtimestamp(record.created_at, UTC),
        )
        try:
            send(**callbacks())
        except BaseException:
            row.delete()
            raise

    def find(self, job_id: str) -> JobRecord | None:
        """Return the record of a job that `GeneratedImage.objects.generate` has enqueued, until its result expires."""
        row = GeneratedImage.objects.filter(task_id=job_id).first()
        expires = app_or_default().conf.result_expires
        lifetime = expires if isinstance(expires, timedelta) else timedelta(seconds=expires or 10**9)
        if row is None or (row.ended_at is not None and row.ended_at + lifetime < timezone.now()):
            return None
        return JobRecord(
            caller=f"{PREFIX}{row.owner}", parameters=row.parameters, id=row.task_id,
            created_at=row.created_at.timestamp(),
        )  # fmt: skip
