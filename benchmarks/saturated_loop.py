"""Jobs that are all there at once, in the device loop without Celery and Redis; `limit.py` and others measure it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.protocols import Policy
from sdtpu_worker.device_loop.stats import LoopStats
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.preparation import PreparedJob

_PATIENCE_S = 600


def run_all(engine: Engine, policy: Policy, jobs: Sequence[PreparedJob]) -> tuple[float, LoopStats]:
    """Run jobs to their ends; return the seconds from the first one's submission on, and the loop's counters."""
    loop = DeviceLoop(engine, policy)
    started = time.perf_counter()
    submissions = [loop.submit(job) for job in jobs]
    loop.start()
    for submission in submissions:
        submission.future.result(_PATIENCE_S)
    elapsed_s = time.perf_counter() - started
    loop.close()
    return elapsed_s, loop.stats
