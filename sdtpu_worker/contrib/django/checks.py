"""System checks, which `manage.py check` and every start of a server run: what is wrong, what follows, what to do."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.app import app_or_default
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.utils.module_loading import import_string

from sdtpu_worker.config import read_setting
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.plugin import WORKER_STEPS
from sdtpu_worker.settings_table import SETTINGS
from sdtpu_worker.web.redis_client import make_client

_CLIENT_SETTINGS = ("sdtpu_queue", "sdtpu_tenant_shards", "sdtpu_max_queue", "sdtpu_image_store",
                    "sdtpu_read_image_stores")  # fmt: skip


@register("sdtpu")
def check_project(app_configs: Any = None, **_: Any) -> list[CheckMessage]:
    """Return what keeps the jobs API from working."""
    app = app_or_default()
    if not set(WORKER_STEPS) <= app.steps["worker"]:
        return [
            Error(
                f"the current Celery app, {app.main!r}, is not one that `install` has made ready; no job can be sent",
                hint="write `app = install(Celery(…))` (from sdtpu_worker import install) in the project's celery.py,"
                " and import that app in the project's __init__.py",
                id="sdtpu.E001",
            )
        ]
    return [*_check_settings(app), *_check_backend(app), *_check_owner(app)]


def _check_settings(app: Celery) -> list[CheckMessage]:
    found: list[CheckMessage] = []
    for setting in SETTINGS:
        if setting.name in _CLIENT_SETTINGS or setting.name.startswith(("sdtpu_web_", "sdtpu_http_")):
            try:
                read_setting(setting.name, app.conf)
            except ConfigurationError as exc:
                found.append(Error(str(exc), hint="the settings of Django write it in capitals, with CELERY_ before it",
                                   id="sdtpu.E002"))  # fmt: skip
    return found


def _check_backend(app: Celery) -> list[CheckMessage]:
    try:
        make_client(app)
    except ConfigurationError as exc:
        return [
            Warning(
                f"the jobs API answers 503, while generate.delay and GeneratedImage work: {exc}",
                hint="set CELERY_RESULT_BACKEND to redis://…, or leave the app's URLs out",
                id="sdtpu.W001",
            )
        ]
    return []


def _check_owner(app: Celery) -> list[CheckMessage]:
    try:
        path = read_setting("sdtpu_web_owner", app.conf)
    except ConfigurationError:
        return []  # as it is said above
    if path is not None:
        try:
            import_string(path)
        except ImportError as exc:
            return [Error(f"CELERY_SDTPU_WEB_OWNER names {path!r}, which cannot be imported: {exc}",
                          hint="name a function of the project's, which takes a request", id="sdtpu.E003")]  # fmt: skip
        return []
    if not any(name.endswith(".SessionMiddleware") for name in settings.MIDDLEWARE):
        return [
            Warning(
                "without sessions the jobs API takes nobody for its caller: every request is answered 401",
                hint="add django.contrib.sessions and its middleware, or set CELERY_SDTPU_WEB_OWNER",
                id="sdtpu.W002",
            )
        ]
    return []
