"""One device loop in virtual time and one thread: a seed decides what happens between any two of its steps.

The loop's own code runs, on the fake engine. Where its thread would sleep, the world moves the clock on to the next
event: a job comes or is cancelled, a tick ends, the worker drains. Whenever the loop looks at the clock, an event that
is due may happen too, as other threads make it. So the same history always runs the same way.
"""

from __future__ import annotations

import copy
import heapq
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Overdue, Terms
from sdtpu_worker.aggregator.plan import Plan
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.stages import LoopStage
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue, Submission
from sdtpu_worker.errors import EngineUnavailable, GenerationFailed
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob, FakeSnapshot, FakeTick

LANES = ((64, 64), (64, 128))
_PATIENCE_S = 5.0
_MOST_TURNS, _MOST_LOOKS = 3_000, 30_000


@dataclass(frozen=True)
class Wish:
    """A job that comes at a time.

    Attributes:
        kind: well, poison (it breaks every program), nan, alone (it shares the devices with nobody), moved (it comes
            with a snapshot from another worker) or forged (with one that has a NaN).
        cancelled_s: seconds after it comes until it is cancelled.
    """

    at: float
    steps: int
    lane: int = 0
    priority: int = 6
    kind: str = "well"
    cancelled_s: float = math.inf
    expires_s: float = math.inf
    limit_s: float = math.inf


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with a call of the engine, or from it on.

    Attributes:
        call: the number of the call of `execute`.
        kind: dispatch (it raises), late (its tick raises), slow (its tick takes 50 s), hang (its tick never ends),
            lost (all devices are), nan or raise (a device is sick from then on), well (the device is well again).
        device: which one is sick or well.
        unseen: the sick device draws the reference image nevertheless.
    """

    call: int
    kind: str
    device: int = 0
    unseen: bool = False


@dataclass(frozen=True)
class History:
    """What happens, apart from the moments between: `seed` draws those.

    Attributes:
        drains: `(at, grace)` in seconds, for every call of `drain`.
    """

    seed: int
    devices: int
    slots: int
    wishes: tuple[Wish, ...]
    faults: tuple[Fault, ...] = ()
    drains: tuple[tuple[float, float], ...] = ()


class HistoryEngine(FakeEngine):
    """A `FakeEngine` whose faults come as the history has them, and which looks at what it is told to do."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.slow: set[int] = set()
        self.hung: set[int] = set()

    def execute(self, plan: Plan, jobs: Mapping[str, Any], snapshots: Any = None) -> FakeTick:
        """Follow a plan."""
        try:
            self._look_at(plan)
        except AssertionError as exc:  # to the loop that is only a device that failed
            self.world.broken = self.world.broken or exc
        for fault in self.world.history.faults:
            if fault.call == self.calls:
                self._break(fault)
        self.world.clock()
        tick = super().execute(plan, jobs, snapshots)
        self.world.clock()
        return tick

    def _look_at(self, plan: Plan) -> None:
        for device in self.world.loop.stats.lost_devices:
            assert not plan.devices[device], "a lost device has something to do"
            assert not any(place.device == device for place in (*plan.parked, *plan.resumed))
        assert self.world.announced.issuperset(plan.placed()), "a job has a slot and was not announced"

    def _break(self, fault: Fault) -> None:
        calls = {"dispatch": "fail_at", "late": "fail_late_at", "lost": "fatal_at"}
        if fault.kind in calls:
            setattr(self, calls[fault.kind], (*getattr(self, calls[fault.kind]), fault.call))
        elif fault.kind in ("slow", "hang"):
            (self.slow if fault.kind == "slow" else self.hung).add(fault.call)
        else:
            sick: dict[str, set[int]] = {"nan": set(self.nan_devices), "raise": set(self.raising_devices)}
            for devices in sick.values():
                devices.discard(fault.device)
            if fault.kind in sick:
                sick[fault.kind].add(fault.device)
            self.nan_devices, self.raising_devices = sick["nan"], sick["raise"]
            self.unseen = {*self.unseen, fault.device} if fault.unseen else {*self.unseen} - {fault.device}


class VirtualLock:
    """Stands for the inbox's lock: only one thread is there, and to wait is to let the world go on."""

    def __init__(self, sleep: Callable[[float | None], None]) -> None:
        self._sleep, self.depth = sleep, 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1

    def wait(self, seconds: float | None = None) -> None:
        """Let the world go on."""
        depth, self.depth = self.depth, 0
        self._sleep(seconds)
        self.depth = depth

    def notify_all(self) -> None:
        """Do nothing: nobody else waits."""


class World:
    """Runs one history, and looks at how its jobs ended.

    Attributes:
        ended: by task id, how often a job ended.
        announced: the jobs whose start was announced.
    """

    def __init__(self, history: History) -> None:
        self.history, self.now, self.turns, self.looks = history, 0.0, 0, 0
        self.chance = random.Random(history.seed)
        self.submissions: dict[str, Submission] = {}
        self.ended: Counter[str] = Counter()
        self.announced: set[str] = set()
        self.broken: BaseException | None = None
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._number, self._busy_until, self._in_event = 0, 0.0, True
        self.lock = VirtualLock(self.sleep)
        self.engine = HistoryEngine(self)
        costs = {lane: TickCosts(history.devices, Cost(0.02, 0.005, 0.03)) for lane in LANES}
        self._durations = copy.deepcopy(costs)  # the policy corrects its own
        policy = Aggregator(costs, history.slots, history.slots + 1, 0.1)
        self.loop = DeviceLoop(
            self.engine,
            policy,
            self._die,
            clock=self.clock,
            on_start=lambda task_ids, alone: self.announced.update(task_ids),
            patience_s=_PATIENCE_S,
        )
        self._in_event = False
        self.loop._inbox.lock = self.lock  # type: ignore[assignment]  # stands for threading.Condition
        for i, wish in enumerate(history.wishes):
            self.at(wish.at, partial(self._come, str(i), wish))
        for at, grace_s in history.drains:
            self.at(at, partial(self._drain, grace_s))

    def at(self, at: float, action: Callable[[], object]) -> None:
        """Have something happen at a time."""
        self._number += 1
        heapq.heappush(self._events, (at, self._number, action))

    def clock(self) -> float:
        """Return the time in seconds; some of what is due by then may happen first."""
        if not self.lock.depth and not self._in_event:
            self.looks += 1
            assert self.looks < _MOST_LOOKS, "the loop goes on for ever"
            self.now += self.chance.choice((0.0, 0.0, 1e-4, 0.003))
            self._watch_ticks()
            while self._events and self._events[0][0] <= self.now and self.chance.random() < 0.5:
                self._happen()
        return self.now

    def sleep(self, seconds: float | None) -> None:
        """Let time pass until the next event, or for this many seconds."""
        self.turns += 1
        assert self.turns < _MOST_TURNS, "the loop goes on for ever"
        self._watch_ticks()
        until = math.inf if seconds is None else self.now + seconds
        if self._events and self._events[0][0] <= until:
            self.now = max(self.now, self._events[0][0])
            self._happen()
        elif until < math.inf:
            self.now = until
        else:
            self._come_to_an_end()

    def run(self) -> None:
        """Run the history to its end, and check everything."""
        self.loop._run()
        while self._events:  # a job that comes too late ends too
            self._happen()
        self.loop.close()
        if self.broken is not None:
            raise self.broken
        for i, wish in enumerate(self.history.wishes):
            self._check(str(i), wish)
        assert self.ended == Counter(dict.fromkeys(self.submissions, 1))
        assert len(self.submissions) == len(self.history.wishes)
        assert self.loop.stats.images == sum(not s.future.exception() for s in self.submissions.values())
        self._check_devices()

    def _die(self) -> None:
        """Look at why the loop died, which only lost devices may be the cause of."""
        error = sys.exc_info()[1]
        last = isinstance(error, EngineUnavailable) and len(self.loop.stats.lost_devices) == self.history.devices
        if not (last or self.engine.is_lost):
            self.broken = self.broken or error

    def _come(self, task_id: str, wish: Wish) -> None:
        step = wish.steps // 2 if wish.kind in ("moved", "forged") else 0
        value = 1000 * int(task_id)
        snapshot = None
        if step:
            snapshot = FakeSnapshot(task_id, -1 if wish.kind == "forged" else value + step, step, wish.steps - step)
        for kind in ("poison", "nan"):
            if wish.kind == kind:
                setattr(self.engine, kind, getattr(self.engine, kind) | {task_id})
        terms = Terms(wish.priority, self.now + wish.expires_s, wish.limit_s)
        job = FakeJob(task_id, wish.steps, LANES[wish.lane], value)
        try:
            submission = self.loop.submit(job, terms, snapshot=snapshot, alone=wish.kind == "alone")
        except EngineUnavailable as exc:
            submission = Submission.of(job, terms, bool, None, False, self.now)
            submission.settle(exc)
        self.submissions[task_id] = submission
        submission.future.add_done_callback(lambda _: self.ended.update([task_id]))
        if wish.cancelled_s < math.inf:
            self.at(self.now + wish.cancelled_s, partial(self.loop.cancel, task_id))

    def _drain(self, grace_s: float) -> None:
        self.loop.drain(grace_s)
        self.at(self.now + grace_s + _PATIENCE_S, self._give_up)

    def _give_up(self) -> None:
        """Do what the watching thread does when the deadline is over."""
        if not self.loop._inbox.is_closed:
            self.loop._give_up_in_time()

    def _watch_ticks(self) -> None:
        """Have the ticks end that were dispatched, one after the other."""
        while not self.loop._ticks._to_wait_for.empty():
            tick = self.loop._ticks._to_wait_for.get()
            if tick is None:
                return
            call = self.engine.calls - 1
            if call in self.engine.hung:
                self._busy_until = math.inf
            usual_s = self._durations[tick.plan.lane].tick_s(tick.plan) * self.chance.uniform(0.6, 1.8)
            self._busy_until = max(self.now, self._busy_until) + (50.0 if call in self.engine.slow else usual_s)
            if self._busy_until < math.inf:
                self.at(self._busy_until, partial(self.loop._ticks._wait_for, tick))

    def _happen(self) -> None:
        _, _, action = heapq.heappop(self._events)
        self._in_event = True
        action()
        self._in_event = False

    def _come_to_an_end(self) -> None:
        """Close the loop, which sleeps for good; when its devices hang it drains before."""
        left = [task_id for task_id, submission in self.submissions.items() if not submission.future.done()]
        if left and self._busy_until == math.inf and self.loop.stage is LoopStage.RUNNING:
            self._drain(0.0)
            return
        assert not left, f"the loop sleeps for ever, and these jobs have not ended: {', '.join(left)}"
        self.loop._inbox.close()

    def _check(self, task_id: str, wish: Wish) -> None:
        """Look at how a job ended."""
        future, number = self.submissions[task_id].future, 1000 * int(task_id)
        error = future.exception(0)
        if error is None:
            assert wish.kind not in ("poison", "nan")
            assert future.result().pixels == number + wish.steps
        elif isinstance(error, JobHandedOver):
            is_hung = any(fault.kind == "hang" for fault in self.history.faults)
            is_lost = self.engine.is_lost or len(self.loop.stats.lost_devices) == self.history.devices
            assert self.history.drains or is_hung or is_lost, "a job was handed over without need"
            if isinstance(error.snapshot, FakeSnapshot):
                assert error.snapshot.value == number + error.snapshot.step
        elif isinstance(error, JobCancelled):
            assert wish.cancelled_s < math.inf
        elif isinstance(error, JobOverdue):
            assert min(wish.expires_s, wish.limit_s) < math.inf
            assert error.reason is not Overdue.EXPIRED or task_id not in self.announced, "it had its slot in time"
        else:
            assert isinstance(error, GenerationFailed)
            assert wish.kind in ("poison", "nan", "alone") or self._may_look_guilty(), "an innocent job was blamed"

    def _may_look_guilty(self) -> bool:
        """Return whether the faults are such that a job may fail on two devices, each time by another's fault."""
        passing = sum(fault.kind in ("dispatch", "late") for fault in self.history.faults)
        passing += any(wish.kind == "poison" for wish in self.history.wishes)  # it fails others' programs, too
        sick = [fault for fault in self.history.faults if fault.kind in ("nan", "raise")]
        hidden = {fault.device for fault in sick if fault.unseen or self._is_well_again(fault)}
        return passing + len(hidden) > 1 or (bool(hidden) and self.history.devices - len({f.device for f in sick}) < 1)

    def _is_well_again(self, sick: Fault) -> bool:
        return any(f.device == sick.device and f.call >= sick.call and f != sick for f in self.history.faults)

    def _check_devices(self) -> None:
        """Look at which devices were lost."""
        lost = self.loop.stats.lost_devices
        assert len(set(lost)) == len(lost)
        sick = {fault.device for fault in self.history.faults if fault.kind in ("nan", "raise")}
        passing = sum(fault.kind in ("dispatch", "late") for fault in self.history.faults)
        poison = sum(wish.kind in ("poison", "nan") for wish in self.history.wishes)
        if not passing and not poison:
            assert set(lost) <= sick, "a device that works is lost"
