"""What an error or a log line shows: URLs without passwords, and foreign values in few characters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from reprlib import Repr
from typing import Any

MASK = "**"

_MOST_CHARACTERS = 80
_MOST_BITS = 256
_DIGITS_PER_BIT = math.log10(2)

_URL = re.compile(  # to the next space, or to a `;` after which another URL begins
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<rest>[^\s;]*(?:;(?![\w+.-]+://)[^\s;]*)*)"
)
_SECRET_OPTION = re.compile(
    r"(?P<name>[?&;][^=&;?\s]{0,64}(?:passw|pwd|secret|token|key|sig|credential)[^=&;?\s]{0,64}=)[^&;\s'\"]+",
    re.IGNORECASE,
)
_NEXT_URL = re.compile(r";(?=[\w+.-]+://)")
_MASKED_URL = re.compile(
    r"(?P<place>[\w+.-]+://(?:[^:@/?#]*(?::\*\*)?@)?"
    r"(?:\[[^\]@]*\]|[^@:/?#]*)(?::\d+)?(?:/[^?#@]*)?)"
    r"(?:[?#].*)?"
)


def sanitize_url(text: str) -> str:
    """Return a text in which every URL has its password masked.

    All that stands before a URL's last `@` counts as its credentials; of these only a user's name stays. An option
    (`?name=value`) whose name sounds like a secret loses its value. Several URLs may be joined by `;`.
    """

    def mask(match: re.Match[str]) -> str:
        credentials, at_sign, place = match["rest"].rpartition("@")
        if not at_sign:
            return match[0]
        user, colon, _ = credentials.partition(":")
        return f"{match['scheme']}{user + colon if colon else ''}{MASK}@{place}"

    return _SECRET_OPTION.sub(rf"\g<name>{MASK}", _URL.sub(mask, text))


def without_password(urls: Any) -> str:
    """Return the URLs of a setting without passwords and options; what is not a URL is masked as a whole.

    Args:
        urls: one URL, several joined by `;`, or a list of them, as in `broker_url`.
    """
    parts = urls if isinstance(urls, list | tuple) else _NEXT_URL.split(str(urls))
    return ";".join(_show(str(part).strip()) for part in parts)


def _show(url: str) -> str:
    match = _MASKED_URL.fullmatch(sanitize_url(url))
    if match is not None:
        return match["place"]
    scheme, separator, _ = url.partition("://")
    return f"{scheme}://{MASK}" if separator else MASK


class _ShortRepr(Repr):
    """`reprlib`'s shortened `repr`, without passwords, also of integers too large for Python to write."""

    def repr_str(self, value: str, level: int) -> str:
        """Return the shortened text; passwords are masked first, while the URLs in it are whole."""
        return super().repr_str(sanitize_url(value), level)

    def repr_int(self, value: int, level: int) -> str:
        """Return a large integer's number of digits instead of the digits."""
        if value.bit_length() <= _MOST_BITS:
            return repr(value)
        return f"an integer of about {int(value.bit_length() * _DIGITS_PER_BIT) + 1:,} digits"


_SHORT = _ShortRepr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _MOST_CHARACTERS
_SHORT.maxlevel = 2


def brief(value: Any) -> str:
    """Return the beginning and the end of a value's `repr`, on one line; never raises, whatever the value is."""
    try:
        return _SHORT.repr(value).replace("\n", " ")
    except Exception:  # the `__repr__` of a foreign class may raise any exception
        return f"a value of the type {type(value).__name__}"


def without_passwords(value: Any) -> Any:
    """Return a setting's value with the passwords of URLs masked, in mappings and sequences too."""
    if isinstance(value, str):
        return sanitize_url(value)
    if isinstance(value, Mapping):
        return {key: without_passwords(part) for key, part in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(without_passwords, value))
    return value
