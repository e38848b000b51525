"""The jobs API, `/v1/jobs`: enqueue, look, watch, fetch the picture, cancel, list."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.bodies import check_fields, read_json
from sdtpu_worker.http.callers import Caller
from sdtpu_worker.http.departures import unless_left
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.event_stream import HEARTBEAT, HEARTBEAT_S, EventStream, write_event
from sdtpu_worker.http.image_answer import answer_with_image
from sdtpu_worker.http.job_records import JobRecord
from sdtpu_worker.http.job_state import QUEUED, JobState
from sdtpu_worker.http.job_view import job_json
from sdtpu_worker.http.parameters import JOB_FIELDS, digest_of
from sdtpu_worker.http.problems import Refusal
from sdtpu_worker.images.decode import image_content_type

MOST_WAIT_S = 60
"""The longest `Prefer: wait`; proxies cut requests not much later."""
MOST_ON_A_PAGE, DEFAULT_ON_A_PAGE = 200, 50
MOST_KEY_CHARACTERS = 255
_TRIES, _PAUSE_S = 10, 0.1
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})")


async def create_job(request: Request) -> Response:
    """Answer `POST /v1/jobs`."""
    door = door_of(request)
    caller = door.callers.find(request)
    given = await read_json(request, door.max_body_bytes)
    check_fields(given, (*(name for name in JOB_FIELDS if name != "tenant" or not caller.name), "webhook"))
    wait_s, key, digest = _read_wait(request), _read_key(request), digest_of(given)
    webhook = given.pop("webhook", None)
    hook = "" if webhook is None else door.webhooks.check(webhook)
    (record,) = await door.jobs.make_records(caller, [given], "jobs")
    record, is_new = replace(record, webhook=hook), True
    if key is None:
        await _submit(door, caller, record)
    else:
        record, is_new = await _submit_once(door, caller, record, key, digest)
    headers = {"Location": str(request.url_for("show_job", job_id=record.id)), "Cache-Control": "no-store"}
    state = QUEUED
    if wait_s:
        headers["Preference-Applied"] = f"wait={wait_s}"
        ended = await unless_left(request, door.jobs.wait([record], wait_s))
        state = ended[0] if ended else await door.jobs.read_state(record.id)
    elif not is_new:
        state = await door.jobs.read_state(record.id)
    return JSONResponse(_show(request, record, state), 200 if state.has_ended else 202, headers)


async def _submit(door: Door, caller: Caller, record: JobRecord) -> None:
    if not record.webhook:
        await door.jobs.submit(caller, [record])
        return
    await door.webhooks.promise(record)
    await door.jobs.submit(caller, [record])
    door.webhooks.begin(record)


async def _submit_once(door: Door, caller: Caller, record: JobRecord, key: str, digest: str) -> tuple[JobRecord, bool]:
    """Enqueue a job, unless a request with this key came before; return the job's record, and whether it is new.

    Raises:
        Refusal: 422, the earlier request had another content; 409, its job is not enqueued yet.
    """
    records = door.jobs.records
    earlier = await records.claim_key(caller.name, key, digest, record.id)
    if earlier is None:
        try:
            await _submit(door, caller, record)
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


async def list_jobs(request: Request) -> Response:
    """Answer `GET /v1/jobs`."""
    door = door_of(request)
    caller = door.callers.find(request)
    limit, before = _read_page(request)
    records = await door.jobs.records.list_jobs(caller.name, limit, before)
    states = await door.jobs.read_states([record.id for record in records])
    jobs = [_show(request, record, state) for record, state in zip(records, states, strict=True)]
    following = repr(records[-1].created_at) if len(records) == limit else None
    return JSONResponse({"jobs": jobs, "next": following}, headers={"Cache-Control": "no-store"})


async def show_job(request: Request) -> Response:
    """Answer `GET /v1/jobs/{id}`."""
    record, state = await _find(request)
    return JSONResponse(_show(request, record, state), headers={"Cache-Control": "no-store"})


async def cancel_job(request: Request) -> Response:
    """Answer `DELETE /v1/jobs/{id}`; a job that has ended stays as it is."""
    door = door_of(request)
    record = await door.jobs.find(door.callers.find(request), request.path_params["job_id"])
    state = await door.jobs.cancel(record)
    return JSONResponse(_show(request, record, state), headers={"Cache-Control": "no-store"})


async def send_image(request: Request) -> Response:
    """Answer `GET /v1/jobs/{id}/image`, to the job's caller or to whoever has the token of its address."""
    door = door_of(request)
    job_id = request.path_params["job_id"]
    if (token := request.query_params.get("token")) is not None:
        record = await door.jobs.find_by_token(job_id, token)
    else:
        record = await door.jobs.find(door.callers.find(request), job_id)
    state = await door.jobs.read_state(record.id)
    if state.error is not None:
        raise Refusal(410, state.error.type, f"the job has {state.status} and has no picture: {state.error.detail}")
    if state.result is None:
        raise Refusal(409, "NotReady", f"the job is {state.status}; its picture is there when it has succeeded",
                      headers={"Retry-After": "1"})  # fmt: skip
    return answer_with_image(
        request, await door.jobs.read_image(state), image_content_type(state.result), door.jobs.expires_s
    )


async def stream_events(request: Request) -> Response:
    """Answer `GET /v1/jobs/{id}/events`."""
    door = door_of(request)
    record = await door.jobs.find(door.callers.find(request), request.path_params["job_id"])
    last = request.headers.get("last-event-id")
    if last:
        state = await door.jobs.read_state(record.id)
        if state.has_ended and state.token == last:
            return Response(status_code=204)  # which tells an EventSource not to come back
    return EventStream(_events(door, request, record, last), door.stopping, door.take_stream_place())


async def _events(door: Door, request: Request, record: JobRecord, last: str | None) -> AsyncGenerator[bytes, None]:
    """Yield a job's states as events; the first one only if the client has not seen it."""
    state: JobState | None = None
    preview = None
    async with door.jobs.watch(record.id) as watch:
        while not (state and state.has_ended):
            state = await watch.next_state(HEARTBEAT_S)
            if state is None:
                yield HEARTBEAT
                continue
            if state.has_ended:
                yield write_event("done", _show(request, record, state), state.token)
            elif state.token != last:
                has_preview = state.preview is not None and state.preview != preview
                progress = {"status": state.status, **(state.progress or {})}
                yield write_event("progress", progress, None if has_preview else state.token)
                if has_preview:
                    preview = state.preview
                    yield write_event("preview", {"format": "png", "b64_json": preview}, state.token)
            last = None
    await door.jobs.records.close(record.caller, [record.id])


async def _find(request: Request) -> tuple[JobRecord, JobState]:
    door = door_of(request)
    record = await door.jobs.find(door.callers.find(request), request.path_params["job_id"])
    return record, await door.jobs.read_state(record.id)


def _show(request: Request, record: JobRecord, state: JobState) -> dict[str, object]:
    return job_json(record, state, str(request.url_for("create_job")))


def _read_wait(request: Request) -> int:
    """Return the seconds of `Prefer: wait=…`, at most `MOST_WAIT_S`; 0 without one."""
    match = _WAIT.search(request.headers.get("prefer", ""))
    return min(int(match[1]), MOST_WAIT_S) if match else 0


def _read_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MOST_KEY_CHARACTERS:
        raise InvalidRequest(f"Idempotency-Key must have 1 to {MOST_KEY_CHARACTERS} characters, got {len(key):,}")
    return key


def _read_page(request: Request) -> tuple[int, float | None]:
    """Return the number of jobs on a page, and the time before which they were created.

    Raises:
        InvalidRequest: the query says something else.
    """
    query = dict(request.query_params)
    check_fields(query, ("limit", "before"))
    text = query.get("limit", str(DEFAULT_ON_A_PAGE))
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MOST_ON_A_PAGE):
        raise InvalidRequest(f"limit must be an integer from 1 to {MOST_ON_A_PAGE}, got {text!r:.40}")
    if (before := query.get("before")) is None:
        return int(text), None
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", before):
        raise InvalidRequest(f"before must be the `next` of another page, got {before!r:.40}")
    return int(text), float(before)
