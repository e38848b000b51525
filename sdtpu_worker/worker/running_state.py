"""The states of a job that runs, stored so that none of them overwrites the job's end.

A client that cancels a job stores the state REVOKED itself, and the worker hears of it a moment later. Celery's
backends keep a stored SUCCESS and nothing else, so a progress in that moment would have the job run again in the eyes
of whoever looks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery.backends.redis import RedisBackend
from celery.states import READY_STATES

if TYPE_CHECKING:
    from celery import Task

# KEYS: the result's key, which is also its channel. ARGV: the SHA-1 of what it held ("" for nothing), the new state,
# and the seconds until it expires ("" for never).
_STORE_UNLESS_CHANGED = """
local held = redis.call('GET', KEYS[1])
if (held and redis.sha1hex(held) or '') ~= ARGV[1] then return 0 end
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SETEX', KEYS[1], ARGV[3], ARGV[2]) end
redis.call('PUBLISH', KEYS[1], ARGV[2])
return 1
"""


def store_running_state(task: Task, name: str, meta: Mapping[str, Any]) -> bool:
    """Store a state of a task that has not ended, unless its end is stored already.

    With a backend other than Redis the state is stored as Celery stores it: over anything but a SUCCESS.

    Args:
        task: the task, in its own thread.
        name: of the state, such as `PROGRESS`.
        meta: JSON-compatible.

    Returns:
        Whether it was stored.

    Raises:
        Exception: the backend does not answer, or cannot read what it holds; each backend has errors of its own.
    """
    backend = task.backend
    if not isinstance(backend, RedisBackend):
        task.update_state(state=name, meta=dict(meta))
        return True
    key = backend.get_key_for_task(task.request.id)
    held = backend.get(key)
    if held is not None and backend.decode(held)["status"] in READY_STATES:
        return False
    state = backend._get_result_meta(result=dict(meta), state=name, traceback=None, request=task.request)
    encoded = backend.encode({**state, "task_id": task.request.id})
    script = backend.client.register_script(_STORE_UNLESS_CHANGED)
    return bool(script([key], [_digest(held), encoded, backend.expires or ""]))


def _digest(held: bytes | str | None) -> str:
    """Return the SHA-1 of what a key holds; text if the backend's URL has `decode_responses`."""
    if held is None:
        return ""
    return hashlib.sha1(held.encode() if isinstance(held, str) else held, usedforsecurity=False).hexdigest()
