"""The leads that this worker's jobs have: renewed by a thread of their own while the devices make progress."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sdtpu_worker.operations.prompt_guard import describe
from sdtpu_worker.reuse.ledger import LEAD_S, Ledger
from sdtpu_worker.reuse.notes import Lead

logger = logging.getLogger(__name__)

RENEW_EVERY_S = LEAD_S / 6


class Leads:
    """Renews leads until it is closed. Any thread.

    Args:
        ledger: where they are kept.
        devices_make_progress: asked before each renewal; while it says False, other workers' jobs may draw.
        every_s: seconds between two renewals.
    """

    def __init__(
        self, ledger: Ledger, devices_make_progress: Callable[[], bool], every_s: float = RENEW_EVERY_S
    ) -> None:
        self._ledger, self._devices_make_progress, self._every_s = ledger, devices_make_progress, every_s
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._leads: dict[str, Callable[[], Lead]] = {}
        self._thread = threading.Thread(target=self._run, name="sdtpu-reuse", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; leads that are left expire."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LEAD_S)

    def add(self, reuse_key: str, lead: Callable[[], Lead]) -> None:
        """Renew a lead from now on.

        Args:
            reuse_key: of the job.
            lead: returns the lead as it is now.
        """
        with self._lock:
            self._leads[reuse_key] = lead

    def remove(self, reuse_key: str, lead: Callable[[], Lead]) -> None:
        """Renew a lead no longer; that of another job of this worker with the same reuse key stays."""
        with self._lock:
            if self._leads.get(reuse_key) is lead:
                del self._leads[reuse_key]

    def pulse(self) -> None:
        """Renew now. A failure is logged: the leads expire if it lasts, and equal jobs draw for themselves."""
        with self._lock:
            leads = dict(self._leads)
        if not leads or not self._devices_make_progress():
            return
        try:
            self._ledger.renew({key: lead() for key, lead in leads.items()})
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            logger.debug("the leads of %d jobs could not be renewed: %s", len(leads), describe(exc))

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            self.pulse()
