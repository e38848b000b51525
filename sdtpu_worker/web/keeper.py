"""What a web app keeps of jobs beside the jobs API, if it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sdtpu_worker.web.job_records import JobRecord


class Keeper(Protocol):
    """Keeps jobs, too. Its methods are called where the app's own code runs: in a request's thread."""

    def enqueue(self, record: JobRecord, send: Callable[..., None]) -> None:
        """Enqueue a job.

        Args:
            record: of the job.
            send: enqueues it, with further options of `apply_async`.
        """

    def find(self, job_id: str) -> JobRecord | None:
        """Return the record of a job that did not come by the jobs API, None where there is none."""
