"""`create_app`: the ASGI app with its routes. It wires; each API has a module of its own."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from sdtpu_worker.config import read_setting
from sdtpu_worker.http import openai_edits, openai_images, web_ui
from sdtpu_worker.http.departures import CallerLeft
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.exchange import serve_endpoint
from sdtpu_worker.http.openapi import describe
from sdtpu_worker.http.problems import as_openai_error, as_problem
from sdtpu_worker.web.jobs_api import ROUTES, log_refusal
from sdtpu_worker.web.problems import Refusal, method_refusal, refusal_for

if TYPE_CHECKING:
    from celery import Celery

Endpoint = Callable[[Request], Awaitable[Response]]
_CLIENT_CLOSED = 499
PAGE = "v1/jobs/page/"
"""The page's address, relative to the door's: it holds wherever the door is mounted."""
_OPENAI_PATH = re.compile(r"/v1/(?!jobs(/|$))")
"""What clients of OpenAI's API ask for; they read errors in its form alone."""


def create_app(app: Celery) -> Starlette:
    """Return the door of a Celery app: an ASGI app, to be served alone or mounted in another one.

    Its connections open with the first request, in the event loop of that. They close with the lifespan of the ASGI
    app; where it is mounted in an app that gives it none, `await door.state.door.close()` does that.

    Args:
        app: the client's app, with `install(app)`; its configuration and the environment have the settings.

    Raises:
        ConfigurationError: a setting is not allowed, or results or records have no place (`make_client`).
    """
    door = Door(app)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        door.webhooks.start()
        try:
            yield
        finally:
            await door.close()

    origins = read_setting("sdtpu_http_cors_origins", app.conf)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],  # clients in browsers send headers of their own
        expose_headers=["Location", "Retry-After", "ETag", "Preference-Applied"],
    )
    asgi = Starlette(
        routes=make_routes(),
        middleware=[cors] if origins else [],
        exception_handlers={HTTPException: _answer_http_exception},
        lifespan=lifespan,
    )
    asgi.state.door = door
    return asgi


def make_routes() -> list[Route]:
    """Return every route of the door."""
    openai = functools.partial(_route, form=as_openai_error)
    problem = functools.partial(_route, form=as_problem)
    return [
        openai("/v1/images/generations", openai_images.generate_images, "POST"),
        openai("/v1/images/edits", openai_edits.edit_images, "POST"),
        openai("/v1/images/variations", openai_images.refuse_variations, "POST"),
        openai("/v1/models", openai_images.list_models, "GET"),
        openai("/v1/models/{model:path}", openai_images.show_model, "GET"),
        *(
            problem(f"/v1/jobs{each.path}", serve_endpoint(each.endpoint), each.method, name=each.name)
            for each in ROUTES
        ),
        problem("/sdapi/v1/txt2img", web_ui.txt2img, "POST"),
        problem("/sdapi/v1/img2img", web_ui.img2img, "POST"),
        problem("/sdapi/v1/options", web_ui.show_options, "GET"),
        problem("/sdapi/v1/options", web_ui.set_options, "POST"),
        problem("/sdapi/v1/sd-models", web_ui.list_models, "GET"),
        problem("/sdapi/v1/samplers", web_ui.list_samplers, "GET"),
        problem("/sdapi/v1/schedulers", web_ui.list_schedulers, "GET"),
        problem("/sdapi/v1/progress", web_ui.show_progress, "GET"),
        problem("/sdapi/v1/interrupt", web_ui.interrupt, "POST"),
        problem("/", _to_page, "GET"),
        problem("/openapi.json", _describe, "GET"),
        problem("/metrics", _metrics, "GET"),
        problem("/livez", _live, "GET"),
        problem("/readyz", _ready, "GET"),
    ]


def _route(
    path: str, endpoint: Endpoint, method: str, form: Callable[[Refusal], Response], name: str | None = None
) -> Route:
    """Return a route whose endpoint's errors are answered in a form."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CallerLeft:
            return Response(status_code=_CLIENT_CLOSED)
        except Exception as exc:
            refusal = refusal_for(exc)
            log_refusal(refusal, f"{request.method} {path}")
            return form(refusal)

    return Route(path, answer, methods=[method], name=name or endpoint.__name__)


async def _answer_http_exception(request: Request, exc: Exception) -> Response:
    """Answer what the router refuses: an unknown path, a method that a path has not."""
    assert isinstance(exc, HTTPException)
    form = as_openai_error if _OPENAI_PATH.match(get_path(request)) else as_problem
    if exc.status_code == 405:  # a route has one method; the router names that of the first route alone
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = list(dict.fromkeys(method for route in routes for method in route.methods if method != "HEAD"))
        return form(method_refusal(request.method, methods))
    if exc.status_code == 404:
        return form(Refusal(404, "NotFound", f"there is nothing at {get_path(request)!r:.200}; see /openapi.json"))
    return form(Refusal(exc.status_code, exc.detail.replace(" ", ""), exc.detail, headers=exc.headers))


def get_path(request: Request) -> str:
    """Return a request's path below the address at which the door is mounted."""
    return request.url.path.removeprefix(str(request.scope.get("root_path", "")))


async def _to_page(request: Request) -> Response:
    """Answer `GET /`: the page, where the door has it."""
    if not door_of(request).has_page:
        raise Refusal(404, "NotFound", "this door has no page (sdtpu_http_page); see /openapi.json")
    return Response(status_code=307, headers={"Location": PAGE})


async def _describe(request: Request) -> Response:
    """Answer `GET /openapi.json`."""
    return JSONResponse(describe(str(request.base_url).rstrip("/")))


async def _metrics(request: Request) -> Response:
    """Answer `GET /metrics`: what Redis has of the queues and of all workers."""
    door = door_of(request)
    door.callers.check_scraper(request)
    content_type, text = await door.queue_page.read(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": content_type})


async def _live(_: Request) -> Response:
    """Answer `GET /livez`: the event loop turns."""
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Answer `GET /readyz`: Redis answers."""
    await door_of(request).jobs.ping()
    return JSONResponse({"status": "ok"})
