"""Read the compiler's report of a program's memory."""

from __future__ import annotations

import re

_SECTION = re.compile(r"^Memory Space: default \(color=0\)\s*\nTotal bytes: (\d+)", re.MULTILINE)


def read_total(text: str) -> int | None:
    """Return the bytes of a device's main memory that a program takes with its arguments; None if it does not say."""
    found = _SECTION.search(text)
    return int(found[1]) if found else None
