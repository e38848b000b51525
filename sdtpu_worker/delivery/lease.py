"""The thread that renews this worker's leases and redelivers the messages of workers that have died.

While the devices make progress, it renews the leases of all messages that this worker holds. It also sends Redis the
moves that could not be sent before, requeues deferred messages that are due, and sweeps: it redelivers messages whose
lease has expired. It sweeps only after a whole lease of unbroken contact with Redis. After an outage every worker has
therefore had the time to renew its leases first, and no job runs twice.

Workers that were paused together (SIGSTOP, a suspended machine) find each other's leases expired when they wake, and
so do all workers when Redis' clock is set forward. A lease that is renewed in time has half of it left: it is renewed
every third of it, at a pulse, and pulses are a sixth of it apart at most. So contact counts as broken when more than
half a lease passed unnoticed: when Redis' clock is further ahead than that of where this worker's own clock, at its
last pulse, let it expect it; or when its own clock is, since Redis' clock may have been set back meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from sdtpu_worker.delivery.deliveries import Deliveries

logger = logging.getLogger(__name__)

_PULSE_S, _SHORTEST_PULSE_S = 1.0, 0.02  # seconds between two pulses: at most, and at least


class Lease:
    """Renews, flushes, requeues and sweeps in a thread of its own until it is stopped.

    Args:
        deliveries: the messages that this worker holds.
        devices_make_progress: asked at each pulse; while it says False, no lease is renewed, so that other workers
            get this worker's messages.
        on_contact: called whenever Redis has answered.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        devices_make_progress: Callable[[], bool],
        on_contact: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliveries, self._devices_make_progress = deliveries, devices_make_progress
        self._on_contact, self._clock = on_contact, clock
        self._renew_at = 0.0
        self._renewed_at = clock()
        self._contact_since: float | None = None
        self._least_ahead_s = 0.0  # of Redis' clock before this worker's own, in this contact
        self._looked_at = clock()  # at the clocks
        self._unbroken_until = 0.0  # on Redis' clock: a later look finds the contact broken
        self._made_progress = True
        self._next_due_s: float | None = None
        self._deferred_until = math.inf  # on this worker's clock: the earliest of what was deferred since a pulse began
        self._sooner = threading.Event()
        deliveries.on_deferred = self._on_deferred
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sdtpu-lease", daemon=True)

    @property
    def interval_s(self) -> float:
        """Seconds between two renewals: a third of the lease."""
        return self._deliveries.lease_s / 3

    @property
    def age_s(self) -> float:
        """Seconds since the leases were renewed; before the first time, since this object was made. Any thread."""
        return self._clock() - self._renewed_at

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread; leases that are not acknowledged or requeued expire."""
        self._stopping.set()
        self._sooner.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def lose_contact(self) -> None:
        """Take note that another server has the messages now: no sweep until a whole lease of contact with it."""
        self._contact_since, self._renew_at = None, 0.0

    def pulse(self) -> None:
        """Do what is due now. An outage of Redis is logged, not raised."""
        progress, now = self._devices_make_progress(), self._clock()
        if progress != self._made_progress:
            self._made_progress = progress
            _log_progress(progress)
        try:
            self._do_what_is_due(now, progress)
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            if self._contact_since is not None:
                logger.warning("Redis does not answer, so this worker's leases are not renewed: %s", exc)
            self._contact_since, self._renew_at, self._next_due_s = None, 0.0, None
            return
        self._on_contact()

    def _do_what_is_due(self, now: float, progress: bool) -> None:
        """Renew first, so that what else fails costs this worker no lease; then flush, sweep and requeue."""
        self._look_at_clocks(now, self._deliveries.redis_time())
        may_sweep = False
        if progress and now >= self._renew_at:
            if gone := self._deliveries.renew():
                logger.warning("the leases of %d jobs that run here have expired: other workers run them as well",
                               len(gone))  # fmt: skip
            self._renew_at, self._renewed_at = now + self.interval_s, now
            may_sweep = self._contact_since is not None and now - self._contact_since >= self._deliveries.lease_s
        self._deliveries.flush()
        if may_sweep:
            self._deliveries.sweep(self._unbroken_until)
        self._deferred_until = math.inf  # what is deferred from here on may be found or not
        self._next_due_s = self._deliveries.requeue_due()
        if self._contact_since is None:
            self._contact_since = now

    def _look_at_clocks(self, now: float, redis_time: float) -> None:
        """Find out whether too much time has passed unnoticed since the last pulse.

        Args:
            now: on this worker's clock.
            redis_time: on Redis' clock, no earlier than `now`.
        """
        was_still = now - self._looked_at > self._deliveries.lease_s / 2 or redis_time > self._unbroken_until
        if self._contact_since is not None and was_still:
            logger.warning("this worker or Redis stood still, or Redis' clock was set forward, by more than half a"
                           " lease: every worker may renew its leases before this one sweeps again")  # fmt: skip
            self._contact_since, self._renew_at = None, 0.0
        self._looked_at, ahead_s = now, redis_time - now
        self._least_ahead_s = ahead_s if self._contact_since is None else min(self._least_ahead_s, ahead_s)
        self._unbroken_until = now + self._least_ahead_s + self._deliveries.lease_s / 2

    def _on_deferred(self, due_at: float) -> None:
        """Have the next pulse come in time for a message that was just deferred. Any thread.

        Args:
            due_at: seconds since 1970 on Redis' clock.
        """
        self._deferred_until = min(self._deferred_until, due_at - self._least_ahead_s)
        if self._deferred_until - self._clock() < _PULSE_S:
            self._sooner.set()

    def _wait(self) -> bool:
        """Wait for the next pulse; return False where there is none: the thread is to end."""
        until = self._clock() + self._pulse_s()
        while not self._stopping.is_set():
            soonest = max(self._deferred_until, self._clock() + _SHORTEST_PULSE_S)
            if not self._sooner.wait(max(min(until, soonest) - self._clock(), 0.0)):
                return not self._stopping.is_set()
            self._sooner.clear()
        return False

    def _run(self) -> None:
        while self._wait():
            try:
                self.pulse()
            except Exception:  # any error: the next pulse must still renew the leases
                logger.exception("the thread that renews the leases failed once and continues")

    def _pulse_s(self) -> float:
        """Return the seconds until the next pulse: a sixth of the lease at most, fewer when a message is due sooner."""
        until_due_s = _PULSE_S if self._next_due_s is None else max(self._next_due_s, _SHORTEST_PULSE_S)
        return min(_PULSE_S, self.interval_s / 2, until_due_s)


def _log_progress(progress: bool) -> None:
    if progress:
        logger.info("the devices make progress again: this worker renews its leases")
    else:
        logger.critical("the devices make no progress: this worker's leases are not renewed, so that other workers"
                        " take over its jobs")  # fmt: skip
