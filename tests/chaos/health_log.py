"""What a worker's health endpoint says, asked all the time by a thread."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from sdtpu_worker.operations.health_http import ask_health


class Sample(NamedTuple):
    """When it was asked and had answered (monotonic), and the verdicts; None when nobody answered."""

    at: float
    until: float
    live: bool | None
    ready: bool | None


class HealthLog:
    """Asks `/livez` and `/readyz` of a worker every tenth of a second until the block ends."""

    EVERY_S = 0.1

    def __init__(self, port: int) -> None:
        self.address, self.samples = ("127.0.0.1", port), list[Sample]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health-log", daemon=True)

    def __enter__(self) -> HealthLog:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(60)

    def between(self, begin: float, end: float) -> list[Sample]:
        """Return what was asked and answered in this time, without the time when nobody answered."""
        asked = [sample for sample in self.samples if begin <= sample.at and sample.until <= end]
        return [sample for sample in asked if sample.live is not None]

    def silent(self) -> int:
        """Return how often nobody answered after the first answer."""
        answers = [sample.live is not None for sample in self.samples]
        return answers[answers.index(True) :].count(False) if True in answers else len(answers)

    def _run(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            at = time.monotonic()
            live, ready = self._ask("/livez"), self._ask("/readyz")
            self.samples.append(Sample(at, time.monotonic(), live, ready))

    def _ask(self, path: str) -> bool | None:
        try:
            return ask_health(self.address, path, 30.0)[0]
        except ConnectionError:
            return None
