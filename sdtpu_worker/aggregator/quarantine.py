"""Quarantine: suspects run again apart from all other jobs, until the job that breaks device programs is alone. Pure.

A device program that fails does not say on which of its jobs it failed. So all jobs that had a slot are suspects.
They are halved, and each half gets the devices for itself. A half that fails is halved again. A job that started
alone and fails is at fault. With n suspects, one of them at fault, the devices fail about log2(n) more times, and
innocent jobs lose nothing but time.

Invariant: a job is in at most one group, and gets a slot only with its group. While a group runs, no job outside of
it has a slot: such a job was parked before, and resumes later. After a group, the jobs outside quarantine have the
devices for as long as the group had them, so that suspects cost other jobs at most half of the devices' time, however
many suspects there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

from sdtpu_worker.aggregator.jobs import Eligibility


class Quarantine:
    """The groups of suspects that wait, in order, and the group that runs."""

    def __init__(self) -> None:
        self._groups: deque[list[str]] = deque()
        self._running: list[str] = []
        self._avoid: dict[str, frozenset[int]] = {}  # devices that a job in a group of its own must not get
        self._started_alone = False  # the running group had one member from the start; the last one left is not alone
        self._group_since: float | None = None  # when the running group got the devices
        self._other_jobs_until = -math.inf

    def __len__(self) -> int:
        """Return how many jobs are in quarantine."""
        return len(self._running) + sum(map(len, self._groups))

    def add(self, task_id: str, avoid: Iterable[int] = ()) -> None:
        """Put a job into a group of its own, behind the groups that wait.

        Args:
            task_id: the job.
            avoid: devices on which it has failed; it is tried on another one.
        """
        self.discard(task_id)
        self._groups.append([task_id])
        self._avoid[task_id] = frozenset(avoid)

    def discard(self, task_id: str) -> None:
        """Forget a job that has ended. Unknown ids are ignored."""
        self._avoid.pop(task_id, None)
        for group in (self._running, *self._groups):
            if task_id in group:
                group.remove(task_id)
        self._groups = deque(filter(None, self._groups))

    def is_alone(self, task_id: str) -> bool:
        """Return whether the job has the devices for itself and has had since it started."""
        return self._started_alone and task_id in self._running

    def eligibility(self, devices_idle: bool, now: float, other_jobs: bool = False) -> Eligibility:
        """Return which jobs may have a slot now.

        Args:
            devices_idle: no job has a slot and no tick is in flight: the next group starts, if it is its turn.
            now: the time in seconds.
            other_jobs: there are jobs outside quarantine.
        """
        if self._running:
            return self._only_the_running_group()
        if self._group_since is not None:
            self._other_jobs_until, self._group_since = now + (now - self._group_since), None
        if not self._groups or (other_jobs and now < self._other_jobs_until):
            return Eligibility.all_but(chain.from_iterable(self._groups))
        if devices_idle:
            self._running, self._group_since = self._groups.popleft(), now
            self._started_alone = len(self._running) == 1
        return self._only_the_running_group()

    def failed(self, suspects: Sequence[str]) -> str | None:
        """Divide the suspects of a device program that failed into groups.

        Args:
            suspects: the jobs that had a slot.

        Returns:
            The job that is at fault, if that is proved. The other suspects are in groups now, before the groups that
            waited already.
        """
        if len(suspects) == 1 and self.is_alone(suspects[0]):
            self.discard(suspects[0])
            return suspects[0]
        rest = [task_id for task_id in self._running if task_id not in suspects]
        self._running = []
        for task_id in suspects:
            self.discard(task_id)
        half = (len(suspects) + 1) // 2
        groups = [list(suspects[:half]), list(suspects[half:]), rest]
        self._groups.extendleft(filter(None, reversed(groups)))
        return None

    def _only_the_running_group(self) -> Eligibility:
        avoid = self._avoid.get(self._running[0], ()) if len(self._running) == 1 else ()
        return Eligibility.only(self._running, avoid)
