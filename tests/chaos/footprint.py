"""What a worker takes up, in its host and in Redis, to be compared before and after."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.chaos.fleet import WorkerProcess, keys_left, wait_until_no_key_is_left
from tests.support.waiting import wait_until


@dataclass(frozen=True)
class Footprint:
    """What was found: memory in KiB, threads, open files, its connections in Redis' list, keys of unended jobs."""

    memory_kib: int
    threads: int
    files: int
    connections: int
    keys: tuple[str, ...]


def footprint(worker: WorkerProcess, client: redis.Redis) -> Footprint:
    """Measure a worker."""
    return Footprint(
        worker.memory_kib(),
        worker.threads(),
        len(list(Path(f"/proc/{worker.process.pid}/fd").iterdir())),
        len(connections(worker, client)),
        tuple(keys_left(client)),
    )


def settled(worker: WorkerProcess, client: redis.Redis, before: Footprint, slots: int = 4) -> Footprint:
    """Measure a worker when all but its memory is as before, or when half a minute is over; see `is_as_before`."""
    deadline = time.monotonic() + 30
    while not is_as_before(before, now := footprint(worker, client), slots) and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def is_as_before(before: Footprint, after: Footprint, slots: int = 4) -> bool:
    """Return whether nothing was added but what the worker may need at its busiest: threads and pooled connections.

    Args:
        before, after: what is compared.
        slots: of the worker; its pool has a thread for each beside those for its prefetch limit, started when needed.
    """
    return (
        after.keys == before.keys
        and after.threads <= before.threads + slots
        and after.connections <= before.connections + 10
        and after.files <= before.files + 12
    )


def difference(before: Footprint, after: Footprint) -> str:
    """Return what has changed, in words."""
    return (
        f"threads {before.threads} to {after.threads}, files {before.files} to {after.files}, connections of Redis"
        f" {before.connections} to {after.connections}, no keys left"
    )


def pool_stats(app: Any, timeout_s: float = 60) -> dict[str, Any]:
    """Return what the only worker says of its pool."""
    answers = wait_until(app.control.inspect(timeout=2, limit=1).stats, "the worker to answer", timeout_s)
    return next(iter(answers.values()))["pool"]["sdtpu"]


def assert_nothing_left(app: Any, client: redis.Redis, timeout_s: float = 60) -> None:
    """Assert that no job has left anything in Redis or in the worker."""
    wait_until_no_key_is_left(client, timeout_s)
    wait_until(lambda: pool_stats(app)["deliveries"]["held"] == 0, "the worker to hold nothing", timeout_s)


def connections(worker: WorkerProcess, client: redis.Redis) -> list[str]:
    """Return the ids of the connections that Redis has with a worker on this host."""
    proc = Path(f"/proc/{worker.process.pid}")
    sockets = set()
    for link in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(link.readlink()))
    rows = [line.split() for line in (proc / "net/tcp").read_text().splitlines()[1:]]
    ports = {int(row[1].partition(":")[2], 16) for row in rows if f"socket:[{row[9]}]" in sockets}
    return [each["id"] for each in client.client_list() if int(each["addr"].rpartition(":")[2]) in ports]


def drop_connections(worker: WorkerProcess, client: redis.Redis) -> None:
    """Have Redis close every connection of a worker."""
    for number in connections(worker, client):
        client.client_kill_filter(_id=number)
