"""Bodies of the door's requests, read up to a limit."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from sdtpu_worker.web.bodies import check_is_json, parse_json, too_large


async def read_json(request: Request, most_bytes: int) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Args:
        request: the request.
        most_bytes: the largest body that is read.

    Raises:
        Refusal: 413, the body is larger; 415, it is not declared as JSON.
        InvalidRequest: it is not a JSON object.
    """
    check_is_json(request.headers.get("content-type", ""))
    return parse_json(await read_body(request, most_bytes))


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: 413, it is larger than `most_bytes`.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise too_large(most_bytes)
        parts.append(part)
    return b"".join(parts)
