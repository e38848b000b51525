"""What may not stand in a log: passwords, and prompts."""

from __future__ import annotations

import re

_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<userinfo>[^\s;]*)@")
_SECRET_OPTION = re.compile(
    r"(?P<name>[?&;][^=&;\s]*(?:passw|pwd|secret|token|key|sig|credential)[^=&;\s]*=)[^&;\s'\"]+", re.IGNORECASE
)
_MASK = "**"


def sanitize_url(text: str) -> str:
    """Return a text without the passwords of the URLs in it, one or several, also joined by `;`.

    Whatever stands before the last `@` of a URL counts as its credentials; of these only a user's name stays. An
    option of a URL whose name sounds like a secret loses its value.
    """

    def mask(match: re.Match[str]) -> str:
        user, colon, _ = match["userinfo"].partition(":")
        return f"{match['scheme']}{user + colon if colon else ''}{_MASK}@"

    return _SECRET_OPTION.sub(rf"\g<name>{_MASK}", _USERINFO.sub(mask, text))
