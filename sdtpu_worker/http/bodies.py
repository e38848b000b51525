"""Bodies of requests: read up to a limit, as one JSON object."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from starlette.requests import Request

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.problems import Refusal


async def read_json(request: Request, most_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Args:
        request: the request.
        most_bytes: the largest body that is read.

    Raises:
        Refusal: 413, the body is larger; 415, it is not declared as JSON, which a form of another site cannot do.
        InvalidRequest: it is not a JSON object.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(
            415, "NotJson", f"the body must have the type application/json, got {media_type[:60]!r};"
            " with curl: -H 'Content-Type: application/json'",
        )  # fmt: skip
    body = await read_body(request, most_bytes)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"body must be JSON in UTF-8: {exc!s:.200}") from exc
    if not isinstance(value, dict):
        raise InvalidRequest(f"body must be a JSON object, got {type(value).__name__}")
    return value


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: 413, it is larger than `most_bytes`.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise Refusal(
                413, "BodyTooLarge", f"the body must have at most {most_bytes:,} bytes (sdtpu_http_max_body_bytes)",
                headers={"Connection": "close"},
            )  # fmt: skip
        parts.append(part)
    return b"".join(parts)


def check_fields(given: dict[str, Any], known: Any) -> None:
    """Check that an object has no other fields.

    Raises:
        InvalidRequest: it has.
    """
    if unknown := [name for name in given if name not in known]:
        raise InvalidRequest(f"{unknown[0]!r:.60} is no field of this request; the fields are {', '.join(known)}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
