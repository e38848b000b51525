"""Connections of an event loop to the Redis of an app's result backend, with the options that Celery gives its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis
from redis import asyncio as aioredis
from redis.asyncio.sentinel import Sentinel

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery

MOST_CONNECTIONS = 16
_CONNECT_S, _REPLY_S = 5.0, 10.0
_CONNECTION_CLASSES = {
    redis.SSLConnection: aioredis.SSLConnection,
    redis.UnixDomainSocketConnection: aioredis.UnixDomainSocketConnection,
}


def make_client(app: Celery) -> aioredis.Redis:
    """Return a client with at most `MOST_CONNECTIONS` connections; a command waits for one that is free.

    Raises:
        ConfigurationError: the app's result backend is not Redis.
    """
    if getattr(app.backend, "is_in_this_process", False):
        client: aioredis.Redis = app.backend.make_async_client()  # a stand-in's, in tests
        return client
    return aioredis.Redis.from_pool(_make_pool(app, aioredis.BlockingConnectionPool, timeout=_REPLY_S))


def make_subscriber_pool(app: Celery) -> aioredis.ConnectionPool:
    """Return a pool whose `make_connection` gives connections to subscribe on: their replies may take for ever.

    Raises:
        ConfigurationError: the app's result backend is not Redis.
    """
    return _make_pool(app, aioredis.ConnectionPool, socket_timeout=None, protocol=2, socket_keepalive=True)


def _make_pool(app: Celery, pool_class: type[aioredis.ConnectionPool], **options: Any) -> aioredis.ConnectionPool:
    from celery.backends.redis import RedisBackend, SentinelBackend

    backend = app.backend
    if not isinstance(backend, RedisBackend):
        raise ConfigurationError(
            f"the door needs a Redis result backend, got {sanitize_url(repr(app.conf.result_backend))}; set"
            " result_backend to redis://…"
        )
    params = {name: value for name, value in backend.connparams.items() if value is not None}
    params |= {"socket_connect_timeout": _CONNECT_S, "socket_timeout": _REPLY_S, **options}
    if isinstance(backend, SentinelBackend):
        return _find_primary(backend, params)
    if "connection_class" in params:
        params["connection_class"] = _CONNECTION_CLASSES[params["connection_class"]]
    if params.get("connection_class") is aioredis.UnixDomainSocketConnection:
        params.pop("socket_keepalive", None)
    params["max_connections"] = MOST_CONNECTIONS
    return pool_class(**params)


def _find_primary(backend: Any, params: dict[str, Any]) -> aioredis.ConnectionPool:
    """Return the connections to the primary that the sentinels name."""
    for name in ("hosts", "connection_class", "timeout", "max_connections"):
        params.pop(name, None)
    if backend.connparams.get("connection_class") is not None:
        params["ssl"] = True
    options = backend._transport_options
    sentinels = [(host["host"], host["port"]) for host in backend.connparams["hosts"]]
    sentinel_kwargs = options.get("sentinel_kwargs") or {}
    sentinel = Sentinel(
        sentinels, min_other_sentinels=options.get("min_other_sentinels", 0), sentinel_kwargs=sentinel_kwargs, **params
    )
    return sentinel.master_for(options.get("master_name")).connection_pool
