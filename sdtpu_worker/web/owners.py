"""Whose request it is, in a web app that has users or sessions."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.parameter_checks import MAX_TENANT_CHARACTERS
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.problems import Refusal

SESSION_KEY = "sdtpu_owner"
"""Under which a session keeps the random name of somebody who has not logged in."""
PREFIX = "web:"
"""Before the names of a web app's users: no key of the door has a name with a colon."""


def make_caller(owner: str | Caller | None, conf: Mapping[str, Any]) -> Caller:
    """Return the caller of a web app's user.

    Args:
        owner: the user, as the app names it; None for nobody; a `Caller` where the app gives its limits, too. The name
            of the caller that is returned begins with `PREFIX`.
        conf: the Celery app's configuration, with the limits of all users.

    Raises:
        Refusal: 401, it is nobody.
        ConfigurationError: it is of another kind.
    """
    if isinstance(owner, Caller):
        return replace(owner, name=_full_name(owner.name))
    if owner is None:
        raise Refusal(401, "NotLoggedIn", "this is for users who have logged in: log in first")
    if not isinstance(owner, str) or not owner:
        raise ConfigurationError(
            f"the owner of a request must be a text that is not empty, None or a Caller, got {owner!r:.80}; mend the"
            " function that finds it"
        )
    limits = read_setting("sdtpu_web_priorities", conf), read_setting("sdtpu_web_max_jobs", conf)
    return Caller(_full_name(owner), *limits)


def _full_name(owner: str) -> str:
    name = f"{PREFIX}{owner}"
    if len(name) > MAX_TENANT_CHARACTERS or not name.isprintable():
        return PREFIX + hashlib.sha256(owner.encode(errors="surrogatepass")).hexdigest()
    return name


def owner_in_session(session: MutableMapping[str, Any]) -> str:
    """Return the name of whoever has a session: a random one, which the session keeps."""
    if not isinstance(session.get(SESSION_KEY), str):
        session[SESSION_KEY] = secrets.token_urlsafe(16)
    return f"session-{session[SESSION_KEY]}"
