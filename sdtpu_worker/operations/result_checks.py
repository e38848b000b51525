"""Start-up check of the result backend: a worker whose results cannot be stored gets every job back, for ever."""

from __future__ import annotations

import contextlib
import logging
import uuid
from typing import TYPE_CHECKING, Any

from celery.states import STARTED, SUCCESS
from kombu.serialization import registry

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

_LASTING_NAMES = ("NoPermissionError", "AuthorizationError", "AuthenticationError", "ImproperlyConfigured",
                  "ProgrammingError")  # fmt: skip
_LASTING_TEXTS = ("no such table", "doesn't exist", "does not exist")
_STORING_NOTHING = ("DisabledBackend", "RPCBackend")
"""Backends that keep no results: without one, and the one that sends each result to the client that asked."""


def check_results(app: Celery) -> None:
    """Store the state of a task that does not exist, and forget it again.

    A backend that does not answer, or takes no writes just now, is no reason not to start: a worker waits for it.

    Args:
        app: a device worker's app.

    Raises:
        ConfigurationError: no result can ever be stored: the backend cannot be made, its serializer is missing or not
            accepted, a table or a permission is missing.
    """
    backend = make_result_backend(app)
    try:
        backend.decode(backend.encode({"status": SUCCESS, "result": {"seed": 1}}))
    except Exception as exc:  # each backend and each serializer has errors of its own
        raise _useless(exc) from exc
    if type(backend).__name__ in _STORING_NOTHING:
        return
    try:
        if (ping := getattr(getattr(backend, "client", None), "ping", None)) is not None:
            ping()  # Celery's own patience with a Redis that is away is long
        task_id = f"sdtpu-start-{uuid.uuid4()}"
        backend.store_result(task_id, None, STARTED)  # no end: listeners count ends
        with contextlib.suppress(Exception):  # without the right to delete it expires
            backend.forget(task_id)
    except Exception as exc:  # each backend has errors of its own
        if any(_is_lasting(cause) for cause in (exc, exc.__cause__) if cause is not None):
            raise _useless(exc) from exc
        logger.warning("the result backend does not take results now (%s); jobs wait for it", _text(exc))


def make_result_backend(app: Celery) -> Any:
    """Return the app's result backend; that connects to nothing yet.

    Raises:
        ConfigurationError: there is none of that name, its library is not installed, its URL is none, or there is no
            such serializer.
    """
    if (name := app.conf.result_serializer) not in registry.name_to_type:  # the backend would raise a KeyError
        raise ConfigurationError(f"result_serializer must be json, or another one that kombu has, got {name!r}")
    try:
        return app.backend
    except Exception as exc:  # each backend has errors of its own
        raise ConfigurationError(
            f"the result backend cannot be made ({_text(exc)}); correct result_backend, or install the library that it"
            " needs"
        ) from exc


def _useless(exc: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"no result can be stored ({_text(exc)}): every job would come back for ever; correct"
        " result_serializer (json) and result_accept_content, the tables and the permissions of the backend"
    )


def _text(exc: Exception) -> str:
    return f"{type(exc).__name__}: {sanitize_url(str(exc))}"


def _is_lasting(exc: BaseException) -> bool:
    names = {cls.__name__ for cls in type(exc).__mro__}
    return not names.isdisjoint(_LASTING_NAMES) or any(text in str(exc) for text in _LASTING_TEXTS)
