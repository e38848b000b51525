"""The jobs API for web apps whose server answers each request in a thread: Flask, and Django's views.

The API itself runs in one event loop, in a thread beside those of the server. A process that the server forks gets its
own with its first request.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdtpu_worker.config import read_setting
from sdtpu_worker.web.bodies import too_large
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.event_iterators import AsyncEventIterator, EventIterator
from sdtpu_worker.web.exchange import Answer, EventAnswer, WebRequest
from sdtpu_worker.web.jobs import Jobs
from sdtpu_worker.web.jobs_api import ROUTES, answer_or_refuse, log_refusal
from sdtpu_worker.web.keeper import Keeper
from sdtpu_worker.web.loop_thread import LoopThread
from sdtpu_worker.web.owners import make_caller
from sdtpu_worker.web.problems import Refusal, method_refusal, problem_answer, refusal_for
from sdtpu_worker.web.request_threads import RequestThreads, run_with_request_thread
from sdtpu_worker.web.service import JobsService

if TYPE_CHECKING:
    from celery import Celery

PATHS = tuple(dict.fromkeys(route.path for route in ROUTES))
"""The paths of the jobs API, after its address."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""The methods that a front takes at each of them; those that a path has not are refused in the form of the API."""


@dataclass(frozen=True)
class SyncRequest:
    """A request as a threaded web framework has it.

    Attributes:
        method: of HTTP.
        base: the address of the jobs API, before a job's id.
        headers: by their lower-case names.
        query: what follows the question mark.
        owner: returns whose request it is: a text, None for nobody, or a `Caller`.
        read: returns at most so many bytes of the body.
        holds_thread: whether a stream of events would hold a thread.
        csrf_token: returns what the page's script sends as `X-CSRFToken`; empty where the web app asks for none.
    """

    method: str
    base: str
    headers: Mapping[str, str]
    query: Mapping[str, str]
    owner: Callable[[], str | Caller | None]
    read: Callable[[int], bytes]
    holds_thread: bool = True
    csrf_token: Callable[[], str] = str


@dataclass(frozen=True)
class _Running:
    """The event loop of this process and the service in it.

    Attributes:
        pid: of the process.
        backend: the result backend if it lives in this process, as in tests; else None.
    """

    pid: int
    backend: Any
    loop: LoopThread
    service: JobsService


class SyncFront:
    """Answers requests of the jobs API. Any thread may use it.

    Args:
        app: the client's Celery app, whose configuration has the settings.
        keeper: keeps jobs, too; None where nothing does.
    """

    def __init__(self, app: Celery, keeper: Keeper | None = None) -> None:
        self._app, self._keeper = app, keeper
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._waiting = 0

    def answer(self, path: str, request: SyncRequest, **names: str) -> Answer | EventAnswer:
        """Return the answer to a request; errors are answers too.

        Args:
            path: one of `PATHS`.
            request: the request.
            names: what the path's names stand for.
        """
        may_wait = self._take_waiting_place() if "prefer" in request.headers else False
        try:
            running = self._start()
            what = f"{request.method} {request.base}{path}"
            work = answer_or_refuse(self._answer(running.service, path, request, may_wait, names), what)
            answer = _without_hop_headers(run_with_request_thread(running.loop, work))
            if isinstance(answer, EventAnswer) and request.method == "HEAD":
                self.iterate(answer).close()  # nobody will ever read it
                return Answer(200, answer.headers, media_type=answer.media_type)
            return answer
        except Exception as exc:  # of the start, such as a setting that is not allowed
            return _refuse(exc, f"{request.method} {request.base}{path}")
        finally:
            if may_wait:
                self._give_waiting_place_back()

    def iterate(self, answer: EventAnswer) -> EventIterator:
        """Return the events of an answer, for the thread of its request."""
        return EventIterator(self._start().loop, answer, read_setting("sdtpu_web_stream_s", self._app.conf))

    def iterate_async(self, answer: EventAnswer) -> AsyncEventIterator:
        """Return the events of an answer, for the event loop of an ASGI server."""
        return AsyncEventIterator(self._start().loop, answer)

    def close(self) -> None:
        """End the event loop and its connections; another request opens new ones."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None and running.pid == os.getpid():
            running.loop.begin(running.service.close()).result()
            running.loop.close()

    async def _answer(
        self, service: JobsService, path: str, request: SyncRequest, may_wait: bool, names: Mapping[str, str]
    ) -> Answer | EventAnswer:
        methods = {route.method: route.endpoint for route in ROUTES if route.path == path}
        endpoint = methods.get("GET" if request.method == "HEAD" else request.method)
        if endpoint is None:
            raise method_refusal(request.method, methods)
        caller = await service.jobs.threads.call(self._find_caller, request)
        return await endpoint(service, self._web_request(service, request, caller, may_wait), **names)

    def _web_request(
        self, service: JobsService, request: SyncRequest, caller: Caller | Refusal, may_wait: bool
    ) -> WebRequest:
        def find_caller() -> Caller:
            if isinstance(caller, Refusal):
                raise caller
            return caller

        async def read_body(most_bytes: int) -> bytes:
            length = request.headers.get("content-length") or ""
            if length.isdigit() and int(length) > most_bytes:
                raise too_large(most_bytes)
            body = await service.jobs.threads.call(request.read, most_bytes + 1)
            if len(body) > most_bytes:
                raise too_large(most_bytes)
            return body

        return WebRequest(request.base, request.headers, request.query, find_caller, read_body, may_wait=may_wait,
                          holds_thread=request.holds_thread, csrf_token=request.csrf_token)  # fmt: skip

    def _find_caller(self, request: SyncRequest) -> Caller | Refusal:
        """Return whose request it is, or the refusal; a picture's address with a token needs nobody."""
        try:
            return make_caller(request.owner(), self._app.conf)
        except Refusal as refusal:
            return refusal

    def _start(self) -> _Running:
        """Return this process' event loop and service, started if need be.

        Raises:
            ConfigurationError: a setting is not allowed, or results or records have no place (`make_client`).
        """
        backend = self._app.backend
        backend = backend if getattr(backend, "is_in_this_process", False) else None
        running = self._running
        if running is not None and running.pid == os.getpid() and running.backend is backend:
            return running
        with self._lock:
            running = self._running
            if running is None or running.pid != os.getpid() or running.backend is not backend:
                loop = LoopThread()
                try:
                    service = loop.begin(self._make_service()).result()
                except BaseException:
                    loop.close()
                    raise
                running = self._running = _Running(os.getpid(), backend, loop, service)
            return running

    async def _make_service(self) -> JobsService:
        service = JobsService(self._app, Jobs(self._app, RequestThreads(self._app), self._keeper))
        service.webhooks.start()
        return service

    def _take_waiting_place(self) -> bool:
        most = read_setting("sdtpu_web_max_streams", self._app.conf)
        with self._lock:
            if self._waiting >= most:
                return False
            self._waiting += 1
            return True

    def _give_waiting_place_back(self) -> None:
        with self._lock:
            self._waiting -= 1


def _without_hop_headers(answer: Answer | EventAnswer) -> Answer | EventAnswer:
    """Return an answer without the headers that only a server may send (PEP 3333)."""
    if "Connection" not in answer.headers:
        return answer
    return replace(answer, headers={name: value for name, value in answer.headers.items() if name != "Connection"})


def _refuse(exc: Exception, what: str) -> Answer:
    refusal = refusal_for(exc)
    log_refusal(refusal, what)
    return problem_answer(refusal)
