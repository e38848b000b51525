"""OpenAI's Images API: `POST /v1/images/generations`, plain and streaming, and `GET /v1/models`."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdtpu_worker.contract.request import IMAGE_FORMATS
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.bodies import read_json
from sdtpu_worker.http.departures import unless_left
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.event_stream import EventStream
from sdtpu_worker.http.problems import openai_error
from sdtpu_worker.images.decode import decode_image, named_image
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.events import HEARTBEAT, HEARTBEAT_S, write_event
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.parameters import JOB_FIELDS, with_seed
from sdtpu_worker.web.problems import Refusal, refusal_for, refusal_for_job

MOST_PICTURES = 10
MOST_PARTIAL_IMAGES = 3
_SIZE = re.compile(r"([0-9]{1,5})\s*[x×*]\s*([0-9]{1,5})")
_NO_USAGE: dict[str, Any] = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}


@dataclass(frozen=True)
class ImagesRequest:
    """A request for pictures, in our own terms.

    Attributes:
        parameters: of each job, with the first one's seed.
        n: how many pictures.
        as_url: whether the answer has addresses in place of the pictures.
        image_format: png, jpeg or webp.
        quality: 0 to 100, of a JPEG or WebP that the door encodes; None to send what the worker has encoded.
        stream: whether the answer is a stream of events.
        partial_images: how many previews it has at most.
    """

    parameters: Mapping[str, Any]
    n: int = 1
    as_url: bool = False
    image_format: str = "png"
    quality: int | None = None
    stream: bool = False
    partial_images: int = 0

    def with_parameters(self, more: Mapping[str, Any]) -> ImagesRequest:
        """Return the request with further parameters; None removes one."""
        parameters = {name: value for name, value in {**self.parameters, **more}.items() if value is not None}
        return replace(self, parameters=parameters)


def read_request(body: Mapping[str, Any]) -> ImagesRequest:
    """Return what a client of OpenAI's asks for. Fields that other models need are ignored.

    Raises:
        InvalidRequest: a field is not allowed.
    """
    given = {name: value for name, value in body.items() if value is not None}
    parameters = {name: value for name, value in given.items() if name in JOB_FIELDS and name != "image_format"}
    parameters.update(_read_size(given.get("size", "auto")))
    parameters.pop("tenant", None)
    if isinstance(user := given.get("user"), str) and user:
        parameters["tenant"] = user
    image_format = _choice(given, "output_format", given.get("image_format", "png"), IMAGE_FORMATS)
    quality = _integer(given, "output_compression", None, 0, 100) if image_format != "png" else None
    stream = _boolean(given, "stream")
    n = _integer(given, "n", 1, 1, MOST_PICTURES)
    as_url = _choice(given, "response_format", "b64_json", ("b64_json", "url")) == "url"
    if stream and n != 1:
        raise InvalidRequest(f"n must be 1 with stream, got {n}")
    if as_url:
        quality = None
    parameters["image_format"] = image_format if quality is None else "png"
    return ImagesRequest(
        parameters, n or 1, as_url, image_format, quality, stream,
        _integer(given, "partial_images", 0, 0, MOST_PARTIAL_IMAGES) or 0,
    )  # fmt: skip


def _read_size(size: Any) -> dict[str, int]:
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise InvalidRequest(f"size must be auto, or width x height in pixels like 512x512, got {size!r:.40}")
    return {"width": int(match[1]), "height": int(match[2])}


def _integer(given: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = given.get(name, default)
    if value is default:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be an integer from {low} to {high}, got {value!r:.40}")
    return value


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {value!r:.40}")
    return value


def _choice(given: Mapping[str, Any], name: str, default: Any, choices: Sequence[str]) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, got {value!r:.40}")
    return value


async def generate_images(request: Request) -> Response:
    """Answer `POST /v1/images/generations`."""
    door = door_of(request)
    caller = door.callers.find(request)
    wanted = read_request(await read_json(request, door.max_body_bytes))
    return await answer_with_pictures(door, request, caller, wanted)


async def answer_with_pictures(door: Door, request: Request, caller: Caller, wanted: ImagesRequest) -> Response:
    """Enqueue what is wanted, and answer with the pictures or with a stream of events."""
    given = [with_seed(wanted.parameters, number) for number in range(wanted.n)]
    records = await door.jobs.make_records(caller, given, "openai")
    if wanted.stream:
        give_back = door.take_stream_place()
        try:
            await door.jobs.submit(caller, records)
        except BaseException:
            give_back()
            raise

        def end() -> None:
            give_back()
            door.jobs.cancel_later(records)  # one that has ended stays as it is

        return EventStream(_stream(door, wanted, records[0]), door.stopping, end)
    await door.jobs.submit(caller, records)
    states = await wait_for_pictures(door, request, records)
    data = [
        {**await _picture(door, wanted, record, state, request), "seed": _result(state)["seed"], "job_id": record.id}
        for record, state in zip(records, states, strict=True)
    ]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "output_format": wanted.image_format,
            "size": _size_of(states[0]),
            "usage": _NO_USAGE,
        }
    )


async def wait_for_pictures(door: Door, request: Request, records: Sequence[JobRecord]) -> list[JobState]:
    """Return the ends of jobs that all have a picture; if the caller leaves, or one has none, the others are cancelled.

    Raises:
        CallerLeft: nobody waits for an answer any more.
        Refusal: a job has no picture, or not within `sdtpu_http_wait_s`.
    """
    try:
        states = await unless_left(request, door.jobs.wait(records, door.wait_s))
        if states is None:
            raise Refusal(
                504, "TimedOut", f"no picture within {door.wait_s:g} s (sdtpu_http_wait_s), so the job was cancelled;"
                " POST /v1/jobs has no such limit",
            )  # fmt: skip
        for state in states:
            if state.error is not None:
                raise refusal_for_job(state.status, state.error)
    except BaseException:
        door.jobs.cancel_later(records)
        raise
    return states


async def _stream(door: Door, wanted: ImagesRequest, record: JobRecord) -> AsyncGenerator[bytes, None]:
    """Yield previews as they come, spread over the denoising, then the picture."""
    sent = 0
    state: JobState | None = None
    until = time.monotonic() + door.wait_s
    async with door.jobs.watch(record.id) as watch:
        while not (state and state.has_ended) and time.monotonic() < until:
            state = await watch.next_state(HEARTBEAT_S)
            if state is None:
                yield HEARTBEAT
            elif _is_due(state, sent, wanted.partial_images):
                preview = {"b64_json": state.preview, "output_format": "png", "partial_image_index": sent}
                yield _event("partial_image", preview, wanted, state)
                sent += 1
    try:
        if state is None or not state.has_ended:
            raise Refusal(504, "TimedOut", f"no picture within {door.wait_s:g} s (sdtpu_http_wait_s)")
        if state.error is not None:
            raise refusal_for_job(state.status, state.error)
        encoded = await _encoded(door, wanted, state)
    except Exception as exc:
        yield write_event("error", {"error": openai_error(refusal_for(exc))})
        return
    facts = {"b64_json": encoded, "output_format": wanted.image_format, "usage": _NO_USAGE}
    yield _event("completed", {**facts, "seed": _result(state)["seed"], "job_id": record.id}, wanted, state)


def _is_due(state: JobState, sent: int, wanted: int) -> bool:
    """Return whether a state's preview is the next one to send: each stands for an equal part of the denoising."""
    if sent >= wanted or state.preview is None or state.progress is None:
        return False
    current, total = state.progress["current"] or 0, state.progress["total"] or 1
    return current * (wanted + 1) >= total * (sent + 1)


def _event(name: str, facts: Mapping[str, Any], wanted: ImagesRequest, state: JobState) -> bytes:
    kind = f"image_generation.{name}"
    common = {"type": kind, "created_at": int(time.time()), "background": "opaque", "quality": "auto"}
    return write_event(kind, {**common, "size": _size_of(state, wanted), **facts})


async def _picture(
    door: Door, wanted: ImagesRequest, record: JobRecord, state: JobState, request: Request
) -> dict[str, str]:
    if wanted.as_url:
        url = request.url_for("job_image", job_id=record.id).include_query_params(token=record.image_token)
        return {"url": str(url)}
    return {"b64_json": await _encoded(door, wanted, state)}


async def _encoded(door: Door, wanted: ImagesRequest, state: JobState) -> str:
    data = await door.jobs.read_image(state)
    if wanted.quality is not None:
        data = await door.jobs.threads.call(_encode_anew, data, state, wanted.image_format, wanted.quality)
    return base64.b64encode(data).decode()


def _encode_anew(data: bytes, state: JobState, image_format: str, quality: int) -> bytes:
    _, image = named_image(state.result)
    pixels = decode_image(data, image.format, image.width, image.height)
    buffer = io.BytesIO()
    pixels.convert("RGB").save(buffer, image_format, quality=quality)
    return buffer.getvalue()


def _result(state: JobState) -> Mapping[str, Any]:
    assert state.result is not None
    return state.result


def _size_of(state: JobState, wanted: ImagesRequest | None = None) -> str:
    if state.result is not None:
        return f"{state.result['image']['width']}x{state.result['image']['height']}"
    given = wanted.parameters if wanted else {}
    return f"{given['width']}x{given['height']}" if {"width", "height"} <= given.keys() else "auto"


async def list_models(request: Request) -> Response:
    """Answer `GET /v1/models`: the one checkpoint of this deployment."""
    door = door_of(request)
    door.callers.find(request)
    return JSONResponse({"object": "list", "data": [_model(door)]})


async def show_model(request: Request) -> Response:
    """Answer `GET /v1/models/{model}`."""
    door = door_of(request)
    door.callers.find(request)
    if (name := request.path_params["model"]) != door.model:
        raise Refusal(404, "NoSuchModel", f"this deployment serves {door.model!r}, not {name!r:.60}", "model")
    return JSONResponse(_model(door))


async def refuse_variations(request: Request) -> Response:
    """Answer `POST /v1/images/variations`: a picture without a prompt."""
    door_of(request).callers.find(request)
    raise Refusal(400, "NotServed", "a picture without a prompt is not served; POST /v1/images/edits with a prompt")


def _model(door: Door) -> dict[str, Any]:
    return {"id": door.model, "object": "model", "created": door.started_at, "owned_by": "sdtpu_worker"}
