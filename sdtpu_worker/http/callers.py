"""Who asks the door: the caller behind a bearer key, and who may come without a key."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.requests import HTTPConnection

from sdtpu_worker.config_values import HttpKey
from sdtpu_worker.http.keys import hash_key, presented_key
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.problems import Refusal

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Callers:
    """Finds the caller of a request.

    Args:
        keys: `sdtpu_http_keys`; with none there is one caller, without a name.
        is_open: whether callers without a key may come from other machines.
    """

    def __init__(self, keys: Sequence[HttpKey], is_open: bool) -> None:
        self._by_hash = {key.sha256: Caller(key.name, key.priorities, key.max_jobs) for key in keys}
        self._is_open = is_open

    def find(self, request: HTTPConnection) -> Caller:
        """Return the caller of a request.

        Raises:
            Refusal: 401, the key is missing or unknown; 403, there are no keys, and the caller is on another machine.
        """
        if self._by_hash:
            key = presented_key(request.headers)
            caller = self._by_hash.get(hash_key(key)) if key else None
            if caller is None:
                raise Refusal(
                    401, "InvalidKey",
                    "the key is unknown" if key else "a key is missing: send it as `Authorization: Bearer KEY`",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            return caller
        if not self._is_open:
            _check_is_local(request)
        return Caller()


def is_loopback(host: str) -> bool:
    """Return whether an address, or `localhost`, is on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _check_is_local(request: HTTPConnection) -> None:
    """Check that a request comes from this machine, and was meant for it: a web page can give a name any address."""
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    is_local = request.client is None or is_loopback(request.client.host)  # None: a Unix socket
    if not is_local or (request.client is not None and name.lower() not in _LOCAL_NAMES):
        raise Refusal(
            403, "LocalCallersOnly",
            "this door has no keys, so it serves only callers on its own machine, at localhost; set sdtpu_http_keys, or"
            " sdtpu_http_open where others keep strangers out",
        )  # fmt: skip
