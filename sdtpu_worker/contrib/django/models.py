"""`GeneratedImage`: a job and its image, kept for as long as the project wants, on Django's storage."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from celery.app import app_or_default
from django.core.files.base import ContentFile
from django.db import models, transaction
from django.utils import timezone

from sdtpu_worker.client.cancel import cancel_job
from sdtpu_worker.contract.request import GenerationRequest, draw_seed
from sdtpu_worker.contrib.django.callbacks import callbacks
from sdtpu_worker.images.bring import bring_pictures
from sdtpu_worker.images.decode import named_image
from sdtpu_worker.images.store import read_image_bytes
from sdtpu_worker.web.job_state import read_state_of

_MOST_CHARACTERS = 2000


class GeneratedImageManager(models.Manager["GeneratedImage"]):
    """Enqueues jobs whose images are kept."""

    def generate(
        self, prompt: str, *, owner: str = "", options: Mapping[str, Any] | None = None, **parameters: Any
    ) -> GeneratedImage:
        """Enqueue a job when the transaction commits; return its row.

        Args:
            prompt: what the image shows.
            owner: whose it is, as `owners.owner_name` says of a request: `user-7` for the user with this key.
            options: of `apply_async`, such as `{"priority": 3}`.
            **parameters: as for `generate.delay`.

        Raises:
            InvalidRequest: a parameter is not allowed.
            SdtpuError: at the commit, what `generate.apply_async` raises; the row is gone then.
        """
        from sdtpu_worker import generate

        parameters = bring_pictures(app_or_default(), {"prompt": prompt, **parameters})
        GenerationRequest.parse((), parameters)
        if parameters.get("seed") is None:
            parameters["seed"] = draw_seed()
        row: GeneratedImage = self.create(
            task_id=str(uuid.uuid4()), owner=owner, prompt=prompt, parameters={**parameters, **(options or {})}
        )

        def send() -> None:
            try:
                generate.apply_async((), parameters, task_id=row.task_id, **callbacks(), **(options or {}))
            except BaseException:
                row.delete()
                raise

        transaction.on_commit(send)
        return row


class GeneratedImage(models.Model):
    """A job, and its image when there is one.

    The success callback, which an ordinary worker of the project runs, puts the image into Django's storage: it stays
    when the result has expired.
    """

    class Status(models.TextChoices):
        """What has become of the job, in the words of the jobs API."""

        QUEUED = "queued"
        RUNNING = "running"
        SUCCEEDED = "succeeded"
        FAILED = "failed"
        CANCELLED = "cancelled"

    task_id = models.CharField(max_length=155, unique=True, editable=False)
    owner = models.CharField(max_length=155, blank=True, db_index=True)
    prompt = models.TextField()
    parameters = models.JSONField(default=dict, help_text="Of the request, and its options")
    status = models.CharField(max_length=16, choices=Status, default=Status.QUEUED, db_index=True)
    image = models.ImageField(upload_to="sdtpu/%Y/%m/%d/", blank=True, max_length=255)
    result = models.JSONField(null=True, blank=True, help_text="What the worker says of the image")
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, db_index=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = GeneratedImageManager()

    class Meta:
        """The newest first."""

        ordering = ("-created_at",)

    def __str__(self) -> str:
        return f"{self.prompt:.60} ({self.status})"

    @property
    def has_ended(self) -> bool:
        """Whether no other state follows."""
        return self.status in (self.Status.SUCCEEDED, self.Status.FAILED, self.Status.CANCELLED)

    def keep_image(self, result: Mapping[str, Any]) -> None:
        """Put the image of a result into Django's storage.

        Args:
            result: of `sdtpu.generate`.

        Raises:
            StorageError: the image is gone, or the result names none.
        """
        image_format = named_image(result)[1].format
        data = read_image_bytes(result, app_or_default())
        self.image.save(f"{self.task_id}.{image_format}", ContentFile(data), save=False)
        self.result = {name: value for name, value in result.items() if name not in ("image", "task_id")}
        self.end(self.Status.SUCCEEDED)

    def end(self, status: str, error: str = "") -> None:
        """Store how the job has ended."""
        self.status, self.error, self.ended_at = status, error[:_MOST_CHARACTERS], timezone.now()
        self.save()

    def refresh_status(self) -> None:
        """Store what the result backend says of a job that has not ended; its image comes with the callback alone."""
        if self.has_ended:
            return
        state = read_state_of(app_or_default().backend, self.task_id)
        if state.error is not None:
            self.end(state.status, state.error.detail)
        elif state.status == self.Status.RUNNING and self.status != self.Status.RUNNING:
            self.status = self.Status.RUNNING
            self.save(update_fields=["status"])

    def cancel(self) -> None:
        """Take the job out of the queue or off its slot; one that has ended stays as it is."""
        self.refresh_status()
        if not self.has_ended:
            cancel_job(app_or_default(), self.task_id)
            self.end(self.Status.CANCELLED)
