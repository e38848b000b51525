"""A request and its answer, as every web framework has them: fronts turn their own into these and back."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sdtpu_worker.web.caller import Caller

T = TypeVar("T")


async def _just_wait(work: Coroutine[Any, Any, T]) -> T:
    return await work


@dataclass(frozen=True)
class WebRequest:
    """A request to the jobs API.

    Attributes:
        base: the address of the jobs API, without a slash at its end, before a job's id.
        headers: by their lower-case names.
        query: what follows the question mark.
        find_caller: returns who asks; raises `Refusal`.
        read_body: returns the body, given the most bytes that it may have; raises `Refusal` for a larger one.
        unless_left: waits for something, unless the caller goes away first, where its front can know that.
        may_wait: whether the answer may take as long as `Prefer: wait` says.
        holds_thread: whether its stream of events would hold a thread of the web server.
        csrf_token: returns what the page's script sends as `X-CSRFToken`; empty where the web app asks for none.
    """

    base: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    find_caller: Callable[[], Caller]
    read_body: Callable[[int], Awaitable[bytes]]
    unless_left: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]] = _just_wait
    may_wait: bool = True
    holds_thread: bool = False
    csrf_token: Callable[[], str] = str


@dataclass(frozen=True)
class Answer:
    """An answer with all of its body.

    Attributes:
        status: of HTTP.
        headers: without the type and the length.
        body: the bytes.
        media_type: of the body; empty for no body.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    media_type: str = ""


@dataclass(frozen=True)
class EventAnswer:
    """An answer that is a stream of server-sent events.

    Attributes:
        events: whole events and comments.
        on_end: to be called once, when the stream has ended.
    """

    events: AsyncGenerator[bytes, None]
    on_end: Callable[[], None]
    headers: Mapping[str, str] = field(
        default_factory=lambda: {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # of nginx
    )
    media_type: str = "text/event-stream"


def json_answer(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, media_type: str = "application/json"
) -> Answer:
    """Return a JSON-compatible value as an answer."""
    body = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")
    return Answer(status, dict(headers or {}), body, media_type)
