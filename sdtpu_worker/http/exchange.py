"""The door's requests and answers: Starlette's, made those of the jobs API and back."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from sdtpu_worker.http.bodies import read_body
from sdtpu_worker.http.departures import unless_left
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.event_stream import EventStream
from sdtpu_worker.web.exchange import Answer, EventAnswer, WebRequest
from sdtpu_worker.web.jobs_api import Endpoint


def serve_endpoint(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint of the jobs API as one of Starlette's."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        door = door_of(request)
        found = await endpoint(door, _web_request(door, request), **request.path_params)
        if isinstance(found, EventAnswer):
            return EventStream(found.events, door.stopping, found.on_end)
        return send(found)

    return answer


def send(answer: Answer) -> Response:
    """Return an answer as one of Starlette's."""
    return Response(answer.body, answer.status, dict(answer.headers), answer.media_type or None)


def _web_request(door: Door, request: Request) -> WebRequest:
    return WebRequest(
        base=str(request.url_for("create_job")),
        headers=request.headers,
        query=dict(request.query_params),
        find_caller=functools.partial(door.callers.find, request),
        read_body=functools.partial(read_body, request),
        unless_left=functools.partial(unless_left, request),
    )
