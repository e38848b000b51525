"""What Redis keeps for reuse: of a finished image a pointer, of a job that draws for all equal ones a lead.

Others may be able to write there. So both are read within bounds, and neither holds a place: a pointer names a task,
and where that task's image lies is for the worker's own image store to say.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass

from sdtpu_worker.contract.result import BatchPlace

MAX_POINTER_BYTES, MAX_LEAD_BYTES = 2048, 256
"""More of one is not read."""
CLOCKS_APART_S = 1.0
"""By how much two jobs' `expires` may differ and count as the same: clients' clocks do."""
_MAX_ID_CHARACTERS, _MAX_NUMBER = 255, 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEAD = re.compile(
    r"(?P<token>[0-9a-f]{32}) (?P<priority>[0-9]{1,3}) (?P<expires>[0-9.]{1,24}|inf) (?P<flags>[01] [01])"
    r" (?P<current>[0-9]{1,5}) (?P<total>[0-9]{1,5}) (?P<eta>[0-9]{1,12}|-)"
)


@dataclass(frozen=True)
class Pointer:
    """Which task's stored image answers equal jobs, and what it must be.

    Attributes:
        task_id: names the image in the store.
        num_bytes: the size of the encoded image.
        sha256: of the encoded image.
        nsfw: the safety checker's verdict; None without a checker.
        batch: the device and the slot that made the image.
    """

    task_id: str
    num_bytes: int
    sha256: str
    nsfw: bool | None
    batch: BatchPlace

    @classmethod
    def of(cls, task_id: str, data: bytes, nsfw: bool | None, batch: BatchPlace) -> Pointer:
        """Return the pointer to a task's encoded image."""
        return cls(task_id, len(data), hashlib.sha256(data).hexdigest(), nsfw, batch)

    def names(self, data: bytes) -> bool:
        """Return whether these bytes are the image, whole and undamaged."""
        return len(data) == self.num_bytes and hashlib.sha256(data).hexdigest() == self.sha256

    def to_bytes(self) -> bytes:
        """Return it as JSON text."""
        batch = [self.batch.device, self.batch.slot, self.batch.occupied, self.batch.num_slots]
        return json.dumps([self.task_id, self.num_bytes, self.sha256, self.nsfw, batch]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Pointer | None:
        """Read what `to_bytes` wrote, from bytes that may come from anybody; None if it is no pointer."""
        if len(data) > MAX_POINTER_BYTES:
            return None
        try:
            task_id, num_bytes, sha256, nsfw, batch = json.loads(data)
            place = BatchPlace(*batch)
        except (TypeError, ValueError, RecursionError):
            return None
        texts = isinstance(task_id, str) and isinstance(sha256, str)
        if not texts or not 0 < len(task_id) <= _MAX_ID_CHARACTERS or not _SHA256.fullmatch(sha256):
            return None
        numbers = [num_bytes, *vars(place).values()]
        if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
            return None
        return cls(task_id, num_bytes, sha256, nsfw, place) if nsfw is None or isinstance(nsfw, bool) else None


@dataclass(frozen=True)
class Lead:
    """A job that draws its image for all equal ones, as it was a moment ago.

    Attributes:
        token: tells the job from others.
        priority: a lower number is more urgent.
        expires_at: when the job expires if it has had no slot, in seconds since 1970; infinite for never.
        had_slot: the job has, or has had, a slot.
        pending: it has none now.
        current, total: denoising steps.
        eta_s: seconds until its image is expected; None until there is an estimate.
    """

    token: str
    priority: int
    expires_at: float = math.inf
    had_slot: bool = False
    pending: bool = True
    current: int = 0
    total: int = 1
    eta_s: float | None = None

    def serves(self, other: Lead) -> bool:
        """Return whether another job may wait for this one, and be no later than if it had the devices to itself."""
        is_in_time = self.had_slot or self.expires_at <= other.expires_at + CLOCKS_APART_S
        return self.priority <= other.priority and is_in_time

    def to_bytes(self) -> bytes:
        """Return it as a line of words, the token first."""
        expires = "inf" if math.isinf(self.expires_at) else f"{max(0.0, self.expires_at):.3f}"
        eta = "-" if self.eta_s is None else f"{max(0.0, self.eta_s) * 1000:.0f}"
        flags = f"{self.had_slot:d} {self.pending:d}"
        priority = min(max(self.priority, 0), 255)
        return f"{self.token} {priority} {expires} {flags} {self.current} {self.total} {eta}".encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Lead | None:
        """Read what `to_bytes` wrote, from bytes that may come from anybody; None if it is no lead."""
        found = _LEAD.fullmatch(data.decode("ascii", "replace"))
        if found is None:
            return None
        try:
            expires_at = float(found["expires"])
        except ValueError:
            return None
        had_slot, pending = (flag == "1" for flag in found["flags"].split())
        steps = int(found["current"]), max(1, int(found["total"]))
        eta_s = None if found["eta"] == "-" else int(found["eta"]) / 1000
        return cls(found["token"], int(found["priority"]), expires_at, had_slot, pending, *steps, eta_s)


def token_of(task_id: str) -> str:
    """Return what tells a task from others in a lead: the same on every worker that gets its message."""
    return hashlib.sha256(task_id.encode(errors="surrogatepass")).hexdigest()[:32]
