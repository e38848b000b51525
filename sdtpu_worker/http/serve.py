"""`sdtpu serve`: the door in a process of its own, on uvicorn."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import uvicorn

from sdtpu_worker.config import read_setting
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.http.app import create_app
from sdtpu_worker.http.callers import is_loopback
from sdtpu_worker.http.door import Door

if TYPE_CHECKING:
    from celery import Celery

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 65
"""Longer than what proxies keep, so that none sends a request into a connection that closes."""
_MORE_CONNECTIONS = 2000
"""How many connections may be open beside the streams."""
_GRACE_S = 5
"""Seconds that open answers have after SIGTERM; event streams end at once."""


def serve(app: Celery, address: tuple[str, int] | None = None) -> None:
    """Serve a Celery app's door until SIGTERM or SIGINT.

    Args:
        app: the client's app.
        address: host and port; None for `sdtpu_http_address`. Port 0 is any free port.

    Raises:
        ConfigurationError: a setting is not allowed; the address cannot be used; others could reach it without a key.
    """
    host, port = address or read_setting("sdtpu_http_address", app.conf)
    has_keys = bool(read_setting("sdtpu_http_keys", app.conf))
    if not (has_keys or read_setting("sdtpu_http_open", app.conf) or is_loopback(host)):
        raise ConfigurationError(
            f"the door has no keys, so it may listen on this machine's loopback only, got {host or 'every interface'};"
            " make a key with `sdtpu key NAME` and set sdtpu_http_keys, or set sdtpu_http_open"
        )
    door = create_app(app)
    max_streams: int = read_setting("sdtpu_http_max_streams", app.conf)
    config = uvicorn.Config(
        door, lifespan="on", ws="none", log_level="info", access_log=False, server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=_GRACE_S,
        limit_concurrency=max_streams + _MORE_CONNECTIONS,
    )  # fmt: skip
    with _listen(host, port) as listening:
        place = "{}:{}".format(*listening.getsockname()[:2])
        logging.getLogger("uvicorn.error").info("door: http://%s, %s", place, "with keys" if has_keys else "no keys")
        _Server(config, door.state.door).run([listening])


class _Server(uvicorn.Server):
    """Ends the door's event streams before it waits for open answers: their clients come back to another door."""

    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop."""
        self._door.stopping.set()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        ConfigurationError: the address is in use, or does not belong to this host.
    """
    is_dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual)
    except OSError as exc:
        raise ConfigurationError(f"sdtpu_http_address: cannot listen on {host}:{port}: {exc}") from exc
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or a body waits 40 ms for its headers' receipt
    return listening
