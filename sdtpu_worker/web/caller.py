"""Who asks, and what it may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from sdtpu_worker.contract.queues import DEFAULT_PRIORITY
from sdtpu_worker.errors import InvalidRequest

MOST_URGENT, LEAST_URGENT = 0, 9


@dataclass(frozen=True)
class Caller:
    """Whoever sends requests.

    Attributes:
        name: of the key, or of the web app's user; empty where the door has no keys.
        priorities: the most and the least urgent priority that it may ask for.
        max_jobs: how many unfinished jobs it may have; 0 for any number.
    """

    name: str = ""
    priorities: tuple[int, int] = (MOST_URGENT, LEAST_URGENT)
    max_jobs: int = 0

    def priority(self, wanted: int | None, default: int | None) -> int:
        """Return a job's priority: the one that is wanted, or the default, moved into the caller's range.

        Raises:
            InvalidRequest: the caller may not ask for it.
        """
        low, high = self.priorities
        if wanted is None:
            return min(max(DEFAULT_PRIORITY if default is None else default, low), high)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not low <= wanted <= high:
            raise InvalidRequest(
                f"priority must be an integer from {low} (the most urgent) to {high}, got {wanted!r:.40}"
            )
        return wanted

    def tenant(self, wanted: str | None) -> str | None:
        """Return the tenant of a job: the caller itself, or whom it names where the door has no keys."""
        return self.name or wanted
