"""One message that this worker holds, and how it leaves this worker."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

DEAD_LETTER_BYTES = 4096
"""How many bytes of a dead-lettered message Redis keeps."""


@dataclass
class Delivery:
    """A message that this worker holds.

    Attributes:
        task_id: the id of its job.
        running: the pool has taken the job.
        suspect: the job had a slot when the devices hung or were lost; perhaps it is the cause.
    """

    task_id: str = ""
    running: bool = False
    suspect: bool = False


@dataclass(frozen=True)
class Move:
    """How a message leaves this worker: the script to run, and the keys of the job that it needs."""

    script: str
    job_keys: Sequence[str]


def describe_dead_letter(at: float, kind: str, queue: str, reason: str, size: int, message: bytes) -> str:
    """Return what Redis keeps of a message that cannot be run.

    Args:
        at: the time, in seconds since 1970.
        kind: the name that it is counted by.
        queue: the queue that it came from.
        reason: why it cannot be run.
        size: its size in bytes.
        message: as much of it as was read.
    """
    letter = {
        "at": round(at, 3),
        "queue": queue,
        "kind": kind,
        "reason": reason,
        "bytes": size,
        "message": message[:DEAD_LETTER_BYTES].decode(errors="backslashreplace"),
    }
    return json.dumps(letter)
