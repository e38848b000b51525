"""URLs as an error or a log line may show them: without passwords."""

from __future__ import annotations

import re
from typing import Any

MASK = "**"

_URL = re.compile(  # to the next space, or to a `;` after which another URL begins
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)(?P<rest>[^\s;]*(?:;(?![\w+.-]+://)[^\s;]*)*)"
)
_SECRET_OPTION = re.compile(
    r"(?P<name>[?&;][^=&;\s]*(?:passw|pwd|secret|token|key|sig|credential)[^=&;\s]*=)[^&;\s'\"]+", re.IGNORECASE
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
