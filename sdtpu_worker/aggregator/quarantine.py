"""Jobs that are tried again apart from all others, until the one that breaks device programs is alone. Pure.

A program that fails says nothing about which of its jobs it failed on. So all of them are suspects: they are halved,
and each half has the devices for itself; a half that fails is halved again; a job that fails when it started alone is
at fault. With n suspects, one of them at fault, the devices fail about log2(n) times more and nobody else pays with
more than time.

Invariant: a job is in at most one group, and gets a slot only with its group. While a group runs, nobody else has a
slot: who had one has left it, and goes on later from where it was. After a group the others have the devices for as
long as it had them, so that suspects cost others half of the devices' time at most, however many there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain

from sdtpu_worker.aggregator.jobs import Admission


class Quarantine:
    """The groups that wait, in order, and the one that runs."""

    def __init__(self) -> None:
        self._groups: deque[list[str]] = deque()
        self._running: list[str] = []
        self._runs_alone = False  # as it started: whoever is left of several was not alone
        self._since: float | None = None  # when the group that runs got the devices
        self._others_until = -math.inf

    def __len__(self) -> int:
        """Return how many jobs are in it."""
        return len(self._running) + sum(map(len, self._groups))

    def add(self, task_id: str) -> None:
        """Put a job into a group of its own, behind the others."""
        self.discard(task_id)
        self._groups.append([task_id])

    def discard(self, task_id: str) -> None:
        """Forget a job: it has ended. Unknown ids are ignored."""
        for group in (self._running, *self._groups):
            if task_id in group:
                group.remove(task_id)
        self._groups = deque(filter(None, self._groups))

    def is_alone(self, task_id: str) -> bool:
        """Whether the job has the devices for itself and has had since it started."""
        return self._runs_alone and task_id in self._running

    def admission(self, idle: bool, now: float, others: bool = False) -> Admission:
        """Return who may have a slot now.

        Args:
            idle: nobody has a slot and the devices are at nothing: the next group starts, if it is its turn.
            now: the time.
            others: there are jobs outside the quarantine.
        """
        if self._running:
            return Admission(frozenset(self._running), others=False)
        if self._since is not None:
            self._others_until, self._since = now + (now - self._since), None
        if not self._groups or (others and now < self._others_until):
            return Admission(frozenset(chain.from_iterable(self._groups)))
        if idle:
            self._running, self._since = self._groups.popleft(), now
            self._runs_alone = len(self._running) == 1
        return Admission(frozenset(self._running), others=False)

    def failed(self, suspects: Sequence[str]) -> str | None:
        """Take in that a device program failed.

        Args:
            suspects: the jobs that had a slot.

        Returns:
            The job that is at fault, if that is proved; the other suspects are in groups now, before those that were
            there.
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
