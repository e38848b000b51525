"""One job for one key: a repeated `delay()` with the same `idempotency_key` returns the first one's job.

The key is noted in the broker's Redis before the job is sent, for a minute, and for as long as results are kept once it
is. So a client that dies between the two blocks its key for a minute and nothing else. The `Idempotency-Key` of the
jobs API (`sdtpu_worker/web/job_records.py`) is noted in the same form.
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
from sdtpu_worker.config import result_expires_s
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

if TYPE_CHECKING:
    from celery import Celery

KEY_STEM = "sdtpu:once:"
PENDING_S = 60
"""Seconds for which a key is taken whose job is not sent yet: its client may have died meanwhile."""


def hash_of_key(key: str) -> str:
    """Return what stands for a client's key in the name of a Redis key."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def write_note(task_id: str, digest: str) -> str:
    """Return what Redis keeps for a key.

    Args:
        task_id: of the job.
        digest: of all that was asked for.
    """
    return f"{task_id} {digest}"


def read_note(stored: bytes | str) -> tuple[str, str]:
    """Return the task id and the digest of what `write_note` made."""
    task_id, _, digest = as_text(stored).partition(" ")
    return task_id, digest


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
        name = f"{prefix}{KEY_STEM}{hash_of_key(whose)}"
        while not redis.set(name, write_note(task_id, digest), nx=True, ex=PENDING_S):
            if (first := redis.get(name)) is not None:  # else it has expired between the two
                return _first_job(app, key, first, digest)
        try:
            result = send(task_id)
        except BaseException:
            redis.delete(name)
            raise
        if expires_s := result_expires_s(app.conf):
            redis.expire(name, expires_s)
        else:
            redis.persist(name)
        return result


def _first_job(app: Celery, key: str, noted: bytes | str, digest: str) -> AsyncResult:
    task_id, of_first = read_note(noted)
    if of_first != digest:
        raise InvalidRequest(
            f"idempotency_key must be a new one for other parameters, got {brief(key)}, which was used before"
        )
    return app.AsyncResult(task_id)
