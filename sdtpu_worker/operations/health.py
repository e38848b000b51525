"""Two verdicts on this worker, from what its threads report: whether it is alive, and whether it is ready.

`live` fails when only a new process helps; `ready` fails whenever the worker takes no jobs. `health_http` answers
requests with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_PHASES = {
    "process": "starting Python and Celery",
    "settings": "looking at its settings",
    "broker": "looking at the broker",
    "store": "looking at the image store",
    "import": "importing JAX",
    "devices": "looking for devices",
    "checkpoint": "reading the configs",
    "programs": "loading or compiling programs",
    "weights": "waiting for the weights",
    "first_run": "running every program",
    "connection": "ready to consume",
}
"""Short names of what a worker does before it consumes, each with how `enter` is told of it."""


@dataclass(frozen=True)
class Check:
    """One part of a verdict: what was checked, whether it is well, and what was found."""

    name: str
    ok: bool
    detail: str


class WorkerHealth:
    """Takes the reports of the worker's threads and gives both verdicts. Any thread may report and ask.

    Args:
        lease_s: `sdtpu_lease_s`; the worker is not alive when Redis has not answered for longer.
        stall_s: `sdtpu_stall_s`; the worker is not alive when a tick is late by more.
        clock: monotonic seconds.
        process_s: how long the process had run before, the phase `process` of the start.

    Attributes:
        started: the worker has begun to consume; until then it loads, compiles, or waits for its broker.
        draining: the worker is stopping: it finishes its jobs or hands them over, and takes no more.
    """

    BEAT_READY_S, BEAT_LIVE_S = 5.0, 15.0
    """Seconds since the event loop's last turn up to which the worker is ready, and alive."""
    CONTACT_READY_S = 5.0
    """Seconds since Redis' last answer up to which the worker is ready."""
    RECONNECT_S = 30.0
    """Seconds allowed for connecting anew: more than the pause between two attempts and their time-outs."""

    def __init__(
        self, lease_s: float, stall_s: float, clock: Callable[[], float] = time.monotonic, process_s: float = 0.0
    ) -> None:
        self._lease_s, self._stall_s, self._clock = lease_s, stall_s, clock
        self._device: tuple[Callable[[], bool], Callable[[], float], Callable[[], Sequence[int]]] | None = None
        self._watches_redis = self._watches_event_loop = False
        self._beat_at = self._contact_at = 0.0
        self._disconnected_at: float | None = None
        self._refusal: str | None = None
        self._phase, self._phase_at = "looking at its settings", self._clock()
        self._start_s: dict[str, float] = {"process": process_s}
        self.started = self.draining = False

    def watch_device(
        self, is_alive: Callable[[], bool], stalled_s: Callable[[], float], lost: Callable[[], Sequence[int]] = tuple
    ) -> None:
        """Ask the device loop from now on: is its thread alive, how late is its tick (s), which devices are lost."""
        self._device = is_alive, stalled_s, lost

    def enter(self, phase: str) -> None:
        """Report what the worker does before it consumes, as in `starting: compiling`."""
        self._leave_phase()
        self._phase = phase

    def start_s(self) -> dict[str, float]:
        """Return the seconds that each phase of the start took, up to now, by its name in `START_PHASES`."""
        phase, seconds = self._phase_name(), self._start_s.copy()
        if not self.started:
            seconds[phase] = seconds.get(phase, 0.0) + self._clock() - self._phase_at
        return seconds

    def start_text(self) -> str:
        """Return the phases of the start that took a tenth of a second or more, with their seconds, as a text."""
        seconds = self.start_s()
        phases = ", ".join(f"{name} {each:.1f}" for name, each in seconds.items() if each >= 0.1)
        return f"{sum(seconds.values()):.1f} s ({phases})"

    def _phase_name(self) -> str:
        """Return the short name of the phase; `other` for one of another engine."""
        return next((name for name, words in START_PHASES.items() if self._phase.startswith(words)), "other")

    def _leave_phase(self) -> None:
        now, phase = self._clock(), self._phase_name()
        self._start_s[phase] = self._start_s.get(phase, 0.0) + now - self._phase_at
        self._phase_at = now

    def watch_redis(self) -> None:
        """Expect that Redis is heard of from now on. A worker with another broker has nothing to report of it."""
        self._watches_redis = True

    def watch_event_loop(self) -> None:
        """Expect a beat at least once a second from now on. Celery has no event loop for some brokers."""
        self._watches_event_loop = True
        self.beat()

    def beat(self) -> None:
        """Report that Celery's event loop turns; to be called at least once a second."""
        self._beat_at = self._clock()

    def contact(self) -> None:
        """Report that Redis has answered, a claim or a renewal of the leases."""
        self._contact_at = self._clock()

    def on_claim(self, refusal: str | None) -> None:
        """Report that Redis has answered a claim: with None, or with an error, so that the worker takes no jobs."""
        self.contact()
        self._refusal = refusal

    def on_consume(self) -> None:
        """Report that the consumer starts, for the first time or after the connection was lost."""
        self.beat()
        if not self.started:
            self.contact()
            self._leave_phase()
        self.started, self._disconnected_at, self._refusal = True, None, None

    def on_disconnect(self) -> None:
        """Report that the connection is lost: Celery's event loop does not turn until Redis is back."""
        if self._disconnected_at is None:
            self._disconnected_at = self._clock()

    def drain(self) -> None:
        """Report that the worker stops: its main thread only waits for its jobs from now on."""
        self.draining = True

    def live(self) -> list[Check]:
        """Return the checks that decide whether this process should keep running."""
        if self.draining:
            return [Check("serving", True, "stopping: the worker finishes its jobs or hands them over")]
        if not self.started:
            return [Check("serving", True, self._starting()), self._check_device()]
        return [
            self._check_device(),
            *self._check_event_loop(self.BEAT_LIVE_S, self._lease_s + self.RECONNECT_S),
            *self._check_redis(max(self._lease_s, self.CONTACT_READY_S)),
        ]

    def ready(self) -> list[Check]:
        """Return the checks that decide whether this worker takes jobs."""
        if self.draining:
            return [Check("serving", False, "stopping: the worker takes no more jobs")]
        if not self.started:
            return [Check("serving", False, self._starting()), self._check_device()]
        return [
            Check("serving", True, f"started in {self.start_text()}"),
            self._check_device(),
            *self._check_event_loop(self.BEAT_READY_S, self.CONTACT_READY_S),
            *self._check_redis(self.CONTACT_READY_S, self._refusal),
        ]

    def _starting(self) -> str:
        return f"starting: {self._phase}, for {self._clock() - self._phase_at:.0f} s"

    def _check_device(self) -> Check:
        if self._device is None:
            return Check("device", not self.started, "the device loop has not started yet")
        is_alive, stalled_s, lost = self._device
        if not is_alive():
            return Check("device", False, "the device loop has ended")
        late_s = stalled_s()
        if late_s > self._stall_s:
            return Check("device", False, f"the device is hung: a tick is {late_s:.0f} s late (sdtpu_stall_s)")
        detail = f"a tick is {late_s:.0f} s late" if late_s >= 1 else "on time"
        if numbers := ", ".join(map(str, lost())):
            detail += f"; lost, and without jobs until the worker is started anew: device {numbers}"
        return Check("device", True, detail)

    def _check_event_loop(self, limit_s: float, away_limit_s: float) -> Iterator[Check]:
        if self._disconnected_at is not None:  # it does not turn now; the lease's thread may have reached Redis already
            away_s = self._clock() - self._disconnected_at
            yield Check("event_loop", away_s <= away_limit_s, f"connecting to the broker for {away_s:.0f} s")
        elif self._watches_event_loop:
            age_s = self._clock() - self._beat_at
            yield Check("event_loop", age_s <= limit_s, f"the event loop turned {age_s:.0f} s ago")

    def _check_redis(self, limit_s: float, refusal: str | None = None) -> Iterator[Check]:
        age_s = self._clock() - self._contact_at
        if not self._watches_redis:
            return
        if age_s > limit_s:
            yield Check("redis", False, f"not consuming: no answer from Redis for {age_s:.0f} s")
        elif refusal is not None:
            yield Check("redis", False, f"not consuming: Redis refuses to give jobs to this worker: {refusal}")
        else:
            yield Check("redis", True, f"answered {age_s:.0f} s ago")


def process_age_s() -> float:
    """Return the seconds since this process was started; 0 where the system does not say it as Linux does."""
    try:
        facts = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started = int(facts[19]) / os.sysconf("SC_CLK_TCK")  # in seconds since the machine's start
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
