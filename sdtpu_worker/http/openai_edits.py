"""OpenAI's Images API: `POST /v1/images/edits`, a form with a picture to start from and perhaps a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response

from sdtpu_worker.contract.parameter_checks import check_side
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.openai_images import ImagesRequest, answer_with_pictures, read_request
from sdtpu_worker.http.pictures_in import fit_picture, mask_of_transparency
from sdtpu_worker.web.problems import Refusal

_MOST_FIELDS = 100
_INTEGERS = ("n", "output_compression", "partial_images", "seed", "num_inference_steps", "priority", "clip_skip",
             "width", "height")  # fmt: skip
_NUMBERS = ("guidance_scale", "strength", "image_guidance_scale", "eta", "guidance_rescale", "expires")
_SWITCHES = ("stream", "preserve_unmasked")


async def edit_images(request: Request) -> Response:
    """Answer `POST /v1/images/edits`."""
    door = door_of(request)
    caller = door.callers.find(request)
    fields, files = await _read_form(door, request)
    if "image" not in files:
        raise InvalidRequest("image is missing: send the picture as a file of a multipart form")
    wanted = read_request(_typed(fields))
    pictures = await door.jobs.threads.call(_fit, wanted, files)
    return await answer_with_pictures(door, request, caller, wanted.with_parameters(pictures))


async def _read_form(door: Door, request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the form's texts and files by name; `image[]`, as clients write a list, is `image`.

    Raises:
        Refusal: 413, 415.
        InvalidRequest: it is no form, or it has a file twice.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "NotAForm", "the body must have the type multipart/form-data")
    if (length := request.headers.get("content-length", "")).isdigit() and int(length) > door.max_body_bytes:
        raise _too_large(door)
    request = Request(request.scope, _bounded(door, request))
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=4, max_fields=_MOST_FIELDS, max_part_size=door.max_body_bytes) as form:
            for name, value in form.multi_items():
                name = name.removesuffix("[]")
                if not isinstance(value, UploadFile):
                    fields[name] = value
                elif name in files:
                    raise InvalidRequest(f"{name} must be one picture, got several")
                else:
                    files[name] = await value.read()
    except (MultiPartException, HTTPException, ValueError) as exc:
        if isinstance(exc, InvalidRequest):
            raise
        raise InvalidRequest(f"body must be a multipart form: {getattr(exc, 'detail', exc)}") from exc
    return fields, files


def _bounded(door: Door, request: Request) -> Any:
    """Return a `receive` that ends a body which is larger than the door takes."""
    size = 0

    async def receive() -> Any:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > door.max_body_bytes:
            raise _too_large(door)
        return message

    return receive


def _too_large(door: Door) -> Refusal:
    text = f"the body must have at most {door.max_body_bytes:,} bytes (sdtpu_http_max_body_bytes)"
    return Refusal(413, "BodyTooLarge", text, headers={"Connection": "close"})


def _typed(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return a form's texts as the values that JSON would have; what cannot be converted is found by its check."""
    typed: dict[str, Any] = {}
    for name, text in fields.items():
        value: Any = text
        try:
            if name in _INTEGERS:
                value = int(text) if len(text) <= 20 else text
            elif name in _NUMBERS:
                value = float(text)
            elif name in _SWITCHES:
                value = {"true": True, "false": False}.get(text.lower(), text)
        except ValueError:
            pass
        typed[name] = value
    return typed


def _fit(wanted: ImagesRequest, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the pictures as parameters; their size is that of the result, so none is asked for besides."""
    given = wanted.parameters
    for name in ("width", "height"):
        if isinstance(given.get(name), str):  # what is no number; the size as a whole is checked with the picture
            check_side(name, given[name])
    if (given.get("width") is None) != (given.get("height") is None):
        raise InvalidRequest(
            "width and height must be given together, or neither; without them the result has the picture's size"
        )
    size = None if given.get("width") is None else (given["width"], given["height"])
    pictures: dict[str, Any] = {"image": fit_picture("image", files["image"], size), "width": None, "height": None}
    if "mask" in files:
        pictures["mask_image"] = mask_of_transparency("mask", files["mask"], size)
    return pictures
