"""The text of what workers publish of themselves: JSON that others may have written."""

from __future__ import annotations

import json
from typing import Any

from sdtpu_worker.redaction import brief


def read_report(kind: str, text: str | bytes, most_bytes: int) -> dict[str, Any]:
    """Return the fields of a report, unchecked.

    Args:
        kind: of the report, with its article, for errors: `a load report`.
        text: JSON.
        most_bytes: the largest that is read.

    Raises:
        ValueError: the text is not a JSON object, or is too large.
    """
    if len(text) > most_bytes:
        raise ValueError(f"{kind} must have at most {most_bytes:,} bytes, got {len(text):,}")
    try:
        facts = json.loads(text)
    except RecursionError as exc:
        raise ValueError(f"{kind} must not be nested so deeply") from exc
    if not isinstance(facts, dict):
        raise ValueError(f"{kind} must be a JSON object, got {brief(facts)}")
    return facts
