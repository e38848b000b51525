"""What the queues and workers are at, for any number of open pages: one reader in a process, while somebody looks."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import RedisError

from sdtpu_worker.client.live_state import LiveState
from sdtpu_worker.errors import SdtpuError
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.problems import Refusal

logger = logging.getLogger(__name__)

EVERY_S = 1.0
"""Seconds between two looks."""


class LiveFeed:
    """Reads the live state once a second while it is watched, and at most as often when it is asked for.

    Belongs to one event loop.

    Args:
        read: returns the state as it is now.

    Attributes:
        reads: how often it was read.
    """

    def __init__(self, read: Callable[[], Awaitable[LiveState]]) -> None:
        self._read = read
        self.reads = 0
        self._state: LiveState | None = None
        self._version, self._read_at, self._is_failing = 0, -math.inf, False
        self._reading, self._changed = asyncio.Lock(), asyncio.Event()
        self._watchers, self._task = 0, None  # type: int, asyncio.Task[None] | None

    async def read(self) -> LiveState | None:
        """Return the state, at most a second old; None while it cannot be read."""
        async with self._reading:
            if time.monotonic() - self._read_at >= EVERY_S:
                await self._look()
        return self._state

    async def next_state(self, seen: int, timeout_s: float) -> tuple[int, LiveState | None] | None:
        """Return a state's number, and the state, as soon as it is another one than was seen; None after some time.

        Args:
            seen: the number of the last one; 0 for none.
            timeout_s: seconds.
        """
        if self._task is None or self._task.done():
            # In a context of its own: the watcher's request is over sooner.
            self._task = asyncio.create_task(self._follow(), context=contextvars.Context())
        self._watchers += 1
        try:
            async with asyncio.timeout(timeout_s):
                while self._version == seen:
                    await self._changed.wait()
        except TimeoutError:
            return None
        finally:
            self._watchers -= 1
        return self._version, self._state

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            async with self._reading:  # else a thread would still read for a loop that has ended
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        """Read as long as there are watchers; one that comes later begins anew."""
        idle = 0
        while idle < 2:
            await self.read()
            await asyncio.sleep(EVERY_S)
            idle = 0 if self._watchers else idle + 1

    async def _look(self) -> None:
        self.reads += 1
        state: LiveState | None = None
        try:
            state = await self._read()
            self._is_failing = False
        except (SdtpuError, RedisError, OSError, Refusal) as exc:
            if not self._is_failing:
                logger.warning("what the workers are at cannot be shown for now: %s", exc)
            self._is_failing = True
        self._read_at = time.monotonic()
        if state != self._state or not self._version:
            self._state, self._version = state, self._version + 1
            self._changed.set()
            self._changed = asyncio.Event()


def of_batch(state: LiveState | None, own: Any) -> dict[str, Any]:
    """Return the device batch as one caller may see it: another caller's slot is `busy`, and hosts have no names.

    Args:
        state: what the queues and workers are at; None where that is not known.
        own: the ids of the caller's jobs.
    """
    if state is None:
        return {"known": False, "hosts": [], "slots": 0, "busy": 0, "waiting": 0}
    hosts = [_host(state, worker, number, own) for number, worker in enumerate(state.workers, 1)]
    return {
        "known": True,
        "hosts": hosts,
        "slots": sum(host["slots"] for host in hosts),
        "busy": sum(host["busy"] for host in hosts),
        "waiting": state.waiting,
    }


def wait_of(state: LiveState | None, caller: Caller, record: JobRecord) -> dict[str, Any] | None:
    """Return where a job waits in Redis: how many jobs are `ahead`, and `eta_s` to its image.

    Args:
        state: what the queues and workers are at; None where that is not known.
        caller: whose job it is.
        record: of the job.

    Returns:
        None where that is not known, or the job does not wait in Redis any more.
    """
    if state is None:
        return None
    wait = state.find_wait(record.parameters, caller.tenant(record.parameters.get("tenant")), record.created_at)
    return None if wait is None else {"ahead": wait.ahead, "eta_s": wait.eta_s}


def _host(state: LiveState, worker: Any, number: int, own: Any) -> dict[str, Any]:
    """Return one host: its devices with their slots, those of the sizes in use beside each other."""
    report = state.slots.get(worker.host)
    held = min(sum(worker.held.values()), worker.num_slots)
    shown: dict[str, Any] = {"name": f"host {number}", "slots": worker.num_slots, "busy": held, "devices": []}
    if report is None:
        return shown
    used = {slot.size for slot in report.occupied}
    sizes = [size for size in report.sizes if size in used] or list(report.sizes[:1])
    devices = [[None] * (report.slots_per_device * len(sizes)) for _ in range(report.num_devices)]  # type: Any
    for slot in report.occupied:
        if slot.size in sizes:
            column = sizes.index(slot.size) * report.slots_per_device + slot.slot
            devices[slot.device][column] = slot.task_id if slot.task_id in own else "busy"
    shown["busy"] = len(report.occupied)
    shown["devices"] = [
        {"lost": device in report.lost, "slots": slots} for device, slots in enumerate(devices)
    ]  # fmt: skip
    return shown
