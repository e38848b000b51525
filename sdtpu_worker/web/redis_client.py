"""Connections of an event loop to Redis, with the options that Celery gives its own.

It is the Redis of the app's result backend or, where results are kept elsewhere, that of its broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import redis
from redis import asyncio as aioredis
from redis.asyncio.sentinel import Sentinel

from sdtpu_worker.client.stored_state import lasting_backend
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import sanitize_url

if TYPE_CHECKING:
    from celery import Celery
    from celery.backends.redis import RedisBackend

MOST_CONNECTIONS = 16
_URLS_OF_REDIS = ("redis://", "rediss://", "redis+socket://")
_CONNECT_S, _REPLY_S = 5.0, 10.0
_CONNECTION_CLASSES = {
    redis.SSLConnection: aioredis.SSLConnection,
    redis.UnixDomainSocketConnection: aioredis.UnixDomainSocketConnection,
}


def make_client(app: Celery) -> aioredis.Redis:
    """Return a client with at most `MOST_CONNECTIONS` connections; a command waits for one that is free.

    Raises:
        ConfigurationError: neither the app's result backend nor its broker is a Redis that can be used; or the result
            backend is a database that is away.
    """
    backend: Any = lasting_backend(app)
    if getattr(backend, "is_in_this_process", False):
        client: aioredis.Redis = backend.make_async_client()  # a stand-in's, in tests
        return client
    return aioredis.Redis.from_pool(_make_pool(app, aioredis.BlockingConnectionPool, timeout=_REPLY_S))


def make_subscriber_pool(app: Celery) -> aioredis.ConnectionPool:
    """Return a pool whose `make_connection` gives connections to subscribe on: their replies may take for ever.

    Raises:
        ConfigurationError: as `make_client`.
    """
    return _make_pool(app, aioredis.ConnectionPool, socket_timeout=None, protocol=2, socket_keepalive=True)


def _make_pool(app: Celery, pool_class: type[aioredis.ConnectionPool], **options: Any) -> aioredis.ConnectionPool:
    from celery.backends.redis import SentinelBackend

    backend = _find_redis(app)
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


def _find_redis(app: Celery) -> RedisBackend:
    """Return the app's result backend if it is Redis; else one of the same kind whose Redis is the broker's.

    Raises:
        ConfigurationError: no process but the client's can read the results, or the broker is no single Redis.
    """
    from celery.backends.redis import RedisBackend

    own = lasting_backend(app)
    if isinstance(own, RedisBackend):
        return own
    if str(app.conf.result_backend).startswith("cache+memory"):  # a memory of this process alone
        raise ConfigurationError(
            f"the jobs API needs a result backend that keeps results by task id, got"
            f" {sanitize_url(repr(app.conf.result_backend))}; set result_backend to redis://…, or to a database"
        )
    url = app.conf.broker_read_url or app.conf.broker_url
    if not isinstance(url, str) or ";" in url or not url.startswith(_URLS_OF_REDIS):
        raise ConfigurationError(
            "the jobs API keeps its records in Redis: in the result backend's, or in the broker's if its address is one"
            f" redis://…, rediss://… or redis+socket://…; got {sanitize_url(repr(app.conf.result_backend))} and the"
            f" broker {sanitize_url(repr(url))}; set result_backend to redis://…"
        )
    try:
        backend = RedisBackend(app=app, url=url)
    except ValueError as exc:  # a TLS option that is missing or not allowed
        text = f"broker_url cannot be used for the records of the jobs API: {str(exc).strip()}"
        raise ConfigurationError(text) from exc
    if isinstance(app.conf.broker_use_ssl, dict):
        backend.connparams |= {**app.conf.broker_use_ssl, "connection_class": redis.SSLConnection}
    return backend


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
