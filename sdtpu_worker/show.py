"""A stranger's value in a text of ours: short, on one line, and never an exception, whatever the value is."""

from __future__ import annotations

import math
from reprlib import Repr
from typing import Any

_MOST_CHARACTERS = 80
_MOST_BITS = 256
_DIGITS_PER_BIT = math.log10(2)


class _ShortRepr(Repr):
    """`reprlib`'s shortened `repr`, also of integers that have too many digits for Python to write."""

    def repr_int(self, value: int, level: int) -> str:
        """Return a large integer's size instead of its digits."""
        if value.bit_length() <= _MOST_BITS:
            return repr(value)
        return f"an integer of about {int(value.bit_length() * _DIGITS_PER_BIT) + 1:,} digits"


_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MOST_CHARACTERS
_SHORT.maxlevel = 2


def show(value: Any) -> str:
    """Return a value's `repr`, shortened to its ends."""
    try:
        return _SHORT.repr(value).replace("\n", " ")
    except Exception:  # whatever a class of the caller's own raises in its `__repr__`
        return f"a value of the type {type(value).__name__}"
