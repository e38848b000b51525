"""Clients of the broker's Redis beside the consumer's own connection, made as kombu makes that one, with time-outs.

Kombu knows how to get there, whatever it takes: TLS, a password, Sentinels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery.transport import SentinelTransport

if TYPE_CHECKING:
    from celery import Celery
    from redis import Redis

_TIMEOUT_S = 5.0
_CLIENT_OPTIONS = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S, "max_connections": 1000}
CONSUMER_OPTIONS: Mapping[str, Any] = {
    "socket_keepalive": True,
    "socket_timeout": 2 * _TIMEOUT_S,
    "socket_connect_timeout": _TIMEOUT_S,
}
"""The `broker_transport_options` of the consumer's connection, where the app has none of its own."""


def first_client(app: Celery) -> Redis:
    """Make a client for the time before the consumer is connected.

    Raises:
        Exception: any error of kombu or of the driver when Redis cannot be reached.
    """
    return _client_of(app.connection_for_read(transport_options=_CLIENT_OPTIONS))


def client_maker(connection: Any) -> Callable[[], Redis]:
    """Return what makes clients of the very server that the consumer is connected to now.

    Args:
        connection: the consumer's. Other servers of its URL are left out, so that no client fails over by itself; those
            of Sentinels are only the other Sentinels, and stay.
    """
    has_alternates = isinstance(connection.transport, SentinelTransport)
    bound = connection.clone(
        transport_options={**connection.transport_options, **_CLIENT_OPTIONS},
        alternates=list(connection.alt) if has_alternates else [],
    )
    return partial(_client_of, bound)


def _client_of(connection: Any) -> Redis:
    from redis import Redis

    connection.connect()
    return Redis(connection_pool=connection.channel().pool)
