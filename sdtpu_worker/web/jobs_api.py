"""The jobs API: enqueue, look, watch, fetch the picture, cancel, list. Every front serves `ROUTES`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.images.decode import image_content_type
from sdtpu_worker.web.bodies import check_fields, check_is_json, parse_json
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.events import job_events
from sdtpu_worker.web.exchange import Answer, EventAnswer, WebRequest, json_answer
from sdtpu_worker.web.image_answer import answer_with_image, names_tag
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_state import QUEUED, JobState
from sdtpu_worker.web.job_view import job_json
from sdtpu_worker.web.live_api import show_batch, show_capabilities, stream_all
from sdtpu_worker.web.live_feed import wait_of
from sdtpu_worker.web.page.endpoints import send_file, show_page, to_page
from sdtpu_worker.web.parameters import JOB_FIELDS, digest_of
from sdtpu_worker.web.problems import Refusal, problem_answer, refusal_for
from sdtpu_worker.web.service import JobsService

logger = logging.getLogger(__name__)

Endpoint = Callable[..., Awaitable[Answer | EventAnswer]]
"""Called with the service, the request, and `job_id` where the path has one."""
MOST_WAIT_S = 60
"""The longest `Prefer: wait`; proxies cut requests not much later."""
MOST_ON_A_PAGE, DEFAULT_ON_A_PAGE = 200, 50
MOST_KEY_CHARACTERS = 255
_TRIES, _PAUSE_S = 10, 0.1
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})")


async def create_job(service: JobsService, request: WebRequest) -> Answer:
    """Answer `POST /v1/jobs`."""
    caller = request.find_caller()
    check_is_json(request.headers.get("content-type", ""))
    given = parse_json(await request.read_body(service.max_body_bytes))
    check_fields(given, (*(name for name in JOB_FIELDS if name != "tenant" or not caller.name), "webhook"))
    wait_s, key, digest = _read_wait(request), _read_key(request), digest_of(given)
    webhook = given.pop("webhook", None)
    hook = "" if webhook is None else service.webhooks.check(webhook)
    (record,) = await service.jobs.make_records(caller, [given], "jobs")
    record, is_new = replace(record, webhook=hook), True
    if key is None:
        await _submit(service, caller, record)
    else:
        record, is_new = await _submit_once(service, caller, record, key, digest)
    headers = {"Location": f"{request.base}/{record.id}", "Cache-Control": "no-store"}
    state = QUEUED
    if wait_s and request.may_wait:
        headers["Preference-Applied"] = f"wait={wait_s}"
        ended = await request.unless_left(service.jobs.wait([record], wait_s))
        state = ended[0] if ended else await service.jobs.read_state(record.id)
    elif not is_new:
        state = await service.jobs.read_state(record.id)
    return json_answer(_show(request, record, state), 200 if state.has_ended else 202, headers)


async def _submit(service: JobsService, caller: Caller, record: JobRecord) -> None:
    if not record.webhook:
        await service.jobs.submit(caller, [record])
        return
    await service.webhooks.promise(record)
    await service.jobs.submit(caller, [record])
    service.webhooks.begin(record)


async def _submit_once(
    service: JobsService, caller: Caller, record: JobRecord, key: str, digest: str
) -> tuple[JobRecord, bool]:
    """Enqueue a job, unless a request with this key came before; return the job's record, and whether it is new.

    Raises:
        Refusal: 422, the earlier request had another content; 409, its job is not enqueued yet.
    """
    records = service.jobs.records
    earlier = await records.claim_key(caller.name, key, digest, record.id)
    if earlier is None:
        try:
            await _submit(service, caller, record)
        except BaseException:
            await records.release_key(caller.name, key)
            raise
        await records.keep_key(caller.name, key)
        return record, True
    job_id, its_digest = earlier
    if its_digest != digest:
        text = f"the Idempotency-Key {key[:60]!r} was sent with another body before; send a new key with a new request"
        raise Refusal(422, "KeyReused", text)
    for _ in range(_TRIES):
        if (found := await records.find(job_id)) is not None:
            return found, False
        await asyncio.sleep(_PAUSE_S)
    text = "the first request with this Idempotency-Key is not done yet, or its door has died; try again later"
    raise Refusal(409, "InProgress", text, headers={"Retry-After": "1"})


async def list_jobs(service: JobsService, request: WebRequest) -> Answer:
    """Answer `GET /v1/jobs`."""
    caller = request.find_caller()
    limit, before, previews = _read_page(request)
    records = await service.jobs.records.list_jobs(caller.name, limit, before)
    states = await service.jobs.read_states([record.id for record in records])
    found = zip(records, states, strict=True)
    jobs = [job_json(record, state, request.base, with_preview=previews) for record, state in found]
    following = repr(records[-1].created_at) if len(records) == limit else None
    return json_answer({"jobs": jobs, "next": following}, headers={"Cache-Control": "no-store"})


async def show_job(service: JobsService, request: WebRequest, job_id: str) -> Answer:
    """Answer `GET /v1/jobs/{id}`; a client that names the `ETag` of what it has seen is told if nothing has changed."""
    caller = request.find_caller()
    record = await service.jobs.find(caller, job_id)
    state = await service.jobs.read_state(record.id)
    is_in_queue = state.status == "queued" and state.progress is None
    wait = wait_of(await service.live.read(), caller, record) if is_in_queue else None
    answer = json_answer(job_json(record, state, request.base, wait, with_preview=True))
    etag = f'"{hashlib.sha256(answer.body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if names_tag(request.headers.get("if-none-match", ""), etag):
        return Answer(304, headers)
    return replace(answer, headers=headers)


async def cancel_job(service: JobsService, request: WebRequest, job_id: str) -> Answer:
    """Answer `DELETE /v1/jobs/{id}`; a job that has ended stays as it is."""
    record = await service.jobs.find(request.find_caller(), job_id)
    state = await service.jobs.cancel(record)
    return json_answer(_show(request, record, state), headers={"Cache-Control": "no-store"})


async def send_image(service: JobsService, request: WebRequest, job_id: str) -> Answer:
    """Answer `GET /v1/jobs/{id}/image`, to the job's caller or to whoever has the token of its address."""
    if (token := request.query.get("token")) is not None:
        record = await service.jobs.find_by_token(job_id, token)
    else:
        record = await service.jobs.find(request.find_caller(), job_id)
    state = await service.jobs.read_state(record.id)
    if state.error is not None:
        raise Refusal(410, state.error.type, f"the job has {state.status} and has no picture: {state.error.detail}")
    if state.result is None:
        raise Refusal(409, "NotReady", f"the job is {state.status}; its picture is there when it has succeeded",
                      headers={"Retry-After": "1"})  # fmt: skip
    data = await service.jobs.read_image(state)
    return answer_with_image(request.headers, data, image_content_type(state.result), service.jobs.expires_s)


async def stream_events(service: JobsService, request: WebRequest, job_id: str) -> Answer | EventAnswer:
    """Answer `GET /v1/jobs/{id}/events`."""
    record = await service.jobs.find(request.find_caller(), job_id)
    last = request.headers.get("last-event-id")
    if last:
        state = await service.jobs.read_state(record.id)
        if state.has_ended and state.token == last:
            return Answer(204)  # which tells an EventSource not to come back
    return EventAnswer(_events(service, request, record, last), service.take_stream_place(request.holds_thread))


async def _events(
    service: JobsService, request: WebRequest, record: JobRecord, last: str | None
) -> AsyncGenerator[bytes, None]:
    async with service.jobs.watch(record.id) as watch:
        async for event in job_events(watch, lambda state: _show(request, record, state), last):
            yield event
    await service.jobs.records.close(record.caller, [record.id])


@dataclass(frozen=True)
class ApiRoute:
    """A method of a path of the jobs API.

    Attributes:
        method: of HTTP.
        path: after the address of the jobs API, with `{job_id}` or `{name}`.
        endpoint: answers it.
    """

    method: str
    path: str
    endpoint: Endpoint

    @property
    def name(self) -> str:
        """Of the endpoint, for links; the picture's says what it is."""
        return "job_image" if self.endpoint is send_image else self.endpoint.__name__


ROUTES = (
    ApiRoute("POST", "", create_job),
    ApiRoute("GET", "", list_jobs),
    ApiRoute("GET", "/capabilities", show_capabilities),
    ApiRoute("GET", "/batch", show_batch),
    ApiRoute("GET", "/events", stream_all),
    ApiRoute("GET", "/page", to_page),
    ApiRoute("GET", "/page/", show_page),
    ApiRoute("GET", "/page/{name}", send_file),
    ApiRoute("GET", "/{job_id}", show_job),
    ApiRoute("DELETE", "/{job_id}", cancel_job),
    ApiRoute("GET", "/{job_id}/image", send_image),
    ApiRoute("GET", "/{job_id}/events", stream_events),
)


async def answer_or_refuse(work: Awaitable[Answer | EventAnswer], what: str) -> Answer | EventAnswer:
    """Return an endpoint's answer, or its error as `application/problem+json`.

    Args:
        work: the call of the endpoint.
        what: the request, for the log.
    """
    try:
        return await work
    except Exception as exc:
        refusal = refusal_for(exc)
        log_refusal(refusal, what)
        return problem_answer(refusal)


def log_refusal(refusal: Refusal, what: str) -> None:
    """Log what the operator should know of a refusal; called where its error is handled."""
    if refusal.code == "InternalError":
        logger.exception("%s failed", what)
    elif refusal.hidden:
        logger.warning("%s was refused: %s", what, refusal.hidden)


def _show(request: WebRequest, record: JobRecord, state: JobState) -> dict[str, Any]:
    return job_json(record, state, request.base)


def _read_wait(request: WebRequest) -> int:
    """Return the seconds of `Prefer: wait=…`, at most `MOST_WAIT_S`; 0 without one."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return min(int(match[1]), MOST_WAIT_S) if match else 0


def _read_key(request: WebRequest) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MOST_KEY_CHARACTERS:
        raise InvalidRequest(f"Idempotency-Key must have 1 to {MOST_KEY_CHARACTERS} characters, got {len(key):,}")
    return key


def _read_page(request: WebRequest) -> tuple[int, float | None, bool]:
    """Return the number of jobs on a page, the time before which they were created, and whether they have previews.

    Raises:
        InvalidRequest: the query says something else.
    """
    query = dict(request.query)
    check_fields(query, ("limit", "before", "previews"))
    if (previews := query.get("previews", "false")) not in ("true", "false"):
        raise InvalidRequest(f"previews must be true or false, got {previews!r:.40}")
    text = query.get("limit", str(DEFAULT_ON_A_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MOST_ON_A_PAGE):
        raise InvalidRequest(f"limit must be an integer from 1 to {MOST_ON_A_PAGE}, got {text!r:.40}")
    if (before := query.get("before")) is None:
        return int(text), None, previews == "true"
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", before):
        raise InvalidRequest(f"before must be the `next` of another page, got {before!r:.40}")
    return int(text), float(before), previews == "true"
