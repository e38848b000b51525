"""The result backend goes away and the broker stays: the worker answers, stops in time, and no job is lost.

pytest -s tests/chaos/test_result_backend_away.py -n 0
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from sdtpu_worker import generate
from tests.chaos.fleet import Fleet
from tests.chaos.proxies import FlakyProxy
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = {"SDTPU_CPU_DEVICES": "2", "SDTPU_FAKE_STEP_MS": "40", "SDTPU_LEASE_S": "5", "SDTPU_GRACE_S": "2",
            "SDTPU_PROGRESS_S": "0.1"}  # fmt: skip


def order(steps: int, **options: Any) -> Any:
    return generate.apply_async(("x",), {"seed": 1, "num_inference_steps": steps}, **options)


def test_a_worker_without_its_result_backend_answers_and_stops_and_its_job_ends_elsewhere(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        broker, results = stack.enter_context(RedisServer()), stack.enter_context(RedisServer())
        proxy = stack.enter_context(FlakyProxy(results.url))
        app = stack.enter_context(client_app(broker.url, results.url))
        fleet = stack.enter_context(
            Fleet(broker.url, tmp_path, CELERY_RESULT_BACKEND=proxy.url, SDTPU_IMAGE_STORE=broker.url, **SETTINGS)
        )
        first = fleet.start("first")
        running, doomed = order(1000), order(1000)
        wait_until(lambda: {running.state, doomed.state} == {"PROGRESS"}, "both jobs to have their slots")
        proxy.cut()
        time.sleep(0.5)  # their threads wait for the result backend now
        doomed.revoke(terminate=True)
        # not by `delay()`, which refuses a job that would expire before it had a slot
        expired = app.send_task(generate.name, ("x",), {"seed": 1}, queue="sdtpu", expires=0.2)
        time.sleep(0.5)
        assert app.control.inspect(timeout=30, limit=1).ping() == {"first@chaos": {"ok": "pong"}}
        proxy.restore()
        wait_until(lambda: doomed.state == expired.state == "REVOKED", "both jobs to be revoked")
        assert running.state == "PROGRESS"
        proxy.cut()
        time.sleep(0.5)
        began_at = time.monotonic()
        assert first.stop(60) == 0
        stopped_after_s = time.monotonic() - began_at
        proxy.restore()
        fleet.start("second", SDTPU_FAKE_STEP_MS="2")
        assert running.get(timeout=60)["num_inference_steps"] == 1000
        print(f"\nresult backend away: pong, and stopped after {stopped_after_s:.1f} s")
