"""Whose request it is: the user that has logged in, else the session, or what `sdtpu_web_owner` finds."""

from __future__ import annotations

from celery.app import app_or_default
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.utils.module_loading import import_string

from sdtpu_worker.config import read_setting
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.owners import PREFIX, make_caller, owner_in_session
from sdtpu_worker.web.problems import Refusal


def find_owner(request: HttpRequest) -> str | Caller | None:
    """Return whose request it is; None for nobody."""
    path = read_setting("sdtpu_web_owner", app_or_default().conf)
    if path is not None:
        found: str | Caller | None = import_string(path)(request)
        return found
    user = getattr(request, "user", None)
    if user is not None and user.is_authenticated:
        return f"user-{user.pk}"
    return owner_in_session(request.session) if hasattr(request, "session") else None


def owner_name(request: HttpRequest) -> str:
    """Return whose request it is, as `GeneratedImage.owner` has it.

    Raises:
        PermissionDenied: it is nobody's.
    """
    try:
        return make_caller(find_owner(request), app_or_default().conf).name.removeprefix(PREFIX)
    except Refusal as exc:
        raise PermissionDenied(exc.detail) from exc
