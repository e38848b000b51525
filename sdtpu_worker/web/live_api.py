"""What a page shows beside single jobs: what is served, the device batch, and the events of many jobs at once.

A browser keeps six connections to one server, for all of its tabs together. So a page has one stream for all of its
jobs and the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from sdtpu_worker.contract.parameter_checks import MAX_GUIDANCE_SCALE, MAX_LORA_WEIGHT, MAX_LORAS, MAX_PROMPT_CHARACTERS
from sdtpu_worker.contract.request import IMAGE_FORMATS, MAX_STEPS
from sdtpu_worker.contract.served import Served
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.web.bodies import check_fields
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.events import HEARTBEAT, HEARTBEAT_S, job_events, write_event
from sdtpu_worker.web.exchange import Answer, EventAnswer, WebRequest, json_answer
from sdtpu_worker.web.job_records import JobRecord, is_job_id
from sdtpu_worker.web.job_view import job_json
from sdtpu_worker.web.live_feed import of_batch, wait_of
from sdtpu_worker.web.service import JobsService

MOST_JOBS = 50
"""How many jobs one request may name."""
_NO_STORE = {"Cache-Control": "no-store"}


async def show_capabilities(service: JobsService, request: WebRequest) -> Answer:
    """Answer `GET /v1/jobs/capabilities`: what every worker that is alive serves, and what the caller may ask for."""
    caller = request.find_caller()
    check_fields(dict(request.query), ())
    state = await service.live.read()
    workers = [] if state is None else state.workers
    served = [worker.serves for worker in workers if worker.serves is not None]
    sizes = _common([tuple(worker.step_s) for worker in workers])
    first: Any = served[0] if served else None
    shown = {
        "workers": None if state is None else len(workers),
        "model": first.model if first else None,
        "sizes": [dict(zip(("height", "width"), map(int, size.split("x")), strict=True)) for size in sizes],
        "samplers": list(_common([each.samplers for each in served])),
        "default_sampler": first.default_sampler if first else None,
        "steps": {"minimum": 1, "maximum": MAX_STEPS, "default": workers[0].default_steps if workers else None},
        "guidance": _guidance(served),
        "negative_prompt": bool(served) and all(each.takes_negative_prompt for each in served),
        "loras": {
            "names": list(_common([each.loras for each in served])), "most": MAX_LORAS, "most_weight": MAX_LORA_WEIGHT,
        },
        "controlnets": list(_common([each.controlnets for each in served])),
        "pictures": first.pictures if first and len({each.pictures for each in served}) == 1 else "none",
        "previews": bool(served) and all(each.has_previews for each in served),
        "image_formats": list(IMAGE_FORMATS),
        "prompt": {"most_characters": MAX_PROMPT_CHARACTERS},
        "priorities": dict(zip(("most_urgent", "least_urgent"), caller.priorities, strict=True)),
        "most_jobs": caller.max_jobs or None,
    }  # fmt: skip
    return json_answer(shown, headers=_NO_STORE)


def _guidance(served: Sequence[Served]) -> dict[str, Any]:
    follows = bool(served) and all(each.follows_guidance_scale for each in served)
    most = MAX_GUIDANCE_SCALE if follows else 1
    return {"minimum": 0, "maximum": most, "default": served[0].default_guidance_scale if served else None}


def _common(lists: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the names that all lists have, in the order of the first one."""
    return [name for name in lists[0] if all(name in each for each in lists)] if lists else []


async def show_batch(service: JobsService, request: WebRequest) -> Answer:
    """Answer `GET /v1/jobs/batch`: the slots of all devices, and where the jobs that are named wait."""
    caller = request.find_caller()
    records = await _find_named(service, caller, request)
    return json_answer(await _batch_of(service, caller, records), headers=_NO_STORE)


async def stream_all(service: JobsService, request: WebRequest) -> EventAnswer:
    """Answer `GET /v1/jobs/events`: what becomes of the jobs that are named, and of the device batch."""
    caller = request.find_caller()
    records = await _find_named(service, caller, request)
    give_back = service.take_stream_place(request.holds_thread)
    last = request.headers.get("last-event-id")
    return EventAnswer(merge([
        _batch_events(service, caller, records),
        *(_events_of(service, request, record, last) for record in records),
    ]), give_back)  # fmt: skip


async def _find_named(service: JobsService, caller: Caller, request: WebRequest) -> list[JobRecord]:
    """Return those of the jobs in `ids` that are the caller's; all other ids mean nothing here."""
    query = dict(request.query)
    check_fields(query, ("ids",))
    ids = list(dict.fromkeys(query.get("ids", "").split(","))) if query.get("ids") else []
    if len(ids) > MOST_JOBS or not all(map(is_job_id, ids)):
        raise InvalidRequest(
            f"ids must be at most {MOST_JOBS} ids of jobs with commas between, got {query['ids']!r:.80}"
        )
    records = await service.jobs.records.find_many(ids)
    return [record for record in records if record.caller == caller.name]


async def _batch_of(service: JobsService, caller: Caller, records: Sequence[JobRecord]) -> dict[str, Any]:
    state = await service.live.read()
    own = {record.id for record in records}
    own.update(await service.jobs.records.open_ids(caller.name))
    return {**of_batch(state, own), "waits": _waits(state, caller, records)}


def _waits(state: Any, caller: Caller, records: Sequence[JobRecord]) -> dict[str, Any]:
    """Return by id where those of some jobs are that wait in Redis."""
    waits = {record.id: wait_of(state, caller, record) for record in records}
    return {job_id: wait for job_id, wait in waits.items() if wait is not None}


async def _batch_events(
    service: JobsService, caller: Caller, records: Sequence[JobRecord]
) -> AsyncGenerator[bytes, None]:
    """Yield the device batch whenever it has changed for this caller, and heartbeats."""
    number, sent = 0, b""
    own = {record.id for record in records}
    while True:
        found = await service.live.next_state(number, HEARTBEAT_S)
        if found is None:
            yield HEARTBEAT
            continue
        number, state = found
        event = write_event("batch", {**of_batch(state, own), "waits": _waits(state, caller, records)})
        if event != sent:
            sent = event
            yield event


async def _events_of(
    service: JobsService, request: WebRequest, record: JobRecord, last: str | None
) -> AsyncGenerator[bytes, None]:
    """Yield one job's events, each with the job's id, up to its end."""
    async with service.jobs.watch(record.id) as watch:
        events = job_events(watch, lambda state: job_json(record, state, request.base), last, record.id)
        async with aclosing(events):
            async for event in events:
                if event != HEARTBEAT:
                    yield event
    await service.jobs.records.close(record.caller, [record.id])


async def merge(sources: Collection[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Yield what comes from several generators as it comes; they are closed with this one."""
    coming = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = coming.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    event = task.result()
                    coming[asyncio.ensure_future(anext(source))] = source
                    yield event
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for source in sources:
            await source.aclose()
