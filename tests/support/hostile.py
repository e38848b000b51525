"""Messages that nobody should send: seeded, and each known to end in a typed error or in the dead-letter list.

Every message starts as one that a Celery client sends for `sdtpu.generate` and is then spoilt in one way, its kind.
What must become of it is known from how it was made, without asking the code under test. Messages of a kind that
starts with `REQUEST` have a sound envelope and a parameter that is not allowed: Celery runs the task, which fails.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MAX_BYTES = 262_144
"""What a worker lets pass by default."""
REQUEST = "request: "


class HostileMessage(NamedTuple):
    """What to put into the queue; the id that must become FAILURE, None if there is no usable one; how it was made."""

    raw: bytes
    task_id: str | None
    kind: str


class Draft:
    """A sound message, to be spoilt: `body` is encoded into `message` by `encode`."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.task_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        self.embed: Any = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        self.args: Any = ["a red circle"]
        self.kwargs: Any = {"seed": rng.getrandbits(40), "num_inference_steps": 2}
        self.body: Any = [self.args, self.kwargs, self.embed]
        self.headers: dict[str, Any] = {
            "lang": "py",
            "task": "sdtpu.generate",
            "id": self.task_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": self.task_id,
            "parent_id": None,
            "argsrepr": "('a red circle',)",
            "kwargsrepr": "{}",
            "origin": "gen1@host",
            "ignore_result": False,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        }
        self.properties: dict[str, Any] = {
            "correlation_id": self.task_id,
            "reply_to": str(uuid.UUID(int=1)),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "sdtpu"},
            "priority": 6,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.UUID(int=2)),
        }
        self.message: dict[str, Any] = {
            "body": None,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": self.headers,
            "properties": self.properties,
        }

    def to_protocol_1(self) -> dict[str, Any]:
        """Move the task's fields from the headers to the body; return the body."""
        fields = ("id", "task", "group", "retries", "eta", "expires", "timelimit")
        self.body = {
            **{name: self.headers[name] for name in fields},
            "args": self.args,
            "kwargs": self.kwargs,
            "utc": True,
            "callbacks": None,
            "errbacks": None,
            "chord": None,
            "taskset": None,
        }
        self.headers.clear()
        return self.body

    def encode(self, body: bytes | None = None) -> bytes:
        """Return the message's bytes, with the body given or that of the draft."""
        if self.message.get("body", "") is None:
            text = json.dumps(self.body).encode() if body is None else body
            self.message["body"] = base64.b64encode(text).decode()
        return json.dumps(self.message).encode()


Spoil = Callable[[Draft], bytes | None]
"""Spoils a draft; returns the raw message if that is not what the draft encodes to."""


class Kind(NamedTuple):
    """One way to spoil a message; `has_id` says whether its job can still be told, `weight` how often it is drawn."""

    name: str
    spoil: Spoil
    has_id: bool = True
    weight: float = 1.0


def hostile_messages(seed: int, count: int) -> Iterator[HostileMessage]:
    """Yield messages of every kind in random order, about a kilobyte each and a few above the size limit."""
    rng = random.Random(seed)
    weights = [kind.weight for kind in KINDS]
    seen: list[str] = []
    for _ in range(count):
        kind = rng.choices(KINDS, weights)[0]
        draft = Draft(rng)
        if seen and rng.random() < 0.02:
            draft = _with_id(draft, rng.choice(seen))
        raw = kind.spoil(draft)
        raw = draft.encode() if raw is None else raw
        if kind.has_id:
            seen.append(draft.task_id)
        yield HostileMessage(raw, draft.task_id if kind.has_id else None, kind.name)


def _with_id(draft: Draft, task_id: Any, correlation_id: Any = None) -> Draft:
    draft.task_id = draft.headers["id"] = draft.headers["root_id"] = task_id
    draft.properties["correlation_id"] = task_id if correlation_id is None else correlation_id
    return draft


def _nested(depth: int, kind: str = "list") -> str:
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


JUNK: tuple[Any, ...] = ([], {}, [[]], {"a": 1}, 7, -1, 1.5, True, "junk\x00", 10**300)
NOT_TEXT: tuple[Any, ...] = ([], {}, 7, 1.5, True, ["x"], "line\nbreak", "\u202eevil", "x" * 300)
NOT_DICT: tuple[Any, ...] = ([], 7, 1.5, True, "text", [["a", 1]])
NOT_LIST: tuple[Any, ...] = ({}, 7, 1.5, True, "text", {"0": 1})
NOT_COUNT: tuple[Any, ...] = ([], {}, -1, 1.5, True, "3", 10**40)
NOT_FLAG: tuple[Any, ...] = ([], {}, 1, 0, "true")
NOT_DATE: tuple[Any, ...] = (
    *(0, "", False, 12.5, [], {}, "tomorrow", "2030-13-01T00:00:00", "0001-01-01T00:00:00", "9999-12-31T23:59:59"),
    *("2030-01-01T00:00:00+99:99", "2030-01-01T00:00:00+24:00", "２０３０-01-01", "2030-01-01" + "0" * 200),
)
WRONG: dict[str, dict[str, tuple[Any, ...]]] = {
    "message": {
        "content-type": (None, 7, [], "application/x-python-serialize", "application/x-yaml", "text/plain", "json"),
        "content-encoding": (None, 7, {}, "binary", "utf-16", "base64"),
        "properties": (None, *NOT_DICT),
        "body": (7, [], {}, True, "", "%%%", "YWJj=YWJj", "W10", "W", "\u00e9\u00e9\u00e9\u00e9"),
    },
    "properties": {
        "delivery_info": (None, *NOT_DICT, {}, {"exchange": ""}, {"routing_key": "sdtpu"}),
        "priority": NOT_COUNT,
        "body_encoding": ("BASE64", "rot13", "binary", 7, [], True, ""),
        "correlation_id": ([], {}, 7, True, ["x"]),
        "reply_to": NOT_TEXT,
        "delivery_tag": NOT_TEXT,
    },
    "delivery_info": {
        "exchange": (None, *NOT_TEXT),
        "routing_key": (None, "", *NOT_TEXT),
        "redelivered": NOT_FLAG,
    },
    "headers": {
        "retries": (None, *NOT_COUNT),
        "timelimit": (
            *(7, True, "1", {}, [], [1], [1, 2, 3], ["1", None], [None, -1], [[], {}]),
            *([True, None], [1e300, None], [None, 10**30]),
        ),
        "eta": NOT_DATE,
        "expires": NOT_DATE,
        **dict.fromkeys(("root_id", "parent_id", "group", "origin", "shadow", "lang"), NOT_TEXT),
        "group_index": NOT_COUNT,
        "argsrepr": ([], {}, 7, True),
        "kwargsrepr": ([], {}, 7, True),
        "replaced_task_nesting": (None, *NOT_COUNT),
        "ignore_result": NOT_FLAG,
        "stamped_headers": (7, "user", {"user": 1}, [[]], [{}], [None], [""], [7]),
        "stamps": (7, "user", [], True),
        "headers": NOT_DICT,
        "compression": (7, [], {}, True, "", "brotli", "application/x-bz2", "zip"),
    },
    "embed": {
        **dict.fromkeys(("callbacks", "errbacks", "chain"), (*NOT_LIST, [None], [7], ["task"], [[]], [{}])),
        "chord": (*NOT_DICT, {}, {"task": "x"}),
    },
    "signature": {
        "task": (None, "", *NOT_TEXT),
        "args": (None, *NOT_LIST),
        "kwargs": (None, *NOT_DICT),
        "options": (None, *NOT_DICT),
        "subtask_type": ([], {}, 7, True, "evil", ""),
        "immutable": NOT_FLAG,
    },
    "options": {
        "task_id": ("", *NOT_TEXT),
        **dict.fromkeys(("group_id", "root_id", "parent_id", "queue", "exchange", "routing_key"), NOT_TEXT),
        **dict.fromkeys(("countdown", "time_limit", "soft_time_limit"), ([], {}, -1, True, "3", 10**40)),
        "eta": (0, "", [], {}, "soon"),
        "expires": (-1, "", [], {}, "soon"),
        **dict.fromkeys(("retries", "priority", "group_index"), NOT_COUNT),
        **dict.fromkeys(("link", "link_error"), (7, True, "task", [7], [None], {}, [{}])),
        "chord": (*NOT_DICT, {}),
        "serializer": (7, [], "nonesuch"),
        "compression": (7, [], "nonesuch"),
        **dict.fromkeys(("headers", "retry_policy"), NOT_DICT),
        **dict.fromkeys(("app", "producer", "connection", "router", "declare", "args", "update", "name"), (None, 7)),
    },
}
"""By where it stands and its name, what a field of a sound message must not be."""


def _wrong(where: str, name: str) -> Kind:
    def spoil(draft: Draft) -> None:
        value = copy.deepcopy(draft.rng.choice(WRONG[where][name]))
        signature = _signature()
        places: dict[str, Any] = {
            "message": draft.message,
            "properties": draft.properties,
            "delivery_info": draft.properties["delivery_info"],
            "headers": draft.headers,
            "embed": draft.embed,
            "signature": signature,
            "options": signature["options"],
        }
        places[where][name] = value
        if where in ("signature", "options"):
            _carry(draft, signature)

    return Kind(f"{where}: wrong {name}", spoil)


def _missing(where: str, name: str) -> Kind:
    def spoil(draft: Draft) -> None:
        signature = _signature()
        places: dict[str, Any] = {"message": draft.message, "headers": draft.headers, "signature": signature}
        places["properties"] = draft.properties
        del places[where][name]
        if where == "signature":
            _carry(draft, signature)

    return Kind(f"{where}: no {name}", spoil)


def _signature(**options: Any) -> dict[str, Any]:
    return {
        "task": "shop.notify",
        "args": [],
        "kwargs": {},
        "options": options,
        "subtask_type": None,
        "immutable": False,
    }


def _carry(draft: Draft, signature: Any) -> None:
    """Let the job carry a signature along in one of the ways there are, perhaps within others."""
    rng = draft.rng
    for _ in range(rng.randrange(3)):
        outer = _signature()
        way = rng.randrange(5)
        if way < 2:
            outer["options"][("link", "link_error")[way]] = rng.choice([signature, [signature]])
        elif way < 4:
            outer |= {"task": "celery.group", "subtask_type": ("group", "chain")[way - 2]}
            outer["kwargs"] = {"tasks": [_signature(), signature]}
        else:
            outer |= {"task": "celery.chord", "subtask_type": "chord"}
            outer["kwargs"] = {"header": [signature], "body": _signature(), "kwargs": {}}
        signature = outer
    place = rng.choice(["callbacks", "errbacks", "chain", "chord"])
    draft.embed[place] = signature if place == "chord" else [_signature(), signature]


def _body(name: str, *choices: str | bytes, **header: Any) -> Kind:
    """Make a kind of body: text, or bytes as they are, with headers that say how to read it."""

    def spoil(draft: Draft) -> bytes:
        body = draft.rng.choice(choices)
        draft.headers.update(header)
        return draft.encode(body.encode() if isinstance(body, str) else body)

    return Kind(f"body: {name}", spoil)


def _noise(name: str, *choices: Any, weight: float = 1.0) -> Kind:
    """Make a kind of raw message in which no job can be recognised."""

    def spoil(draft: Draft) -> bytes:
        raw = draft.rng.choice(choices)
        return raw(draft.rng) if callable(raw) else raw

    return Kind(f"raw: {name}", spoil, has_id=False, weight=weight)


def _raw(name: str, spoil: Spoil, has_id: bool = True, weight: float = 1.0) -> Kind:
    return Kind(f"raw: {name}", spoil, has_id, weight)


def _request(name: str, *choices: tuple[Any, Any]) -> Kind:
    def spoil(draft: Draft) -> None:
        draft.body[:2] = copy.deepcopy(draft.rng.choice(choices))
        if draft.rng.random() < 0.3:
            draft.args, draft.kwargs = draft.body[:2]
            draft.to_protocol_1()

    return Kind(REQUEST + name, spoil)


def _parameter(name: str, *values: Any) -> Kind:
    return _request(f"bad {name}", *((["a red circle"], {name: value}) for value in values))


def _id(name: str, *values: Any, usable: bool = False) -> Kind:
    """Make a kind of id, the same as correlation id; a usable one's job has a parameter that is not allowed."""

    def spoil(draft: Draft) -> None:
        _with_id(draft, draft.rng.choice(values))
        if usable:
            draft.kwargs["num_inference_steps"] = -1

    return Kind(f"{REQUEST if usable else ''}id: {name}", spoil, has_id=usable)


def _other_correlation(draft: Draft) -> None:
    draft.headers["id"] = draft.rng.choice([None, [], {}, 7, True, ""])


def _guess_disagrees(draft: Draft) -> bytes:
    draft.headers["lang"] = {"id": "another"}
    return _truncated_late(draft)


def _truncated(draft: Draft) -> bytes:
    raw = draft.encode()
    return raw[: draft.rng.randrange(1, raw.index(b'"headers"'))]


def _truncated_late(draft: Draft) -> bytes:
    raw = draft.encode()
    return raw[: draft.rng.randrange(raw.index(b'"shadow"'), len(raw) - 1)]


def _bad_utf8(draft: Draft) -> bytes:
    raw = bytearray(draft.encode())
    raw[raw.index(b"application/json") + draft.rng.randrange(10)] = draft.rng.choice([0x80, 0xC0, 0xFF])
    return bytes(raw)


def _duplicate_key(draft: Draft) -> bytes:
    return draft.encode()[:-1] + draft.rng.choice([b', "headers": []}', b', "properties": 7}', b', "headers": "x"}'])


def _header(name: str, *texts: str) -> Kind:
    """Make a kind of extra header, given as JSON text."""

    def spoil(draft: Draft) -> bytes:
        return draft.encode().replace(b'"lang": "py"', b'"lang": "py", ' + draft.rng.choice(texts).encode(), 1)

    return Kind(f"headers: {name}", spoil)


def _foreign_task(draft: Draft) -> None:
    draft.headers["task"] = draft.rng.choice(["shop.charge", "os.system", "celery.nonesuch", "sdtpu.generate "])


def _bad_task(draft: Draft) -> None:
    draft.headers["task"] = draft.rng.choice([None, [], ["sdtpu.generate"], {}, 7, "", "sdtpu.generate\n", "x" * 999])


def _protocol_1(**changes: tuple[Any, ...]) -> Spoil:
    def spoil(draft: Draft) -> None:
        body = draft.to_protocol_1()
        name = draft.rng.choice(list(changes))
        body[name] = copy.deepcopy(draft.rng.choice(changes[name]))

    return spoil


def _protocol_1_header(draft: Draft) -> None:
    draft.to_protocol_1()
    name = draft.rng.choice(["id", "retries", "timelimit", "eta", "expires", "stamped_headers"])
    draft.headers[name] = [[]]


def _protocol_1_foreign(draft: Draft) -> None:
    draft.to_protocol_1()["task"] = "shop.charge"


def _protocol_1_anonymous(draft: Draft) -> None:
    del draft.to_protocol_1()["id"]
    draft.properties["correlation_id"] = None


def _task_and_dict(draft: Draft) -> None:
    draft.body = {"args": draft.args, "kwargs": draft.kwargs, "id": draft.task_id, "task": "sdtpu.generate"}


def _embed_key(draft: Draft) -> None:
    draft.embed[draft.rng.choice(["id", "args", "delivery_info", "get", "retries", "other"])] = 7


def _huge_prompt(draft: Draft) -> None:
    draft.args[0] = "x" * MAX_BYTES


def _huge_header(draft: Draft) -> None:
    draft.headers["kwargsrepr"] = "x" * MAX_BYTES


def _both(text: str) -> tuple[str, ...]:
    """A value as an argument, as a keyword argument and as a carried signature's argument."""
    signature = json.dumps(_signature()).replace('"args": []', f'"args": [{text}]')
    return (
        f'[[{text}], {{}}, {{"callbacks": null}}]',
        f'[[], {{"prompt": {text}}}, null]',
        f'[["a"], {{}}, {{"callbacks": [{signature}]}}]',
    )


KINDS: tuple[Kind, ...] = (
    *(_wrong(where, name) for where, names in WRONG.items() for name in names),
    *(_missing("message", name) for name in ("body", "content-type", "content-encoding", "properties")),
    *(_missing("signature", name) for name in ("task", "args", "kwargs", "options")),
    _missing("properties", "delivery_info"),
    _noise("empty", b"", b" ", b"\n\n", b"\x00"),
    _noise("not JSON", b"hello", b"{", b"}", b"{'a': 1}", b"[1,", b'"', b"\xef\xbb\xbf{}", b"undefined", b"<xml/>"),
    _noise("another JSON value", b"null", b"7", b"[]", b"{}", b'"text"', b"true", b"-1e5", b"[[], {}, {}]", b"[{}]"),
    _noise("random bytes", lambda rng: rng.randbytes(rng.randrange(1, 2000))),
    _noise("a pickle", b"\x80\x04\x95\x1f\x00\x00\x00cos\nsystem\n(S'true'\ntR."),
    _noise("NaN", b"NaN", b"[Infinity]", b'{"body": -Infinity}'),
    _noise("a huge number", lambda rng: b"1" * rng.randrange(5000, 9000), b"1e999", b"[-1e999]"),
    _noise("deep lists", lambda rng: _nested(rng.randrange(65, 4000)).encode(), weight=0.5),
    _noise("deep dicts", lambda rng: _nested(rng.randrange(65, 2000), "dict").encode(), weight=0.5),
    _noise("deep and unclosed", lambda rng: b"[" * rng.randrange(100, 9000), b'{"a":' * 900),
    _noise("very deep", b"[" * (MAX_BYTES - 9), weight=0.1),
    _noise("many lists", b"[" + b"[]," * 80_000 + b"[]]", weight=0.1),
    _noise("many dicts", b"[" + b"{}," * 80_000 + b"{}]", weight=0.1),
    _noise("too large, and noise", b"x" * (MAX_BYTES + 1), b'{"id": ' * 40_000, weight=0.1),
    _raw("too large by its prompt", _huge_prompt, weight=0.1),
    _raw("too large by a header", _huge_header, weight=0.1),
    _raw("truncated early", _truncated, has_id=False),
    _raw("truncated after the id", _truncated_late),
    _raw("invalid UTF-8", _bad_utf8),
    _raw("a duplicate key", _duplicate_key),
    _raw("trailing text", lambda draft: draft.encode() + draft.rng.choice([b"x", b"{}", b"\x00", b"]"])),
    _raw("an outer list", lambda draft: b"[" + draft.encode() + b"]"),
    _raw("UTF-16", lambda draft: draft.encode().decode().encode("utf-16"), has_id=False),
    _raw("no headers", lambda draft: draft.message.update(headers=None)),
    _raw("list as headers", lambda draft: draft.message.update(headers=[["id", draft.task_id]])),
    _missing("headers", "task"),
    _id("empty", ""),
    _id("no text", [], {}, 7, True, ["x"], None),
    _id("control characters", "a\nb", "\x00", "\x1b[31m", "a\tb", "\u200b", "\u2028", "\x7f"),
    _id("a lone surrogate", "\ud800", "id\udfff"),
    _id("too long", "x" * 256, "x" * 5000),
    _id("odd", "../../etc/passwd", "a b", "naïve-☃", "x" * 255, "*", "'; --", "{id}", "%s%n", "\\", '"', usable=True),
    Kind("id: none, but a correlation id", _other_correlation),
    Kind("id: a guess that disagrees", _guess_disagrees, has_id=False),
    Kind("task: foreign", _foreign_task),
    Kind("task: no name", _bad_task),
    _header("deep", *(f'"deep": {_nested(depth)}' for depth in (65, 99, 500, 1500))),
    _header("NaN", '"x": NaN', '"x": [Infinity]', '"sdtpu_sent_at": 1e999'),
    _header("a lone surrogate", '"x": "\\ud800"', '"\\udfff": 1', '"x": ["a\\ud800"]'),
    _header("unknown type", '"x": {"__type__": "evil", "__value__": 1}', '"x": {"__type__": [], "__value__": 1}'),
    _header("bad typed value", '"x": {"__type__": "uuid", "__value__": 7}'),
    _header("a huge number", '"x": ' + "9" * 5000),
    _header("a method's name", '"get": 1', '"update": null', '"_children": 7', '"__class__": "x"', '"clear": {}'),
    _header("embedded fields", '"chain": [1]', '"callbacks": {}', '"errbacks": "x"', '"chord": 7'),
    _body("not JSON", "", "x", "[", "[[], {}, {}", "{'a': 1}", b"\xff\xfe", b"\x80\x04N."),
    _body("another JSON value", "null", "7", '"text"', "true", "{}", "[]", "[[], {}]", "[[], {}, {}, {}]"),
    _body("wrong args", "[null, {}, {}]", "[7, {}, {}]", '["args", {}, {}]', "[{}, {}, {}]"),
    _body("wrong kwargs", "[[], [], {}]", '[[], "kwargs", {}]', "[[], 7, {}]"),
    _body("wrong embed", "[[], {}, []]", "[[], {}, 7]", '[[], {}, "embed"]', "[[], {}, true]"),
    _body("deep", *_both(_nested(99)), *_both(_nested(1500, "dict"))),
    _body("NaN", *_both("NaN"), *_both("-Infinity"), *_both("1e999")),
    _body("a lone surrogate", *_both('"\\ud800"'), *_both('{"\\ud800": 1}')),
    _body("unknown type", *_both('{"__type__": "evil", "__value__": 1}')),
    _body("bad typed value", *_both('{"__type__": "datetime", "__value__": "soon"}')),
    _body("a huge number", *_both("9" * 5000)),
    _body("compressed, but not", '[["a"], {}, null]', b"\x78\x9c\x00", compression="gzip"),
    _body("compressed otherwise", '[["a"], {}, null]', compression="application/x-brotli"),
    _body("a bomb", zlib.compress(b" " * 3_000_000), compression="application/x-gzip"),
    _body("a bomb in JSON", zlib.compress(b"[[" + b'"x",' * 500_000), compression="zlib"),
    Kind("embed: another key", _embed_key),
    Kind("protocol 1: wrong field", _protocol_1(args=(None, {}, 7, "x"), kwargs=([], 7), retries=NOT_COUNT)),
    Kind("protocol 1: wrong date", _protocol_1(eta=NOT_DATE, expires=NOT_DATE)),
    Kind("protocol 1: wrong callbacks", _protocol_1(callbacks=WRONG["embed"]["callbacks"], chord=({}, 7))),
    Kind("protocol 1: wrong header", _protocol_1_header),
    Kind("protocol 1: many lists", _protocol_1(args=([[]] * 3000,))),
    Kind("protocol 1: foreign", _protocol_1_foreign),
    Kind("protocol 1: no id", _protocol_1_anonymous, has_id=False),
    Kind("protocol 2: a dict as body", _task_and_dict),
    _parameter("num_inference_steps", 0, -1, 1001, 1.5, "50", True, [], 10**40),
    _parameter("guidance_scale", "7.5", True, 1e6, []),
    _parameter("sigmas", "cosine", 7, [], True),
    _parameter("eta", 2, -0.1, "1", True, []),
    _parameter("guidance_rescale", 1.5, "0", []),
    _parameter("clip_skip", -1, 12, 1.0, None, True),
    _parameter("prompt_2", 7, "\x00", []),
    _parameter("target_size", 512, [512], [0, 8], [8, 10**9], "8x8", {}),
    _parameter("seed", -1, 2**63, 1.5, "-1", "9" * 5000, True, {}),
    _parameter("height", 0, 7, -8, 513, 1e3, "512", 8192, True),
    _parameter("sampler", "", "nonesuch", 7, [], {}),
    _parameter("image_format", "gif", "", None, 7, []),
    _parameter("negative_prompt", 7, [], "x" * 10_001, "a\x00b"),
    _parameter("no_such_parameter", None, 7),
    _parameter("prompt", "twice"),
    _request("bad prompt", ([""], {}), ([" \n"], {}), ([7], {}), ([None], {}), ([["a"]], {}), ([{"a": 1}], {})),
    _request("a prompt of control characters", (["a\x00b"], {}), (["\x1b[2J"], {}), ([], {"prompt": "a\x07"})),
    _request("a long prompt", (["x" * 10_001], {})),
    _request("no prompt", ([], {}), ([], {"seed": 1})),
    _request("many arguments", (["a", "b"], {}), ([[]] * 50, {})),
)
