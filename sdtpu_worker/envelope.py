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
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from reprlib import Repr
from typing import Any, NamedTuple

from celery.app.task import Context
from celery.exceptions import NotRegistered
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import compression
from kombu.serialization import registry
from kombu.utils import json as kombu_json

from sdtpu_worker.errors import InvalidMessage

MAX_DEPTH = 64
MAX_VALUES = 25_000
"""More than the longest prompts have brackets and commas, since these are what is counted."""
MAX_PROTOCOL_1_VALUES = 1_000
"""Fewer, because Celery's `saferepr` of protocol 1's arguments takes the square of their number: minutes for 80,000."""
MAX_ID_CHARACTERS = 255
MAX_RETRIES = 1_000_000
MAX_SECONDS = 1_000_000_000
EARLIEST, LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9999, 12, 1, tzinfo=UTC)
"""Dates within these can be converted to any time zone and to a timer's seconds."""
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
            raise _Refusal(f"the message must have at most {max_bytes:,} bytes, got {len(raw):,}")
        message = _load("the message", raw)
        if isinstance(message, dict) and isinstance(message.get("headers"), dict):
            fields.update(message["headers"])
        _check_plain("the message", message)
        _check_fields("message", message, _MESSAGE)
        _check_fields("properties", message["properties"], _PROPERTIES)
        _check_fields("delivery_info", message["properties"]["delivery_info"], _DELIVERY_INFO)
        body = _load("the body", _body_bytes(message, max_bytes))
        values = _check_plain("the body", body)
        if "task" in fields:
            _check_protocol_2(fields, body, known_tasks)
        elif values <= MAX_PROTOCOL_1_VALUES:
            _check_protocol_1(fields, body, known_tasks)
        else:
            raise _Refusal(f"the body of protocol 1 must have at most {MAX_PROTOCOL_1_VALUES:,} values, got {values:,}")
        return message
    except Exception as exc:  # one that is no refusal is a fault of ours, and must not end the worker either
        refusal = exc if isinstance(exc, _Refusal) else _Refusal(f"the message cannot be checked: {_show(exc)}")
        if not is_usable_id(fields.get("id")):
            fields["id"] = find_task_id(raw[:GUESSED_BYTES], raw[-GUESSED_BYTES:])
        raise BadEnvelope(str(refusal), fields, refusal.error) from exc


def is_usable_id(value: Any) -> bool:
    """Whether a result can be stored by this id: 1 to 255 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS and value.isprintable()


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
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2
_show = _REPR.repr


class _Refusal(Exception):
    """Why a message is refused, and what its job's result should become if not an `InvalidMessage`."""

    def __init__(self, reason: str, error: Exception | None = None) -> None:
        super().__init__(reason)
        self.error = error


def _check_protocol_2(fields: Mapping[str, Any], body: Any, known_tasks: Container[str]) -> None:
    _check_task_fields(fields, known_tasks)
    _check_fields("headers", fields, dict.fromkeys(_EMBED, _NOTHING))
    if not isinstance(body, list) or len(body) != 3:
        raise _Refusal(f"the body must be [args, kwargs, embed], got {_show(body)}")
    args, kwargs, embed = body
    _check_fields("body", {"args": args, "kwargs": kwargs}, _ARGUMENTS)
    if embed is None:
        return
    _check_fields("embed", embed, _EMBED)
    if unknown := embed.keys() - _EMBED.keys():
        raise _Refusal(f"embed must have only {', '.join(_EMBED)}, got {_show(min(unknown))}")
    _check_signatures(embed)


def _check_protocol_1(fields: dict[str, Any], body: Any, known_tasks: Container[str]) -> None:
    if not isinstance(body, dict):
        raise _Refusal(f"without a task in the headers the body must be a dict (protocol 1), got {_show(body)}")
    fields.update({**body, **fields})  # as Celery does
    _check_task_fields(fields, known_tasks)
    _check_fields("body", body, _ARGUMENTS)
    _check_fields("body", body, _EMBED)
    _check_signatures({name: body.get(name) for name in _EMBED})


def _check_task_fields(fields: Mapping[str, Any], known_tasks: Container[str]) -> None:
    _check_fields("headers", fields, _HEADERS)
    if private := fields.keys() & _PRIVATE:
        raise _Refusal(f"headers must not be named as a method of Celery's request is, got {_show(min(private))}")
    if (name := fields["task"]) not in known_tasks:
        raise _Refusal(f"task must be one of this app's, got {_show(name)}", NotRegistered(name))


def _load(what: str, raw: bytes) -> Any:
    """Read JSON as kombu does, if it is not so much that reading it takes long."""
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise _Refusal(f"{what} must have at most {MAX_VALUES:,} values, got more")
    try:
        return kombu_json.loads(raw, _loads=_load_json)
    except _Refusal:
        raise
    except RecursionError:
        raise _Refusal(f"{what} must be nested at most {MAX_DEPTH} levels deep, got far more") from None
    except Exception as exc:  # whatever the decoders of `__type__` raise
        raise _Refusal(f"{what} must be JSON text in UTF-8, got {_show(raw)}: {_show(str(exc))}") from exc


def _refuse_number(text: str) -> None:
    raise _Refusal(f"numbers must be finite, got {text}")


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
                    raise _Refusal(f"{what} must not have half a surrogate pair, got {_show(item)}")
            elif isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                _refuse_number(str(item))
        level = below
    raise _Refusal(f"{what} must be nested at most {MAX_DEPTH} levels deep, got more")


def _body_bytes(message: dict[str, Any], max_bytes: int) -> bytes:
    """Return the body's JSON text; inflated with a bound."""
    _check_fields("headers", message["headers"], _COMPRESSION)
    body: bytes = message["body"].encode()
    compression = message["headers"].get("compression")
    if message["properties"].get("body_encoding") == "base64":
        try:
            body = base64.b64decode(body, validate=True)
        except ValueError as exc:
            raise _Refusal(f"the body must be base64, got {_show(message['body'])}: {exc}") from exc
    elif compression:
        raise _Refusal("a compressed body must be in base64: set body_encoding to base64")
    if not compression:
        return body
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(body, max_bytes)
    except zlib.error as exc:
        raise _Refusal(f"the body cannot be inflated: {exc}") from exc
    if inflate.unconsumed_tail or inflate.unused_data or not inflate.eof:
        raise _Refusal(f"the body must be one whole zlib stream of at most {max_bytes:,} bytes, inflated")
    return body


class _Rule(NamedTuple):
    """What a field may be: in words, as a predicate, and whether it may be absent."""

    allowed: str
    holds: Callable[[Any], bool]
    required: bool = False


def _check_fields(where: str, fields: Any, rules: Mapping[str, _Rule]) -> None:
    if not isinstance(fields, dict):
        raise _Refusal(f"{where} must be a dict, got {_show(fields)}")
    for name, rule in rules.items():
        if name in fields:
            if not rule.holds(fields[name]):
                raise _Refusal(f"{where}: {name} must be {rule.allowed}, got {_show(fields[name])}")
        elif rule.required:
            raise _Refusal(f"{where}: {name} is missing; it must be {rule.allowed}")


def _check_signatures(embed: Mapping[str, Any]) -> None:
    """Check every signature that the job carries along, and those within them."""
    waiting = list(_signatures_in(embed, _EMBED))
    while waiting:
        signature = waiting.pop()
        _check_fields("signature", signature, _SIGNATURE)
        options, kwargs = signature["options"], signature["kwargs"]
        _check_fields("options", options, _OPTIONS)
        if private := (signature.keys() & _PRIVATE) | (options.keys() & (_PRIVATE | _NO_OPTIONS)):
            raise _Refusal(f"a signature must not have {', '.join(sorted(private))}")
        waiting += _signatures_in(options, ("link", "link_error", "chord", "chain"))
        parts = _PARTS.get(signature.get("subtask_type"), {})
        _check_fields("signature", kwargs, parts)
        waiting += _signatures_in(kwargs, parts)


def _signatures_in(fields: Mapping[str, Any], names: Collection[str]) -> Iterator[Any]:
    for name in names:
        value = fields.get(name)
        if isinstance(value, list):
            yield from value
        elif value is not None:
            yield value


def _is_date(value: Any) -> bool:
    """Whether Celery can parse a date and convert it to its time zone, the system's and a timer's."""
    if isinstance(value, str) and not 0 < len(value) <= 64:
        return False
    try:
        return EARLIEST <= maybe_make_aware(maybe_iso8601(value)) <= LATEST
    except Exception:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS


def _is_text(value: Any) -> bool:
    return value == "" or is_usable_id(value)


def _is_compression(value: Any) -> bool:
    try:
        return bool(compression.get_encoder(value))
    except Exception:
        return False


def _of_type(kind: type, allowed: str) -> _Rule:
    return _Rule(allowed, lambda value: isinstance(value, kind))


def _integer(high: int) -> _Rule:
    return _Rule(f"an integer from 0 to {high:,}", lambda n: isinstance(n, int) and _is_number(n) and n <= high)


def _one_of(*choices: str) -> _Rule:
    return _Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _list_of(rule: _Rule, length: int | None = None) -> _Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) == (length or len(value)) and all(map(rule.holds, value))

    return _Rule(f"a list of {length or 'any number'}, each {rule.allowed}", holds)


def _either(*rules: _Rule) -> _Rule:
    return _Rule(" or ".join(r.allowed for r in rules), lambda value: any(r.holds(value) for r in rules))


def _maybe(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.allowed} or null", lambda value: value is None or rule.holds(value))


def _required(rule: _Rule) -> _Rule:
    return rule._replace(required=True)


_NOTHING = _Rule("null", lambda value: value is None)
_ID = _Rule(f"1 to {MAX_ID_CHARACTERS} printable characters", is_usable_id)
_TEXT = _Rule(f"at most {MAX_ID_CHARACTERS} printable characters", _is_text)
_STRING, _FLAG = _of_type(str, "a string"), _of_type(bool, "true or false")
_DICT, _LIST = _of_type(dict, "a dict"), _of_type(list, "a list")
_SECONDS = _Rule(f"a number of seconds from 0 to {MAX_SECONDS:,}", _is_number)
_DATE = _Rule("an ISO 8601 date from 1970 to 9999", _is_date)
_ISO_DATE = _DATE._replace(holds=lambda value: isinstance(value, str) and _is_date(value))
_PRIORITY, _INDEX = _integer(255), _integer(MAX_SECONDS)

_MESSAGE = {
    "body": _required(_STRING),
    "content-type": _required(_one_of("application/json")),
    "content-encoding": _required(_one_of("utf-8", "UTF-8")),
    "headers": _required(_DICT),
    "properties": _required(_DICT),
}
_PROPERTIES = {
    "body_encoding": _maybe(_one_of("base64", "utf-8")),
    "delivery_info": _required(_DICT),
    "delivery_tag": _maybe(_TEXT),
    "priority": _maybe(_PRIORITY),
    "correlation_id": _maybe(_TEXT),
    "reply_to": _maybe(_TEXT),
}
_DELIVERY_INFO = {"exchange": _required(_TEXT), "routing_key": _required(_ID), "redelivered": _maybe(_FLAG)}
_HEADERS = {
    "id": _required(_ID),
    "task": _required(_ID),
    "retries": _integer(MAX_RETRIES),
    "timelimit": _maybe(_list_of(_maybe(_SECONDS), 2)),
    "eta": _maybe(_ISO_DATE),
    "expires": _maybe(_ISO_DATE),
    **dict.fromkeys(("root_id", "parent_id", "group", "taskset", "origin", "shadow", "lang"), _maybe(_TEXT)),
    "group_index": _maybe(_INDEX),
    "argsrepr": _maybe(_STRING),
    "kwargsrepr": _maybe(_STRING),
    "ignore_result": _maybe(_FLAG),
    "utc": _maybe(_FLAG),
    "replaced_task_nesting": _integer(MAX_RETRIES),
    "stamped_headers": _maybe(_list_of(_ID)),
    "stamps": _maybe(_DICT),
    "headers": _maybe(_DICT),
}
_COMPRESSION = {"compression": _maybe(_one_of("application/x-gzip", "gzip", "zlib"))}
_ARGUMENTS = {"args": _LIST, "kwargs": _DICT}
_EMBED = {name: _maybe(_LIST) for name in ("callbacks", "errbacks", "chain")} | {"chord": _maybe(_DICT)}
_SIGNATURE = {
    "task": _required(_ID),
    "args": _required(_LIST),
    "kwargs": _required(_DICT),
    "options": _required(_DICT),
    "subtask_type": _maybe(_one_of("chain", "group", "chord", "chunks", "xmap", "xstarmap")),
    "immutable": _maybe(_FLAG),
}
_OPTIONS = {
    "task_id": _maybe(_ID),
    **dict.fromkeys(("group_id", "root_id", "parent_id", "reply_to", "shadow", "origin"), _maybe(_TEXT)),
    **dict.fromkeys(("queue", "exchange", "routing_key"), _maybe(_TEXT)),
    **dict.fromkeys(("countdown", "time_limit", "soft_time_limit"), _maybe(_SECONDS)),
    "eta": _maybe(_DATE),
    "expires": _maybe(_either(_DATE, _SECONDS)),
    "retries": _maybe(_integer(MAX_RETRIES)),
    "replaced_task_nesting": _maybe(_integer(MAX_RETRIES)),
    "group_index": _maybe(_INDEX),
    "priority": _maybe(_PRIORITY),
    "serializer": _maybe(_one_of(*registry.name_to_type)),
    "compression": _maybe(_Rule("one of kombu's", _is_compression)),
    **dict.fromkeys(("ignore_result", "retry", "add_to_parent"), _maybe(_FLAG)),
    **dict.fromkeys(("headers", "retry_policy"), _maybe(_DICT)),
    "stamped_headers": _maybe(_list_of(_ID)),
    **dict.fromkeys(("link", "link_error"), _maybe(_either(_LIST, _DICT))),
    "chord": _maybe(_DICT),
    "chain": _maybe(_LIST),
}
_TASKS, _ITEMS = {"tasks": _required(_LIST)}, {"task": _required(_DICT), "it": _required(_LIST)}
_PARTS: dict[str | None, dict[str, _Rule]] = {
    "chain": _TASKS,
    "group": _TASKS,
    "chord": {"header": _required(_either(_LIST, _DICT)), "body": _maybe(_DICT)},
    "chunks": {**_ITEMS, "n": _required(_INDEX)},
    "xmap": _ITEMS,
    "xstarmap": _ITEMS,
}
_PRIVATE = frozenset(name for name in dir(Context) if name[0] == "_" or callable(getattr(Context, name)))
_NO_OPTIONS = frozenset(
    (
        "args",
        "kwargs",
        "name",
        "app",
        "options",
        "producer",
        "publisher",
        "connection",
        "router",
        "result_cls",
        "route_name",
        "task_type",
        "body",
        "declare",
        "exchange_type",
        "event_dispatcher",
        "callbacks",
        "errbacks",
        "content_type",
        "content_encoding",
        "create_sent_event",
    )
)
"""Parameters on the way from `Signature.apply_async` to `Producer.publish` that only code can give."""
