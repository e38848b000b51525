"""Bodies of requests, as one JSON object, and the names in it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.web.problems import Refusal


def check_is_json(content_type: str) -> None:
    """Check that a body is declared as JSON, which a form of another site cannot do.

    Raises:
        Refusal: 415, it is not.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(
            415, "NotJson", f"the body must have the type application/json, got {media_type[:60]!r};"
            " with curl: -H 'Content-Type: application/json'",
        )  # fmt: skip


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        InvalidRequest: it is not a JSON object.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest(f"body must be JSON in UTF-8: {exc!s:.200}") from exc
    if not isinstance(value, dict):
        raise InvalidRequest(f"body must be a JSON object, got {type(value).__name__}")
    return value


def too_large(most_bytes: int) -> Refusal:
    """Return the refusal of a body with more bytes than this."""
    return Refusal(
        413, "BodyTooLarge", f"the body must have at most {most_bytes:,} bytes (sdtpu_http_max_body_bytes)",
        headers={"Connection": "close"},
    )  # fmt: skip


def check_fields(given: dict[str, Any], known: Any) -> None:
    """Check that an object has no other fields.

    Raises:
        InvalidRequest: it has.
    """
    if unknown := [name for name in given if name not in known]:
        raise InvalidRequest(f"{unknown[0]!r:.60} is no field of this request; the fields are {', '.join(known)}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
