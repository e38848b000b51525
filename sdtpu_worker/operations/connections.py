"""How many connections a device worker has to Redis, and whether the server grants them.

Measured with 8 and with 32 slots: 14 while it is idle (Celery's and kombu's own, and this package's for claims,
wake-ups, leases and starts); 21 to 33 when 96 jobs of a few milliseconds were waiting. The threads of jobs share their
connections; there are as many as ever talked to Redis at once, which may be all threads when Redis is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from sdtpu_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from redis import Redis

_IDLE, _THREADS_PER_SLOT, _SPARE = 14, 3, 2
"""Three threads a slot: two batches of jobs, and one of urgent jobs. To spare: `inspect`, reconnecting."""


def connections_needed(num_slots: int) -> int:
    """Return how many connections to Redis a worker with so many slots should be granted."""
    return _IDLE + _THREADS_PER_SLOT * num_slots + _SPARE


def connections_warning(client: Redis, num_slots: int) -> str | None:
    """Return a warning if Redis has fewer connections left than a worker may need; None if there are enough.

    Asks INFO. A server that does not tell its limit, or does not answer, gives no warning.

    Args:
        client: a client of the broker.
        num_slots: of the worker, which has not begun to consume.

    Raises:
        ConfigurationError: the server grants fewer connections altogether than this one worker needs.
    """
    try:
        clients = client.info("clients")
        limit, used = int(clients["maxclients"]), int(clients["connected_clients"])
    except (RedisError, OSError, KeyError, ValueError):
        return None
    needed = connections_needed(num_slots)
    if limit < needed:
        raise ConfigurationError(
            f"Redis grants {limit:,} connections (maxclients), but a worker with {num_slots} slots needs {needed}:"
            " results of jobs could not be stored, and the jobs would come back for ever; raise maxclients"
        )
    if limit - used < needed:
        return (
            f"Redis has {used:,} of {limit:,} connections in use (maxclients), and this worker with {num_slots} slots"
            f" needs up to {needed}: when none is left, results wait and jobs may run again. Raise maxclients."
        )
    return None
