"""Which values each field of a task message may have: one table of rules for each part of the message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from celery.app.task import Context
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import compression
from kombu.serialization import registry

from sdtpu_worker.redaction import brief

MAX_ID_CHARACTERS = 255
MAX_RETRIES = 1_000_000
MAX_SECONDS = 1_000_000_000
EARLIEST, LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9999, 12, 1, tzinfo=UTC)
"""Dates between these two can be converted to any time zone and to the seconds of a timer."""


class Refusal(Exception):
    """Why a message is refused; `error` is what its job's result becomes, None for an `InvalidMessage`."""

    def __init__(self, reason: str, error: Exception | None = None) -> None:
        super().__init__(reason)
        self.error = error


class Rule(NamedTuple):
    """Which values a field may have, in words and as a predicate, and whether the field is required."""

    allowed: str
    holds: Callable[[Any], bool]
    required: bool = False


def check_fields(where: str, fields: Any, rules: Mapping[str, Rule]) -> None:
    """Check the fields that have a rule; other fields are left alone.

    Args:
        where: what the error's text calls this part of the message.
        fields: the fields by name.
        rules: the rules by field name.

    Raises:
        Refusal: `fields` is not a dict, or a field is missing or has a value that is not allowed.
    """
    if not isinstance(fields, dict):
        raise Refusal(f"{where} must be a dict, got {brief(fields)}")
    for name, rule in rules.items():
        if name in fields:
            if not rule.holds(fields[name]):
                raise Refusal(f"{where}: {name} must be {rule.allowed}, got {brief(fields[name])}")
        elif rule.required:
            raise Refusal(f"{where}: {name} is missing; it must be {rule.allowed}")


def is_usable_id(value: Any) -> bool:
    """Whether a result can be stored under this id: 1 to 255 printable characters."""
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_CHARACTERS and value.isprintable()


def _is_date(value: Any) -> bool:
    """Whether Celery can parse a date and convert it to any time zone and to the seconds of a timer."""
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


def _of_type(kind: type, allowed: str) -> Rule:
    return Rule(allowed, lambda value: isinstance(value, kind))


def _integer(high: int) -> Rule:
    return Rule(f"an integer from 0 to {high:,}", lambda n: isinstance(n, int) and _is_number(n) and n <= high)


def _one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def _list_of(rule: Rule, length: int | None = None) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) == (length or len(value)) and all(map(rule.holds, value))

    return Rule(f"a list of {length or 'any number'}, each {rule.allowed}", holds)


def _either(*rules: Rule) -> Rule:
    return Rule(" or ".join(r.allowed for r in rules), lambda value: any(r.holds(value) for r in rules))


def _maybe(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed} or null", lambda value: value is None or rule.holds(value))


def _required(rule: Rule) -> Rule:
    return rule._replace(required=True)


NULL = Rule("null", lambda value: value is None)
_ID = Rule(f"1 to {MAX_ID_CHARACTERS} printable characters", is_usable_id)
_TEXT = Rule(f"at most {MAX_ID_CHARACTERS} printable characters", _is_text)
_STRING, _FLAG = _of_type(str, "a string"), _of_type(bool, "true or false")
_DICT, _LIST = _of_type(dict, "a dict"), _of_type(list, "a list")
_SECONDS = Rule(f"a number of seconds from 0 to {MAX_SECONDS:,}", _is_number)
_DATE = Rule("an ISO 8601 date from 1970 to 9999", _is_date)
_ISO_DATE = _DATE._replace(holds=lambda value: isinstance(value, str) and _is_date(value))
_PRIORITY, _INDEX = _integer(255), _integer(MAX_SECONDS)

MESSAGE = {
    "body": _required(_STRING),
    "content-type": _required(_one_of("application/json")._replace(allowed="application/json (task_serializer: json)")),
    "content-encoding": _required(_one_of("utf-8", "UTF-8")),
    "headers": _required(_DICT),
    "properties": _required(_DICT),
}
PROPERTIES = {
    "body_encoding": _maybe(_one_of("base64", "utf-8")),
    "delivery_info": _required(_DICT),
    "delivery_tag": _maybe(_TEXT),
    "priority": _maybe(_PRIORITY),
    "correlation_id": _maybe(_TEXT),
    "reply_to": _maybe(_TEXT),
}
DELIVERY_INFO = {"exchange": _required(_TEXT), "routing_key": _required(_ID), "redelivered": _maybe(_FLAG)}
HEADERS = {
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
"""The headers of protocol 2; protocol 1 has these fields in the body."""
COMPRESSION = {"compression": _maybe(_one_of("application/x-gzip", "gzip", "zlib"))}
ARGUMENTS = {"args": _LIST, "kwargs": _maybe(_DICT)}
"""Of a body; null stands for no keyword arguments, as clients in other languages write it."""
EMBED = {name: _maybe(_LIST) for name in ("callbacks", "errbacks", "chain")} | {"chord": _maybe(_DICT)}
SIGNATURE = {
    "task": _required(_ID),
    "args": _required(_LIST),
    "kwargs": _required(_DICT),
    "options": _required(_DICT),
    "subtask_type": _maybe(_one_of("chain", "group", "chord", "chunks", "xmap", "xstarmap")),
    "immutable": _maybe(_FLAG),
}
OPTIONS = {
    "task_id": _maybe(_ID),
    **dict.fromkeys(("group_id", "root_id", "parent_id", "reply_to", "shadow", "origin"), _maybe(_TEXT)),
    **dict.fromkeys(("queue", "exchange", "exchange_type", "routing_key"), _maybe(_TEXT)),
    **dict.fromkeys(("countdown", "time_limit", "soft_time_limit"), _maybe(_SECONDS)),
    "eta": _maybe(_DATE),
    "expires": _maybe(_either(_DATE, _SECONDS)),
    "retries": _maybe(_integer(MAX_RETRIES)),
    "replaced_task_nesting": _maybe(_integer(MAX_RETRIES)),
    "group_index": _maybe(_INDEX),
    "priority": _maybe(_PRIORITY),
    "serializer": _maybe(_one_of(*registry.name_to_type)),
    "compression": _maybe(Rule("one of kombu's", _is_compression)),
    **dict.fromkeys(("ignore_result", "retry", "add_to_parent"), _maybe(_FLAG)),
    **dict.fromkeys(("headers", "retry_policy"), _maybe(_DICT)),
    "stamped_headers": _maybe(_list_of(_ID)),
    **dict.fromkeys(("link", "link_error"), _maybe(_either(_LIST, _DICT))),
    "chord": _maybe(_DICT),
    "chain": _maybe(_LIST),
}
_TASKS, _ITEMS = {"tasks": _required(_LIST)}, {"task": _required(_DICT), "it": _required(_LIST)}
SUBTASK_KWARGS: dict[str | None, dict[str, Rule]] = {
    "chain": _TASKS,
    "group": _TASKS,
    "chord": {"header": _required(_either(_LIST, _DICT)), "body": _maybe(_DICT)},
    "chunks": {**_ITEMS, "n": _required(_INDEX)},
    "xmap": _ITEMS,
    "xstarmap": _ITEMS,
}
RESERVED_NAMES = frozenset(name for name in dir(Context) if name[0] == "_" or callable(getattr(Context, name)))
"""Names that a header must not have: Celery's `Context` sets every header as an attribute, and would lose these."""
CODE_ONLY_OPTIONS = frozenset(
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
        "event_dispatcher",
        "callbacks",
        "errbacks",
        "content_type",
        "content_encoding",
        "create_sent_event",
    )
)
"""Parameters between `Signature.apply_async` and `Producer.publish` that only code can give, no message."""
