"""The app's configuration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from django.apps import AppConfig

if TYPE_CHECKING:
    from sdtpu_worker.web.sync_front import SyncFront


class SdtpuConfig(AppConfig):
    """Generated images: the jobs API, the model, the admin, the checks."""

    name = "sdtpu_worker.contrib.django"
    label = "sdtpu"
    verbose_name = "Generated images"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the checks and the tasks."""
        from sdtpu_worker.contrib.django import checks, tasks  # noqa: F401  they register themselves

    @functools.cached_property
    def front(self) -> SyncFront:
        """What answers the requests of the jobs API, for the project's Celery app."""
        from celery.app import app_or_default

        from sdtpu_worker.contrib.django.keeper import RowKeeper
        from sdtpu_worker.web.sync_front import SyncFront

        return SyncFront(app_or_default(), RowKeeper())
