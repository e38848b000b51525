"""The admin: images with thumbnails, and an action that cancels jobs."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString

from sdtpu_worker.contrib.django.models import GeneratedImage

_OPEN = (GeneratedImage.Status.QUEUED, GeneratedImage.Status.RUNNING)


@admin.register(GeneratedImage)
class GeneratedImageAdmin(admin.ModelAdmin):
    """Shows images and their jobs; they are made by the web app, not here."""

    list_display = ("thumbnail", "short_prompt", "status", "owner", "created_at")
    list_display_links = ("thumbnail", "short_prompt")
    list_filter = ("status", "created_at")
    search_fields = ("prompt", "owner", "task_id")
    fields = ("picture", "prompt", "parameters", "status", "error", "owner", "task_id", "result", "created_at",
              "ended_at")  # fmt: skip
    readonly_fields = fields
    actions = ("cancel_jobs", "refresh_jobs")

    @admin.display(description="image")
    def thumbnail(self, row: GeneratedImage) -> SafeString | str:
        """Return the image, small."""
        return _image(row, 64)

    @admin.display(description="image")
    def picture(self, row: GeneratedImage) -> SafeString | str:
        """Return the image."""
        return _image(row, 512)

    @admin.display(description="prompt", ordering="prompt")
    def short_prompt(self, row: GeneratedImage) -> str:
        """Return the prompt's beginning."""
        return f"{row.prompt[:79]}…" if len(row.prompt) > 80 else row.prompt

    @admin.action(description="Cancel the selected jobs", permissions=["change"])
    def cancel_jobs(self, request: HttpRequest, rows: QuerySet[GeneratedImage]) -> None:
        """Take jobs out of the queue or off their slots."""
        count = 0
        for row in rows.filter(status__in=_OPEN):
            row.cancel()
            count += row.status == GeneratedImage.Status.CANCELLED
        self.message_user(request, f"{count} jobs were cancelled; those that had ended stay as they are",
                          messages.SUCCESS)  # fmt: skip

    @admin.action(description="Look what has become of the selected jobs", permissions=["view"])
    def refresh_jobs(self, request: HttpRequest, rows: QuerySet[GeneratedImage]) -> None:
        """Store what the result backend says of jobs."""
        for row in rows.filter(status__in=_OPEN):
            row.refresh_status()

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Return False: a job is enqueued by the web app."""
        return False


def _image(row: GeneratedImage, most: int) -> SafeString | str:
    if not row.image:
        return "–"
    style = f"max-width: {most}px; max-height: {most}px"
    return format_html('<img src="{}" alt="{}" loading="lazy" style="{}">', row.image.url, row.prompt, style)
