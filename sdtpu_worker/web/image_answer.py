"""A picture as an answer: its type, `ETag`, ranges and cache headers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from sdtpu_worker.web.exchange import Answer
from sdtpu_worker.web.problems import Refusal

_RANGE = re.compile(r"bytes=([0-9]{0,15})-([0-9]{0,15})")


def answer_with_image(asked: Mapping[str, str], data: bytes, content_type: str, max_age_s: int | None) -> Answer:
    """Return the answer to a request for a picture, whole, in part, or not modified.

    Args:
        asked: the request's headers, of which `If-None-Match`, `Range` and `If-Range` count.
        data: the encoded picture.
        content_type: of the picture.
        max_age_s: seconds for which a browser may keep it; None for a year.

    Raises:
        Refusal: 416, the range lies outside of the picture.
    """
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"private, max-age={max_age_s or 31_536_000}, immutable",
        "Accept-Ranges": "bytes",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
    }
    if names_tag(asked.get("if-none-match", ""), etag):
        return Answer(304, headers)
    wanted = asked.get("range", "")
    match = _RANGE.fullmatch(wanted.strip())
    if match is None or match.groups() == ("", "") or asked.get("if-range", etag) != etag:
        return Answer(200, headers, data, content_type)  # several ranges, or no such thing: the whole picture
    first, last = _bounds(match, len(data))
    if first > last:
        raise Refusal(
            416, "RangeNotSatisfiable", f"the picture has {len(data):,} bytes, got the range {wanted!r:.60}",
            headers={"Content-Range": f"bytes */{len(data)}"},
        )  # fmt: skip
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Answer(206, headers, data[first : last + 1], content_type)


def _bounds(match: re.Match[str], size: int) -> tuple[int, int]:
    """Return the first and the last byte of a range; the first comes after the last where there is none."""
    if match[1]:
        return int(match[1]), min(int(match[2] or size), size - 1)
    return max(0, size - int(match[2])), size - 1


def names_tag(header: str, etag: str) -> bool:
    """Return whether an `If-None-Match` names a tag."""
    return any(part.strip().removeprefix("W/") in (etag, "*") for part in header.split(","))
