"""What nobody should publish on the channels of Celery's remote control and of its events, one of each kind.

A stock worker of Celery 5.7.0 (thread pool), started anew whenever it was dead: of the first 153 of these, 42 ended its
process and 7 cost it the connection.
"""

from __future__ import annotations

import base64
import json
from typing import Any, NamedTuple

PIDBOX, EVENTS = "/0.celery.pidbox", "/0.celeryev/worker.heartbeat"


class HostileControl(NamedTuple):
    """Where it is published, what, and how it was made."""

    channel: str
    raw: bytes
    kind: str


def control_message(body: Any, headers: Any = None, exchange: Any = "celery.pidbox", **changes: Any) -> bytes:
    """Return a message as a Celery client publishes it."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = {
        "body": base64.b64encode(text).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"clock": 1, "expires": None} if headers is None else headers,
        "properties": {
            "delivery_mode": 1,
            "delivery_info": {"exchange": exchange, "routing_key": "" if exchange == "celery.pidbox" else "worker.x"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "a-tag",
        },
    }
    return json.dumps({**message, **changes}).encode()


def command(method: str, **arguments: Any) -> bytes:
    """Return a command of remote control."""
    return control_message({"method": method, "arguments": arguments, "destination": None})


RAW = (
    *(b"x", b"\xff\xfe\x00", b"null", b"7", b'"text"', b"[]", b"{}", b"[[],{}]", b"true", b"NaN"),
    *(b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b'{"properties": null}', b'{"properties": {}}'),
    b'{"properties": {"delivery_tag": 1}, "body": 7}',
    b'{"properties": {"delivery_tag": 1, "body_encoding": "rot13"}, "body": "x"}',
    b'{"properties": {"delivery_tag": 1, "body_encoding": "base64"}, "body": "%"}',
    b'{"properties": {"delivery_tag": 1}, "headers": 7, "body": "x"}',
)
ENVELOPES = (
    control_message({}, **{"content-type": "application/x-python-serialize"}),
    control_message({}, **{"content-type": 7}),
    control_message({}, **{"content-encoding": "rot13"}),
    *(control_message({"method": "ping"}, headers) for headers in (7, [], "x", {"clock": "x"}, {"clock": {}})),
    control_message({"method": "ping"}, {"compression": "nonesuch"}),
    control_message({"method": "ping"}, {"compression": "gzip"}),
    *(control_message(body) for body in (b"", b"[", b"[" * 50_000, b"\xff")),
)
BODIES: tuple[Any, ...] = (
    *(None, 7, "text", [], [[]], {}, True),
    *({"method": method} for method in (7, None, [], {}, "nonesuch", "__class__")),
    *({"method": "ping", "arguments": arguments} for arguments in (7, "x", [1], {"x": 1}, {"state": 1})),
    *({"method": "ping", "destination": to} for to in (7, [7], {"a": 1}, "x")),
    *({"pattern": pattern, "matcher": matcher} for pattern, matcher in (("[", "pcre"), (7, "glob"), ("*", "x"))),
    *({"method": "ping", "reply_to": to, "ticket": []} for to in (7, {}, [1], {"exchange": 7, "routing_key": 7})),
)
COMMANDS = (
    *(command("revoke", task_id=task_id) for task_id in ([[1]], {"a": 1}, 7, None, [None, 7], [{}])),
    *(command("revoke", task_id="x", terminate=True, signal=signal) for signal in ([], "nonesuch", 10**9)),
    *(command("revoke_by_stamped_headers", headers=headers) for headers in (7, ["x"], {"user": None}, {"user": [[1]]})),
    command("revoke_by_stamped_headers", headers={"user": [{}]}, terminate=True),
    *(command("time_limit", task_name=name, hard=value, soft=value) for name, value in (([], 1), ("x", 1), (7, {}))),
    *(command("time_limit", task_name="sdtpu.generate", hard=value, soft=value) for value in ("x", [], {}, -1)),
    *(
        command("rate_limit", task_name="sdtpu.generate", rate_limit=rate)
        for rate in ([], {}, "x/y", "-", "1/fortnight")
    ),
    *(command(method, n=n) for method in ("pool_grow", "pool_shrink") for n in ("x", [], -1)),
    command("autoscale", max="x", min=[]),
    *(command("add_consumer", queue=queue) for queue in (7, [], {}, "", None)),
    command("add_consumer", queue="other", exchange=[], exchange_type="nonesuch", routing_key={}),
    command("add_consumer", queue="other", exchange_type="nonesuch", options={"x": 1}),
    *(command("cancel_consumer", queue=queue) for queue in (7, [], {}, "nonesuch", None)),
    *(command("election", id=value, topic=value, action=value) for value in (7, [], "x")),
    *(
        command(method, x=1)
        for method in ("stats", "active", "scheduled", "query_task", "heartbeat", "conf", "objgraph")
    ),
    command("query_task", ids=[[]]),
    command("query_task", ids=7),
    command("memdump", samples=[]),
    command("pool_restart", modules=7, reload=True),
)
EVENT_BODIES: tuple[Any, ...] = (
    *(None, 7, "text", [], {}, [7], [{}], {"type": 7}, {"type": "worker-heartbeat"}),
    {"type": "worker-heartbeat", "hostname": [], "timestamp": "x", "clock": "x", "utcoffset": []},
    {"type": "worker-online", "hostname": "x@y", "timestamp": {}, "clock": None, "freq": "x"},
    {"type": "worker-heartbeat", "hostname": "x@y", "timestamp": 1e300, "clock": 1, "utcoffset": "x", "freq": []},
    {"type": "worker-elect", "id": [], "hostname": "x@y", "cver": 7},
)


def hostile_control_messages() -> list[HostileControl]:
    """Return one message of each kind."""
    made = [HostileControl(PIDBOX, raw, f"pidbox: raw {raw[:60]!r}") for raw in (*RAW, *ENVELOPES)]
    made += [HostileControl(PIDBOX, control_message(body), f"pidbox: body {body!r}") for body in BODIES]
    made += [HostileControl(PIDBOX, raw, f"pidbox: command {_body_of(raw)}") for raw in COMMANDS]
    made += [HostileControl(EVENTS, raw, f"events: raw {raw[:60]!r}") for raw in RAW]
    for body in EVENT_BODIES:
        for headers in ({"hostname": "x@y"}, {}, 7):
            raw = control_message(body, headers, "celeryev")
            made.append(HostileControl(EVENTS, raw, f"events: body {body!r}, headers {headers!r}"))
    made.append(HostileControl("/0.celeryev/worker.elect", control_message({}, {}, "celeryev"), "events: no election"))
    return made


def _body_of(raw: bytes) -> str:
    return base64.b64decode(json.loads(raw)["body"]).decode()
