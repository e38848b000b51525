"""Keeps prompts out of the log.

Celery and kombu log what they handle: a result when a task has succeeded, the text of an exception when it has failed,
a whole message when it cannot be read. `install_prompt_guard` cleans these log records where they are made, so no
handler, formatter or error tracker ever sees a prompt, whichever of their loggers a record comes from.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery

NOT_LOGGED = "[not logged: sdtpu_log_prompts is off]"

_LIBRARIES = ("celery", "kombu", "py")  # py.warnings: Celery also warns with the text of an exception
_CONTEXTS = ("celery.app.trace", "celery.worker.strategy")  # their records carry a dict of a task's values
_CONTENT = ("args", "kwargs", "argsrepr", "kwargsrepr", "body", "payload", "result", "return_value", "traceback", "exc")
_PLAIN = (str, bool, int, float, type(None), date, time, timedelta)
_QUOTED_VALUE = re.compile(r"(\bgot |\bunknown parameter |\bvalue )(?!-?\d).*", re.DOTALL)
_PIPELINED = re.compile(r"\(([A-Z]+)\b.*\)(?= of pipeline caused error)", re.DOTALL)  # redis-py quotes the command
_OUTSIDE_BODY = "Exception raised outside body: "
_IMAGE_OF_RESULT = re.compile(r"\{'task_id': '[^']*', 'image': \{'uri': '([^'\s]*)'")
# Exceptions of these packages never quote a prompt in their texts: connections, object stores, the devices. No prompt
# goes there but to Redis, whose errors name commands and keys.
_TRUSTED_PACKAGES = (
    "sdtpu_worker", "redis", "jax", "jaxlib", "billiard", "amqp", "fsspec", "s3fs", "botocore", "aiobotocore", "boto3",
    "gcsfs", "google", "adlfs", "azure", "aiohttp", "urllib3", "requests", "huggingface_hub", "safetensors",
)  # fmt: skip
_TRUSTED_TYPES = (OSError, MemoryError, ImportError, NameError)
"""These name files, hosts, modules and variables."""
_TRUSTED_OF_CELERY = (
    "NotRegistered", "AlreadyRegistered", "QueueNotFound", "ImproperlyConfigured", "SecurityError", "TaskRevokedError",
    "BackendStoreError", "BackendGetMetaError", "OperationalError", "ConnectionError", "ChannelError", "LimitsExceeded",
    "InconsistencyError", "VersionMismatch", "ContentDisallowed", "SerializerNotInstalled", "WorkerLostError",
)  # fmt: skip
"""Exceptions of Celery and kombu with texts of their own; the others quote messages, arguments or other exceptions. A
database's error of the same name quotes its statement with the values in it."""


def install_prompt_guard(app: Celery, *quoting: logging.Logger) -> None:
    """Keep prompts out of this process's log above DEBUG; with `sdtpu_log_prompts` on, undo that.

    For a worker of the device pool, where any task may be given a prompt or return one. Safe to call again.

    Args:
        app: whose setting counts.
        quoting: loggers of this package that quote messages; given as objects, because a module that moves changes
            its logger's name.
    """
    from sdtpu_worker.config import read_setting

    remove_prompt_guard()
    if not read_setting("sdtpu_log_prompts", app.conf):
        logging.setLogRecordFactory(PromptGuard(logging.getLogRecordFactory(), quoting))


def remove_prompt_guard() -> None:
    """Undo `install_prompt_guard`; without a guard nothing happens."""
    current = logging.getLogRecordFactory()
    if isinstance(current, PromptGuard):
        logging.setLogRecordFactory(current.make_record)


class PromptGuard:
    """A factory of log records that cleans those of Celery, kombu and some loggers of this package. Any thread.

    Args:
        make_record: the factory that makes the records.
        quoting: the loggers of this package whose records quote messages.
    """

    def __init__(self, make_record: Callable[..., logging.LogRecord], quoting: Iterable[logging.Logger]) -> None:
        self.make_record = make_record
        self._quoting = frozenset(logger.name for logger in quoting)

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        """Make a record without prompts; a record that cannot be cleaned loses its text."""
        record = self.make_record(*args, **kwargs)
        quotes = record.name in self._quoting
        if (quotes or record.name.partition(".")[0] in _LIBRARIES) and record.levelno > logging.DEBUG:
            try:
                _clean(record, quotes)
            except Exception as exc:  # no content of a message may end the thread that logs it
                record.msg, record.args = f"a log line that cannot be cleaned is left out ({type(exc).__name__})", ()
                record.exc_info = record.exc_text = None
        return record


def describe(exc: BaseException | None) -> str:
    """Return what a log line may say of an exception: its type, and its text where that cannot quote a prompt."""
    from sdtpu_worker.errors import InvalidRequest

    exc = getattr(exc, "exc", None) if type(exc).__name__ == "ExceptionWithTraceback" else exc
    kind = type(exc)
    if kind.__name__ == "Retry":
        cause = getattr(exc, "exc", None)
        return f"Retry in {getattr(exc, 'when', None)} s: {describe(cause) if cause else 'asked for by the task'}"
    if isinstance(exc, InvalidRequest) or kind.__name__ == "InvalidTaskError":
        return f"{kind.__name__}({_without_quotes(str(exc))!r})"
    package = kind.__module__.partition(".")[0]
    is_celerys = package in ("celery", "kombu") and kind.__name__ in _TRUSTED_OF_CELERY
    if is_celerys or package in _TRUSTED_PACKAGES or isinstance(exc, _TRUSTED_TYPES):
        text = _PIPELINED.sub(r"(\1 …)", sanitize_url(str(exc)))
        return f"{kind.__name__}({text!r})"
    return f"{kind.__name__}({NOT_LOGGED})"


def _without_quotes(text: str) -> str:
    return _QUOTED_VALUE.sub(lambda match: match[1] + NOT_LOGGED, text)


class _Words(str):
    """A text that stands for an object: its `repr` is the text without quotes."""

    __repr__ = str.__str__


def _clean(record: logging.LogRecord, quotes: bool) -> None:
    """Take out of a record what may be a prompt; of one that `quotes`, also from its strings."""
    exc_info = record.exc_info
    if isinstance(record.args, dict) and record.name in _CONTEXTS:
        # Celery makes this dict for the record alone, and keeps it as the attribute `data` too: changed in place.
        record.args.update(_clean_context(record.args, exc_info[1] if exc_info else sys.exc_info()[1]))
    elif isinstance(record.args, Mapping):
        record.args = _clean_mapping(record.args)
    elif record.args:
        dump = _clean_dump(str(record.msg), record.args, exc_info[1] if exc_info else None)
        record.args = dump or tuple(_clean_value(value) for value in record.args)
        if quotes:
            record.args = tuple(_without_quotes(value) if isinstance(value, str) else value for value in record.args)
    if exc_info:
        record.exc_text = _format_exception(exc_info[1], exc_info[2])
        record.exc_info = None
    if _OUTSIDE_BODY in record.getMessage():
        cause = sys.exc_info()[1]  # Celery warns while it handles the exception
        record.msg, record.args = "%s%s", (_OUTSIDE_BODY, describe(cause) if cause else NOT_LOGGED)


def _clean_context(context: Mapping[str, Any], exc: BaseException | None) -> dict[str, Any]:
    """Return the values to replace in a dict that `celery.app.trace` or `celery.worker.strategy` logs."""
    clean = {key: NOT_LOGGED for key in _CONTENT if key in context}
    if "return_value" in context:
        image = _IMAGE_OF_RESULT.match(str(context["return_value"]))
        clean["return_value"] = image[1] if image else NOT_LOGGED
    if "exc" in context and exc is not None:
        clean["exc"] = describe(exc)
    return clean


def _clean_mapping(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: NOT_LOGGED if key in _CONTENT else _clean_value(value) for key, value in values.items()}


def _clean_value(value: Any) -> Any:
    """Return what a log line may show of a value: a plain value as it is, of any other object only its name."""
    if isinstance(value, _PLAIN) or callable(value):
        return value
    if isinstance(value, BaseException):
        return _Words(describe(value))
    if isinstance(value, Mapping):
        return {key: NOT_LOGGED if key in _CONTENT or not isinstance(part, _PLAIN) else part
                for key, part in value.items()}  # fmt: skip
    if callable(name := getattr(value, "humaninfo", None)):
        return _Words(name())
    return _Words(f"<{type(value).__name__}>")


def _clean_dump(message: str, args: tuple[Any, ...], exc: BaseException | None) -> tuple[Any, ...] | None:
    """Return new arguments for a record that quotes a message or an exception's text; None for any other record."""
    from celery.worker.consumer import consumer

    if message.startswith("Chord %r raised"):
        return args[0], _Words(describe(exc))
    if message == consumer.UNKNOWN_FORMAT:
        return (NOT_LOGGED,)
    if message == consumer.UNKNOWN_TASK_ERROR:
        headers = {key: args[2].get(key) for key in ("id", "task")} if isinstance(args[2], Mapping) else NOT_LOGGED
        return repr(args[0].args[0]), NOT_LOGGED, headers, _clean_value(args[3])
    if message == consumer.INVALID_TASK_ERROR:
        return _clean_value(args[0]), NOT_LOGGED
    if message == consumer.MESSAGE_DECODE_ERROR:
        return _clean_value(args[0]), *args[1:3], NOT_LOGGED, NOT_LOGGED
    return None


def _format_exception(exc: BaseException | None, trace: TracebackType | None) -> str:
    """Return a traceback with its chain of causes, each exception as `describe` gives it."""
    lines: list[str] = []
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        head = ["Traceback (most recent call last):\n", *traceback.format_tb(trace)] if trace else []
        lines = [*head, describe(exc), *lines]
        cause = exc.__cause__
        if cause is None and not exc.__suppress_context__:
            cause = exc.__context__
        if cause is not None:
            lines.insert(0, "\n\nwhich led to:\n\n")
        exc, trace = cause, cause.__traceback__ if cause is not None else None
    return "".join(lines)
