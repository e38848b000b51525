"""One message that this worker holds, and how it leaves this worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
