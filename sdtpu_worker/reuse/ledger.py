"""Pointers and leads in Redis: each question is one script, so that of two equal jobs only one takes the lead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.reuse.notes import MAX_LEAD_BYTES, MAX_POINTER_BYTES, Lead

if TYPE_CHECKING:
    from redis import Redis

LEAD_S = 6.0
"""Seconds that a lead lasts without renewal: after a worker's death another job draws the image."""
HANDED_OVER_S = 60.0
"""Seconds that the lead of a job lasts which is handed over with a snapshot: its message is the first of its queue."""


class Ledger:
    """What the workers of one broker know of each other's images and of the jobs that draw them. Any thread.

    Every method raises what the driver raises when Redis cannot be reached, or refuses.

    Args:
        connect: returns a client of the broker's Redis, with time-outs.
        keys: the names of the keys in Redis.
    """

    def __init__(self, connect: Callable[[], Redis], keys: Keys) -> None:
        self._connect, self._keys = connect, keys

    def enter(self, reuse_key: str, lead: Lead, take: bool = False, life_s: float = LEAD_S) -> tuple[bytes, bytes]:
        """Find what answers a job, else take the lead.

        Args:
            reuse_key: of the job.
            lead: the job's own.
            take: take the lead from another job that has it.
            life_s: how long the lead lasts without renewal.

        Returns:
            What the pointer is, and what another job's lead is; at most one of them is not empty. Where both are
            empty, the job has the lead. Both may come from anybody.
        """
        args = [lead.token, lead.to_bytes(), _ms(life_s), int(take), MAX_POINTER_BYTES + 1, MAX_LEAD_BYTES]
        args.append(_ms(HANDED_OVER_S))
        pointer, other = self._eval(scripts.REUSE_ENTER, self._both(reuse_key), args)
        return bytes(pointer), bytes(other)

    def leave(self, reuse_key: str, token: str, pointer: bytes = b"", lifetime_s: float = 1.0) -> None:
        """Give up the lead, if the job has it, after writing a pointer.

        Args:
            reuse_key: of the job.
            token: of the job.
            pointer: to the job's image; empty for none.
            lifetime_s: how long Redis keeps the pointer.
        """
        self._eval(scripts.REUSE_LEAVE, self._both(reuse_key), [token, pointer, _ms(lifetime_s)])

    def forget(self, reuse_key: str, pointer: bytes) -> None:
        """Remove a pointer to an image that is gone, unless it is another one by now."""
        self._eval(scripts.REUSE_FORGET, [self._keys.pointer(reuse_key)], [pointer])

    def renew(self, leads: Mapping[str, Lead]) -> None:
        """Keep leads, by reuse key; a lead that another job has taken stays with that job."""
        if leads:
            args = [_ms(LEAD_S), *(lead.to_bytes() for lead in leads.values())]
            self._eval(scripts.REUSE_RENEW, [self._keys.lead(key) for key in leads], args)

    def _both(self, reuse_key: str) -> list[str]:
        return [self._keys.pointer(reuse_key), self._keys.lead(reuse_key)]

    def _eval(self, script: str, keys: list[str], args: list[Any]) -> Any:
        return self._connect().eval(script, len(keys), *keys, *args)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
