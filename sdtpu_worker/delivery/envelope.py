"""Checks the size and the shape of a message before Celery sees it.

Any program that can write to Redis can write anything to the queue. Many messages would end a stock Celery worker's
process, or leave a job that never ends. Of a message that passes `check_envelope`, Celery's consumer makes a `Request`
without an exception; whatever is still wrong with it then fails within its own task and becomes that task's result.

In Celery's protocol 2 the headers hold a task's fields, and the body is `[args, kwargs, embed]`; in protocol 1 the body
holds everything. Both bodies are JSON text in base64, and may be deflated. What clients in other languages write for
nothing (headers that are null, `[]` or left out, kwargs that are null) is read as nothing.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Collection, Container, Iterator, Mapping
from functools import partial
from typing import Any

from celery.exceptions import NotRegistered
from kombu.utils import json as kombu_json

from sdtpu_worker.contract.queues import SENT_AT_HEADER, read_sent_at
from sdtpu_worker.delivery.message_rules import (
    ARGUMENTS,
    CODE_ONLY_OPTIONS,
    COMPRESSION,
    DELIVERY_INFO,
    EMBED,
    HEADERS,
    MESSAGE,
    NULL,
    OPTIONS,
    PROPERTIES,
    RESERVED_NAMES,
    SIGNATURE,
    SUBTASK_KWARGS,
    Refusal,
    check_fields,
    is_usable_id,
)
from sdtpu_worker.errors import InvalidMessage
from sdtpu_worker.redaction import brief

MAX_DEPTH = 64
"""How deeply the values of a message may be nested."""
MAX_VALUES = 25_000
"""How many values a JSON text may have. Brackets and commas are counted, also those in prompts, so this is more than
the longest prompts have."""
MAX_PROTOCOL_1_VALUES = 1_000
"""How many values the body of protocol 1 may have: the time of Celery's `saferepr` for its arguments grows with the
square of their number, to minutes for 80,000."""
GUESSED_BYTES = 4096
"""How many bytes of each end of a message are searched for the id of its job."""


class BadEnvelope(Exception):
    """A message that Celery must not see.

    Attributes:
        reason: one line that says what was got and what is allowed.
        task_id: the id of the message's job; None if the message has no usable one.
        task_name: the name of the message's task; None if it has no usable one.
        ignore_result: whether the client wants no result.
        sent_at: when the client sent the job, in seconds since 1970; None if the message does not say so.
        error: the exception to store as the job's result.
    """

    def __init__(self, reason: str, fields: Mapping[str, Any], error: Exception | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        task_id, task_name = fields.get("id"), fields.get("task")
        self.task_id: str | None = task_id if is_usable_id(task_id) else None
        self.task_name: str | None = task_name if is_usable_id(task_name) else None
        self.ignore_result = fields.get("ignore_result") is True
        self.sent_at = read_sent_at(fields.get(SENT_AT_HEADER))
        self.error = error or InvalidMessage(reason)


def check_envelope(raw: bytes, known_tasks: Container[str], max_bytes: int) -> dict[str, Any]:
    """Return a message as kombu's virtual channel delivers it, after checking it.

    Args:
        raw: the message as it was in the queue.
        known_tasks: the names of the tasks that the app has.
        max_bytes: the largest size of the message, and of its inflated body.

    Raises:
        BadEnvelope: Celery cannot make a job of the message. No other exception is ever raised.
    """
    fields: dict[str, Any] = {}
    try:
        if len(raw) > max_bytes:
            raise Refusal(f"the message must have at most {max_bytes:,} bytes, got {len(raw):,}")
        message = _load("the message", raw)
        if isinstance(message, dict):
            if message.get("headers") in (None, []):  # none, as clients in other languages write it
                message["headers"] = {}
            if isinstance(message["headers"], dict):
                fields.update(message["headers"])
        _check_plain("the message", message)
        check_fields("message", message, MESSAGE)
        check_fields("properties", message["properties"], PROPERTIES)
        check_fields("delivery_info", message["properties"]["delivery_info"], DELIVERY_INFO)
        body_bytes = _body_bytes(message, max_bytes)
        body = _load("the body", body_bytes)
        values = _check_plain("the body", body)
        if "task" in fields:
            _check_protocol_2(fields, body, known_tasks)
        elif values <= MAX_PROTOCOL_1_VALUES:
            _check_protocol_1(fields, body, known_tasks)
        else:
            raise Refusal(f"the body of protocol 1 must have at most {MAX_PROTOCOL_1_VALUES:,} values, got {values:,}")
        if (body.get("kwargs", {}) if isinstance(body, dict) else body[1]) is None:
            _fill_in_kwargs(message, body_bytes)
        return message
    except Exception as exc:  # any other than a Refusal is an error of this code, and must not end the worker
        refusal = exc if isinstance(exc, Refusal) else Refusal(f"the message cannot be checked: {brief(exc)}")
        if not is_usable_id(fields.get("id")):
            fields["id"] = find_task_id(raw[:GUESSED_BYTES], raw[-GUESSED_BYTES:])
        raise BadEnvelope(str(refusal), fields, refusal.error) from exc


def find_task_id(raw_head: bytes, raw_tail: bytes) -> str | None:
    """Guess the job's id in a message that is too large or too broken to be read, from its two ends.

    Returns:
        The id, if all that looks like an id in both ends is the same usable id; else None.
    """
    found = set(_ID_PATTERN.findall(raw_head) + _ID_PATTERN.findall(raw_tail))
    if len(found) != 1:
        return None
    try:
        task_id = json.loads(found.pop())
    except ValueError:
        return None
    return task_id if is_usable_id(task_id) else None


_ID_PATTERN = re.compile(rb'"(?:correlation_id|id)"\s*:\s*("(?:[^"\\]|\\.){1,1530}")')
_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_protocol_2(fields: Mapping[str, Any], body: Any, known_tasks: Container[str]) -> None:
    _check_task_fields(fields, known_tasks)
    check_fields("headers", fields, dict.fromkeys(EMBED, NULL))
    if not isinstance(body, list) or len(body) != 3:
        raise Refusal(f"the body must be [args, kwargs, embed], got {brief(body)}")
    args, kwargs, embed = body
    check_fields("body", {"args": args, "kwargs": kwargs}, ARGUMENTS)
    if embed is None:
        return
    check_fields("embed", embed, EMBED)
    if unknown := embed.keys() - EMBED.keys():
        raise Refusal(f"embed must have only {', '.join(EMBED)}, got {brief(min(unknown))}")
    _check_signatures(embed)


def _check_protocol_1(fields: dict[str, Any], body: Any, known_tasks: Container[str]) -> None:
    if not isinstance(body, dict):
        raise Refusal(f"without a task in the headers the body must be a dict (protocol 1), got {brief(body)}")
    fields.update({**body, **fields})  # as Celery does
    _check_task_fields(fields, known_tasks)
    check_fields("body", body, ARGUMENTS)
    check_fields("body", body, EMBED)
    _check_signatures({name: body.get(name) for name in EMBED})


def _check_task_fields(fields: Mapping[str, Any], known_tasks: Container[str]) -> None:
    check_fields("headers", fields, HEADERS)
    if reserved := fields.keys() & RESERVED_NAMES:
        raise Refusal(f"headers must not have the name of a method of Celery's request, got {brief(min(reserved))}")
    if (name := fields["task"]) not in known_tasks:
        raise Refusal(f"task must be one of this app's, got {brief(name)}", NotRegistered(name))


def _load(what: str, raw: bytes) -> Any:
    """Return the value of a JSON text, read as kombu reads it; refuses a text that would take long."""
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise Refusal(f"{what} must have at most {MAX_VALUES:,} values, got more")
    try:
        return kombu_json.loads(raw, _loads=_load_json)
    except Refusal:
        raise
    except RecursionError:
        raise Refusal(f"{what} must be nested at most {MAX_DEPTH} levels deep, got far more") from None
    except Exception as exc:  # the decoders of kombu's `__type__` raise any kind
        raise Refusal(f"{what} must be JSON text in UTF-8, got {brief(raw)}: {brief(str(exc))}") from exc


def _refuse_number(text: str) -> None:
    raise Refusal(f"numbers must be finite, got {text}")


_load_json = partial(json.loads, parse_constant=_refuse_number)


def _check_plain(what: str, value: Any) -> int:
    """Check a JSON value level by level: its depth, its texts and its numbers must do no harm to later steps.

    Returns:
        How many values it has, at all levels.
    """
    level, values = [value], 0
    for _ in range(MAX_DEPTH):
        if not level:
            return values
        values += len(level)
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii() and _SURROGATE.search(item):
                    raise Refusal(f"{what} must not have half a surrogate pair, got {brief(item)}")
            elif isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                _refuse_number(str(item))
        level = below
    raise Refusal(f"{what} must be nested at most {MAX_DEPTH} levels deep, got more")


def _body_bytes(message: dict[str, Any], max_bytes: int) -> bytes:
    """Return the body's JSON text, inflated to at most `max_bytes`."""
    check_fields("headers", message["headers"], COMPRESSION)
    body: bytes = message["body"].encode()
    compression = message["headers"].get("compression")
    if message["properties"].get("body_encoding") == "base64":
        try:
            body = base64.b64decode(body, validate=True)
        except ValueError as exc:
            raise Refusal(f"the body must be base64, got {brief(message['body'])}: {exc}") from exc
    elif compression:
        raise Refusal("a compressed body must be in base64: set body_encoding to base64")
    if not compression:
        return body
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(body, max_bytes)
    except zlib.error as exc:
        raise Refusal(f"the body cannot be inflated: {exc}") from exc
    if inflate.unconsumed_tail or inflate.unused_data or not inflate.eof:
        raise Refusal(f"the body must be one whole zlib stream of at most {max_bytes:,} bytes, inflated")
    return body


def _fill_in_kwargs(message: dict[str, Any], body_bytes: bytes) -> None:
    """Write a message's body anew, with `{}` for kwargs that are null: Celery's request does not know them."""
    body = json.loads(body_bytes)  # as it was sent, without kombu's own types
    body["kwargs" if isinstance(body, dict) else 1] = {}
    message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    message["properties"]["body_encoding"] = "base64"
    message["headers"].pop("compression", None)


def _check_signatures(embed: Mapping[str, Any]) -> None:
    """Check every signature that the message carries (callbacks, chain, chord), and the signatures within them."""
    waiting = list(_signatures_in(embed, EMBED))
    while waiting:
        signature = waiting.pop()
        check_fields("signature", signature, SIGNATURE)
        options, kwargs = signature["options"], signature["kwargs"]
        check_fields("options", options, OPTIONS)
        if reserved := (signature.keys() & RESERVED_NAMES) | (options.keys() & (RESERVED_NAMES | CODE_ONLY_OPTIONS)):
            raise Refusal(f"a signature must not have the fields {', '.join(sorted(reserved))}; only code can set them")
        waiting += _signatures_in(options, ("link", "link_error", "chord", "chain"))
        parts = SUBTASK_KWARGS.get(signature.get("subtask_type"), {})
        check_fields("signature", kwargs, parts)
        waiting += _signatures_in(kwargs, parts)


def _signatures_in(fields: Mapping[str, Any], names: Collection[str]) -> Iterator[Any]:
    for name in names:
        value = fields.get(name)
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value
