"""One job for one key: a repeated `delay()` with the same `idempotency_key` returns the first one's job.

The key is noted in the broker's Redis before the job is sent, for a minute, and for as long as results are kept once it
is. So a client that dies between the two blocks its key for a minute and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.result import AsyncResult
from celery.utils import uuid

from sdtpu_worker.client.queue_state import broker_with_prefix
from sdtpu_worker.client.waiting import as_text
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

if TYPE_CHECKING:
    from celery import Celery

KEY_STEM = "sdtpu:once:"
_PENDING_S = 60


def send_once(
    app: Celery, key: str, args: Sequence[Any], kwargs: Mapping[str, Any], send: Callable[[str], AsyncResult]
) -> AsyncResult:
    """Send a job, unless one with this key was sent already: then return that job.

    Args:
        app: the client's app.
        key: of the client; tenants have keys of their own.
        args, kwargs: of the job, as the client gave them.
        send: sends the job under a task id.

    Raises:
        InvalidRequest: the key was used with other parameters.
        ConfigurationError: the broker is not Redis.
        BrokerUnavailable: Redis does not answer.
        Exception: what `send` raises; the key is free again then.
    """
    digest = hashlib.sha256(json.dumps([list(args), dict(kwargs)], sort_keys=True, default=str).encode()).hexdigest()
    whose = f"{kwargs.get('tenant') or ''}\0{key}"
    task_id = uuid()
    with broker_with_prefix(app) as (redis, prefix):
        name = f"{prefix}{KEY_STEM}{hashlib.sha256(whose.encode(errors='surrogatepass')).hexdigest()}"
        if not redis.set(name, f"{task_id} {digest}", nx=True, ex=_PENDING_S):
            first = redis.get(name)
            if first is not None:
                return _first_job(app, key, as_text(first), digest)
            redis.set(name, f"{task_id} {digest}", ex=_PENDING_S)  # it expired between the two
        try:
            result = send(task_id)
        except BaseException:
            redis.delete(name)
            raise
        expires = app.conf.result_expires
        expires_s = int(getattr(expires, "total_seconds", lambda: expires or 0)())
        if expires_s:
            redis.expire(name, expires_s)
        else:
            redis.persist(name)
        return result


def _first_job(app: Celery, key: str, noted: str, digest: str) -> AsyncResult:
    task_id, _, of_first = noted.partition(" ")
    if of_first != digest:
        raise InvalidRequest(
            f"idempotency_key must be a new one for other parameters, got {brief(key)}, which was used before"
        )
    return app.AsyncResult(task_id)
