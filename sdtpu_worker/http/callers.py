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
        metrics_keys: `sdtpu_http_metrics_keys`.
    """

    def __init__(self, keys: Sequence[HttpKey], is_open: bool, metrics_keys: Sequence[HttpKey] = ()) -> None:
        self._by_hash = {key.sha256: Caller(key.name, key.priorities, key.max_jobs) for key in keys}
        self._is_open = is_open
        self._scrapers = {key.sha256 for key in metrics_keys}

    def find(self, request: HTTPConnection) -> Caller:
        """Return the caller of a request.

        Raises:
            Refusal: 401, the key is missing or unknown; 403, there are no keys, and the caller is on another machine.
        """
        if self._by_hash:
            hashed = _hash_of_key(request)
            if hashed not in self._by_hash:
                raise _invalid_key(hashed)
            return self._by_hash[hashed]
        if not self._is_open:
            _check_is_local(request)
        return Caller()

    def check_scraper(self, request: HTTPConnection) -> None:
        """Check that a request may read the figures of all callers' queues.

        Raises:
            Refusal: 401, the key is missing or unknown; 403, the door has keys for its callers and none for this; or
                it has no keys, and the request comes from another machine.
        """
        if self._scrapers:
            if (hashed := _hash_of_key(request)) not in self._scrapers:
                raise _invalid_key(hashed)
        elif self._by_hash:
            raise Refusal(
                403, "NoMetricsKey",
                "no key of this door opens /metrics: make one with `sdtpu key prometheus` and set"
                " sdtpu_http_metrics_keys",
            )  # fmt: skip
        elif not self._is_open:
            _check_is_local(request)


def is_loopback(host: str) -> bool:
    """Return whether an address, or `localhost`, is on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _hash_of_key(request: HTTPConnection) -> str:
    """Return the hash of the key that a request presents; empty where it presents none."""
    key = presented_key(request.headers)
    return hash_key(key) if key else ""


def _invalid_key(hashed: str) -> Refusal:
    detail = "the key is unknown" if hashed else "a key is missing: send it as `Authorization: Bearer KEY`"
    return Refusal(401, "InvalidKey", detail, headers={"WWW-Authenticate": "Bearer"})


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
