"""The task's name, its queues and the Redis lists behind them: what client and worker must agree on.

Fair shares: the jobs of many tenants are spread over a fixed number of queues, which a worker serves in turn. One Redis
list is served in the order of arrival, so a tenant with ten thousand jobs would stand before all others. Because the
number of queues is fixed, no list of tenants is needed; two tenants with the same queue share its turns.
"""

from __future__ import annotations

import hashlib
from typing import Any

TASK_NAME = "sdtpu.generate"
"""The name of the Celery task that makes one image."""
DEFAULT_QUEUE = "sdtpu"
"""The queue of the task where `sdtpu_queue` is not set."""
DEFAULT_PRIORITY = 6
"""The priority of a job whose client names none: in the middle, with room above and below. Lower is more urgent."""
HELD_KEY, LEASES_KEY, DELAYED_KEY = "sdtpu:unacked", "sdtpu:unacked_index", "sdtpu:delayed"
"""The Redis keys of the messages that workers hold and of those that wait for their time; see `delivery/keys.py`."""
DEAD_COUNTS_KEY = "sdtpu:dead:counts"
"""The Redis key of how many messages no worker could run, by kind."""
SENT_AT_HEADER = "sdtpu_sent_at"
"""The message header with the time at which the client sent the job, in seconds since 1970."""
LATEST_SENT_AT = 2**40
"""The latest time that this header may have; a worker ignores a later one."""


def read_sent_at(header: Any) -> float | None:
    """Return the time at which the client sent a job, in seconds since 1970; None where the header is no such time."""
    is_number = isinstance(header, int | float) and not isinstance(header, bool)
    return header if is_number and 0 <= header <= LATEST_SENT_AT else None


def shard_queues(queue: str, shards: int) -> list[str]:
    """Return the queues that a worker consumes: its own, then `queue.t0`, `queue.t1`, …

    Args:
        queue: `sdtpu_queue`.
        shards: `sdtpu_tenant_shards`; 0 for `queue` alone.
    """
    return [queue, *(f"{queue}.t{n}" for n in range(shards))]


def tenant_queue(queue: str, tenant: str | None, shards: int) -> str:
    """Return the queue of a tenant's jobs, the same on every host and in every version; `queue` for no tenant.

    Args:
        queue: `sdtpu_queue`.
        tenant: the job's `tenant`.
        shards: `sdtpu_tenant_shards`; 0 for `queue` alone.
    """
    if tenant is None or not shards:
        return queue
    digest = hashlib.sha256(tenant.encode(errors="surrogatepass")).digest()
    return f"{queue}.t{int.from_bytes(digest[:8], 'big') % shards}"


def plain_client(client: Any) -> tuple[Any, str]:
    """Return a Redis client that leaves key names as they are, and the prefix to put before them.

    kombu's own client adds its `global_keyprefix` to the keys of some commands only.

    Args:
        client: the client of a kombu channel.
    """
    from redis import Redis

    prefix = getattr(client, "global_keyprefix", "")
    return (Redis(connection_pool=client.connection_pool), prefix) if prefix else (client, "")


def waiting_lists(channel: Any, queue: str, prefix: str = "") -> list[str]:
    """Return the Redis lists in which the messages of a queue wait: one for each band, the most urgent first.

    Args:
        channel: a kombu channel to Redis, which names the bands (kombu: `priority_steps`).
        queue: the queue.
        prefix: kombu's `global_keyprefix`.
    """
    return [prefix + channel._q_for_pri(queue, band) for band in channel.priority_steps]
