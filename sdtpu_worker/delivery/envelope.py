"""Whether Celery can live with a message: its size and its shape, checked before Celery sees it.

Whoever can write to Redis can write anything to the queue, and much of it would end a stock worker's process or leave
a job without an end. What passes `check_envelope` becomes a `Request` in Celery's consumer without an exception, and
everything that can still be wrong with it goes wrong within its own task and ends in that task's result.

Protocol 2 of Celery keeps a task's fields in the headers and `[args, kwargs, embed]` in the body; protocol 1 keeps
them all in the body. Either body is JSON text in base64, perhaps deflated.
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

from sdtpu_worker.delivery.message_rules import (
    ARGUMENTS,
    COMPRESSION,
    DELIVERY_INFO,
    EMBED,
    HEADERS,
    MESSAGE,
    NO_OPTIONS,
    NOTHING,
    OPTIONS,
    PARTS,
    PRIVATE,
    PROPERTIES,
    SIGNATURE,
    Refusal,
    check_fields,
    is_usable_id,
)
from sdtpu_worker.errors import InvalidMessage
from sdtpu_worker.show import show

MAX_DEPTH = 64
MAX_VALUES = 25_000
"""More than the longest prompts have brackets and commas, since these are what is counted."""
MAX_PROTOCOL_1_VALUES = 1_000
"""Fewer, because Celery's `saferepr` of protocol 1's arguments takes the square of their number: minutes for 80,000."""
GUESSED_BYTES = 4096


class BadEnvelope(Exception):
    """A message that Celery must not see.

    Attributes:
        reason: one line: what was got and what is allowed.
        task_id: the id of the job that the message was to be; None if it has no usable one.
        task_name: the name of its task, if it has one.
        ignore_result: whether its client asked for no result.
        error: what the job's result should become.
    """

    def __init__(self, reason: str, fields: Mapping[str, Any], error: Exception | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        task_id, task_name = fields.get("id"), fields.get("task")
        self.task_id: str | None = task_id if is_usable_id(task_id) else None
        self.task_name: str | None = task_name if is_usable_id(task_name) else None
        self.ignore_result = fields.get("ignore_result") is True
        self.error = error or InvalidMessage(reason)


def check_envelope(raw: bytes, known_tasks: Container[str], max_bytes: int) -> dict[str, Any]:
    """Return the message that kombu's virtual channel delivers, unchanged.

    Args:
        raw: what stood in the queue.
        known_tasks: names of the tasks that the app has.
        max_bytes: of the message, and of its body when it is inflated.

    Raises:
        BadEnvelope: Celery cannot make a job of it. Nothing else is ever raised.
    """
    fields: dict[str, Any] = {}
    try:
        if len(raw) > max_bytes:
            raise Refusal(f"the message must have at most {max_bytes:,} bytes, got {len(raw):,}")
        message = _load("the message", raw)
        if isinstance(message, dict) and isinstance(message.get("headers"), dict):
            fields.update(message["headers"])
        _check_plain("the message", message)
        check_fields("message", message, MESSAGE)
        check_fields("properties", message["properties"], PROPERTIES)
        check_fields("delivery_info", message["properties"]["delivery_info"], DELIVERY_INFO)
        body = _load("the body", _body_bytes(message, max_bytes))
        values = _check_plain("the body", body)
        if "task" in fields:
            _check_protocol_2(fields, body, known_tasks)
        elif values <= MAX_PROTOCOL_1_VALUES:
            _check_protocol_1(fields, body, known_tasks)
        else:
            raise Refusal(f"the body of protocol 1 must have at most {MAX_PROTOCOL_1_VALUES:,} values, got {values:,}")
        return message
    except Exception as exc:  # one that is no refusal is a fault of ours, and must not end the worker either
        refusal = exc if isinstance(exc, Refusal) else Refusal(f"the message cannot be checked: {show(exc)}")
        if not is_usable_id(fields.get("id")):
            fields["id"] = find_task_id(raw[:GUESSED_BYTES], raw[-GUESSED_BYTES:])
        raise BadEnvelope(str(refusal), fields, refusal.error) from exc


def find_task_id(raw_head: bytes, raw_tail: bytes) -> str | None:
    """Guess the id of a message that is too large or too broken to be read, from its first and last kilobytes.

    Returns:
        The id, if everything there that looks like one agrees and it is a usable id; else None.
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
    check_fields("headers", fields, dict.fromkeys(EMBED, NOTHING))
    if not isinstance(body, list) or len(body) != 3:
        raise Refusal(f"the body must be [args, kwargs, embed], got {show(body)}")
    args, kwargs, embed = body
    check_fields("body", {"args": args, "kwargs": kwargs}, ARGUMENTS)
    if embed is None:
        return
    check_fields("embed", embed, EMBED)
    if unknown := embed.keys() - EMBED.keys():
        raise Refusal(f"embed must have only {', '.join(EMBED)}, got {show(min(unknown))}")
    _check_signatures(embed)


def _check_protocol_1(fields: dict[str, Any], body: Any, known_tasks: Container[str]) -> None:
    if not isinstance(body, dict):
        raise Refusal(f"without a task in the headers the body must be a dict (protocol 1), got {show(body)}")
    fields.update({**body, **fields})  # as Celery does
    _check_task_fields(fields, known_tasks)
    check_fields("body", body, ARGUMENTS)
    check_fields("body", body, EMBED)
    _check_signatures({name: body.get(name) for name in EMBED})


def _check_task_fields(fields: Mapping[str, Any], known_tasks: Container[str]) -> None:
    check_fields("headers", fields, HEADERS)
    if private := fields.keys() & PRIVATE:
        raise Refusal(f"headers must not be named as a method of Celery's request is, got {show(min(private))}")
    if (name := fields["task"]) not in known_tasks:
        raise Refusal(f"task must be one of this app's, got {show(name)}", NotRegistered(name))


def _load(what: str, raw: bytes) -> Any:
    """Read JSON as kombu does, if it is not so much that reading it takes long."""
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise Refusal(f"{what} must have at most {MAX_VALUES:,} values, got more")
    try:
        return kombu_json.loads(raw, _loads=_load_json)
    except Refusal:
        raise
    except RecursionError:
        raise Refusal(f"{what} must be nested at most {MAX_DEPTH} levels deep, got far more") from None
    except Exception as exc:  # whatever the decoders of `__type__` raise
        raise Refusal(f"{what} must be JSON text in UTF-8, got {show(raw)}: {show(str(exc))}") from exc


def _refuse_number(text: str) -> None:
    raise Refusal(f"numbers must be finite, got {text}")


_load_json = partial(json.loads, parse_constant=_refuse_number)


def _check_plain(what: str, value: Any) -> int:
    """Go through a JSON value level by level: depth, text and numbers must be what every later step can bear.

    Returns:
        How many values there are in it.
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
                    raise Refusal(f"{what} must not have half a surrogate pair, got {show(item)}")
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
    """Return the body's JSON text; inflated with a bound."""
    check_fields("headers", message["headers"], COMPRESSION)
    body: bytes = message["body"].encode()
    compression = message["headers"].get("compression")
    if message["properties"].get("body_encoding") == "base64":
        try:
            body = base64.b64decode(body, validate=True)
        except ValueError as exc:
            raise Refusal(f"the body must be base64, got {show(message['body'])}: {exc}") from exc
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


def _check_signatures(embed: Mapping[str, Any]) -> None:
    """Check every signature that the job carries along, and those within them."""
    waiting = list(_signatures_in(embed, EMBED))
    while waiting:
        signature = waiting.pop()
        check_fields("signature", signature, SIGNATURE)
        options, kwargs = signature["options"], signature["kwargs"]
        check_fields("options", options, OPTIONS)
        if private := (signature.keys() & PRIVATE) | (options.keys() & (PRIVATE | NO_OPTIONS)):
            raise Refusal(f"a signature must not have {', '.join(sorted(private))}")
        waiting += _signatures_in(options, ("link", "link_error", "chord", "chain"))
        parts = PARTS.get(signature.get("subtask_type"), {})
        check_fields("signature", kwargs, parts)
        waiting += _signatures_in(kwargs, parts)


def _signatures_in(fields: Mapping[str, Any], names: Collection[str]) -> Iterator[Any]:
    for name in names:
        value = fields.get(name)
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value
