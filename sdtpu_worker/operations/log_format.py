"""The form of a worker's log lines: Celery's own text or JSON, with the task's id on every line that a job's code logs.

A formatter runs in the thread that logs, so it knows which task that thread runs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from typing import Any

from celery import current_task
from celery.apps import worker as celery_worker

_task: ContextVar[tuple[str, str | None] | None] = ContextVar("sdtpu_logged_task", default=None)
_LOGGERS = ("", "celery", "celery.task")  # those that Celery gives handlers
_UUID = re.compile(r"(?<![\w.-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?!\.?[\w-])")
"""A UUID that is a word of its own: not a part of a device's, a file's or a queue's name."""
_WARNINGS = logging.getLogger("py.warnings")
_MOST_WARNINGS_HELD = 100
_safe_say = celery_worker.safe_say


@contextmanager
def task_on_lines(task_id: str, task_name: str | None) -> Iterator[None]:
    """Have all that the calling thread logs in this block name a task, also before and after Celery runs its code."""
    token = _task.set((task_id, task_name))
    try:
        yield
    finally:
        _task.reset(token)


def install_log_format(name: str) -> None:
    """Give every handler that Celery's worker logs to a formatter of this package. Safe to call again.

    Args:
        name: `sdtpu_log_format`: `text` keeps the handler's own lines and adds the task's id, `json` replaces them, and
            what Celery says past its log while it stops.
    """
    remove_log_format()
    for handler in _handlers():
        before = handler.formatter or logging.Formatter()
        handler.setFormatter(JsonFormatter(before) if name == "json" else TextFormatter(before))
    if name == "json":
        celery_worker.safe_say = _say_as_json


def remove_log_format() -> None:
    """Undo `install_log_format`; without it nothing happens."""
    for handler in _handlers():
        if isinstance(handler.formatter, TextFormatter):
            handler.setFormatter(handler.formatter.before)
    celery_worker.safe_say = _safe_say


def writes_json() -> bool:
    """Return whether log lines are JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in _handlers())


def hold_warnings() -> None:
    """Keep Python's warnings for the log, which has no handlers yet; without `release_warnings` they end on stderr.

    Celery warns of a worker that runs as root before it sets its log up, and Python would print that as text.
    """
    stderr = logging.StreamHandler()
    stderr.setFormatter(JsonFormatter(logging.Formatter()))
    _WARNINGS.addHandler(_HeldWarnings(_MOST_WARNINGS_HELD, logging.CRITICAL, stderr))
    logging.captureWarnings(True)


def release_warnings() -> None:
    """Log the warnings that were held; without any nothing happens."""
    for handler in [handler for handler in _WARNINGS.handlers if isinstance(handler, _HeldWarnings)]:
        _WARNINGS.removeHandler(handler)
        for record in handler.buffer:
            if _WARNINGS.isEnabledFor(record.levelno):
                _WARNINGS.handle(record)
        handler.buffer.clear()
        handler.close()


class _HeldWarnings(MemoryHandler):
    """Holds warnings; writes them to its target when the process ends or they are too many."""


class TextFormatter(logging.Formatter):
    """Adds the id of the task that the thread runs to the end of a line that does not have it.

    Args:
        before: the formatter of the handler.
    """

    def __init__(self, before: logging.Formatter) -> None:
        super().__init__()
        self.before = before

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        text = self.before.format(record)
        task_id, _ = _running_task()
        if not task_id or task_id in text:
            return text
        line, line_feed, rest = text.partition("\n")
        return f"{line} [task {task_id}]{line_feed}{rest}"


class JsonFormatter(TextFormatter):
    """Makes one JSON object a line.

    It has `time` (UTC, ISO 8601), `level`, `logger`, `message`, `process` and `thread`; `task_id` and `task_name` of
    the task that the thread runs, or else that the line is about; where the thread has a span of OpenTelemetry
    `trace_id` and `span_id`; `job` with the facts of a job's end; and `error` with a traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        message = record.getMessage()
        task_id, task_name = _running_task()
        if task_id is None:
            task_id, task_name = _named_task(record, message)
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        facts = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "process": record.processName,
            "thread": record.threadName,
            "task_id": task_id,
            "task_name": task_name,
            **_running_span(),
            "job": getattr(record, "job", None),
            "error": record.exc_text or (self.formatException(record.exc_info) if record.exc_info else None),
        }
        return json.dumps({name: value for name, value in facts.items() if value is not None}, default=str)


def _running_task() -> tuple[str | None, str | None]:
    """Return the id and the name of the task that the calling thread runs."""
    if (task := _task.get()) is not None:
        return task
    if current_task and current_task.request.id:
        return current_task.request.id, current_task.name
    return None, None


def _named_task(record: logging.LogRecord, message: str) -> tuple[str | None, str | None]:
    """Return the id and the name of the task that a line is about, as far as it says so.

    Celery's consumer and its remote control log in the main thread. Some of their lines have a context
    (`extra={"data": …}`), the others name the task in the message; of a line that names several, none is taken.
    """
    context = getattr(record, "data", None)
    if isinstance(context, dict) and isinstance(context.get("id"), str):
        return context["id"], context.get("name")
    named = set(_UUID.findall(message))
    return (named.pop(), None) if len(named) == 1 else (None, None)


def _running_span() -> dict[str, str]:
    """Return the ids of the calling thread's trace and span, in hexadecimal; nothing without OpenTelemetry."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return {}
    context = trace.get_current_span().get_span_context()
    return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"} if context.is_valid else {}


def _say_as_json(text: str, stream: Any = sys.__stderr__) -> None:
    """Write a line as Celery does in its signal handlers: at once, past the log's locks and buffers."""
    record = logging.LogRecord("celery.apps.worker", logging.INFO, "", 0, text, None, None)
    with suppress(AttributeError, OSError):  # no stream, or nobody who reads it: the worker stops all the same
        os.write(stream.fileno(), f"{JsonFormatter(logging.Formatter()).format(record)}\n".encode())


def _handlers() -> list[logging.Handler]:
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    return list(dict.fromkeys(handlers))
