"""The thread that keeps a worker's messages its own, and gives back those of workers that are gone.

It renews the leases as long as the devices make progress, tells Redis what it could not be told before, brings jobs
whose time has come to the front of their queues, and puts messages whose lease has ended back into theirs. It does the
last only after a whole lease of unbroken contact with Redis: after an outage every worker has had the time to renew
first, so that nothing runs twice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from sdtpu_worker.delivery.deliveries import Deliveries

logger = logging.getLogger(__name__)

_PULSE_S, _SHORTEST_PULSE_S = 1.0, 0.02


class Lease:
    """Renews, flushes and sweeps in a thread of its own until it is stopped.

    Args:
        deliveries: what the worker holds.
        is_well: whether the devices make progress; while they do not, nothing is renewed and others take over.
        on_contact: told whenever Redis answered.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        deliveries: Deliveries,
        is_well: Callable[[], bool],
        on_contact: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deliveries, self._is_well, self._on_contact, self._clock = deliveries, is_well, on_contact, clock
        self._renew_at = 0.0
        self._contact_since: float | None = None
        self._was_well = True
        self._next_due_s: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sdtpu-lease", daemon=True)

    @property
    def interval_s(self) -> float:
        """Seconds between two renewals."""
        return self._deliveries.lease_s / 3

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread; the leases end by themselves."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def pulse(self) -> None:
        """Do what is due now; an outage of Redis is noted, not raised."""
        well, now = self._is_well(), self._clock()
        if well != self._was_well:
            self._was_well = well
            _log_progress(well)
        try:
            self._deliveries.flush()
            if well and now >= self._renew_at:
                if gone := self._deliveries.renew():
                    logger.warning("%d jobs that run here have gone to another worker as well", len(gone))
                self._renew_at = now + self.interval_s
                if self._contact_since is not None and now - self._contact_since >= self._deliveries.lease_s:
                    self._deliveries.sweep()
            self._next_due_s = self._deliveries.bring_due()
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            if self._contact_since is not None:
                logger.warning("no contact with Redis, the leases are not renewed: %s", exc)
            self._contact_since, self._renew_at, self._next_due_s = None, 0.0, None
            return
        self._on_contact()
        if self._contact_since is None:
            self._contact_since = now

    def _run(self) -> None:
        while not self._stopping.wait(self._pulse_s()):
            try:
                self.pulse()
            except Exception:  # whatever it is, the leases must go on
                logger.exception("a pulse of the lease failed")

    def _pulse_s(self) -> float:
        """Return the time until the next pulse: sooner when a job is due sooner."""
        until_due_s = _PULSE_S if self._next_due_s is None else max(self._next_due_s, _SHORTEST_PULSE_S)
        return min(_PULSE_S, self.interval_s, until_due_s)


def _log_progress(well: bool) -> None:
    if well:
        logger.info("the devices make progress again")
    else:
        logger.critical("the devices make no progress: their jobs' leases are not renewed, other workers take over")
