"""Fair shares: jobs of many tenants spread over a few queues, which a worker serves in turn.

One Redis list is first come, first served, so a tenant with ten thousand jobs would stand before everybody else. The
number of queues is fixed, so tenants need not be known; two that share a queue share its turn.
"""

from __future__ import annotations

import hashlib


def shard_queues(queue: str, shards: int) -> list[str]:
    """Return the queues that a worker consumes: its own, then `queue.t0`, `queue.t1`, …

    Args:
        queue: `sdtpu_queue`.
        shards: `sdtpu_tenant_shards`; 0 for `queue` alone.
    """
    return [queue, *(f"{queue}.t{n}" for n in range(shards))]


def tenant_queue(queue: str, tenant: str | None, shards: int) -> str:
    """Return the queue of a tenant's jobs, the same on every host and in every version; `queue` for no tenant."""
    if tenant is None or not shards:
        return queue
    digest = hashlib.sha256(tenant.encode(errors="surrogatepass")).digest()
    return f"{queue}.t{int.from_bytes(digest[:8], 'big') % shards}"
