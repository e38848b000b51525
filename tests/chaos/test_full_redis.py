"""A Redis that is full, and one that is away while pictures go to files: no job is lost, and only what must fails.

pytest -s tests/chaos/test_full_redis.py -n 0
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from sdtpu_worker import generate
from sdtpu_worker.errors import BrokerUnavailable, StorageError
from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.proxies import FlakyProxy
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.waiting import wait_until

LEASE_S = 2


def settings(**more: object) -> dict[str, str]:
    common = {"SDTPU_CPU_DEVICES": 2, "SDTPU_FAKE_STEP_MS": 20, "SDTPU_LEASE_S": LEASE_S}
    return {name: str(value) for name, value in {**common, **more}.items()}


def test_a_full_redis_takes_no_job_and_no_picture_and_all_goes_on_when_there_is_room(tmp_path: Path, long: bool):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer({"maxmemory-policy": "noeviction"}))
        images = stack.enter_context(RedisServer({"maxmemory-policy": "noeviction", "appendonly": "no"}))
        images_admin = stack.enter_context(contextlib.closing(images.client()))
        admin = stack.enter_context(contextlib.closing(server.client()))
        stack.enter_context(client_app(server.url, sdtpu_image_store=images.url))
        more = settings(SDTPU_FAKE_PUT_BUDGET_S=1, SDTPU_IMAGE_STORE=images.url)
        fleet = stack.enter_context(Fleet(server.url, tmp_path, **more))
        worker, ledger = fleet.start("full"), Ledger()
        early = [ledger.add(seed, 5) for seed in range(4)]
        ledger.wait(60)
        images_admin.config_set("maxmemory", 1)
        without_room = {ledger.add(seed, 5) for seed in range(4)}
        ledger.wait(60)
        images_admin.config_set("maxmemory", 0)
        assert ledger.errors.keys() == without_room
        assert all(isinstance(error, StorageError) for error in ledger.errors.values())
        assert "Redis did not take the image" in str(next(iter(ledger.errors.values())))

        jobs = [ledger.add(seed, 40 if long else 20) for seed in range(40 if long else 12)]
        time.sleep(0.3)
        admin.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="raise maxmemory, or free memory"):
            generate.delay("no room")
        time.sleep(30 if long else 2.5 * LEASE_S)
        assert worker.is_running
        ledger.collect()
        held, waiting = admin.hlen("sdtpu:unacked"), admin.llen("sdtpu\x06\x166")
        done_while_full = len(ledger.results) - len(early)
        admin.config_set("maxmemory", 0)
        ledger.wait(60)
        wait_until_no_key_is_left(admin)
        assert not ledger.wrong_pictures()
        assert ledger.errors.keys() == without_room
        late = [ledger.add(seed, 5) for seed in range(4)]
        ledger.wait(60)
        assert ledger.results.keys() >= {*early, *late}
        assert worker.is_running
        print(
            f"\nfull image store: {len(without_room)} jobs failed with StorageError, no other did; full broker:"
            f" {len(jobs)} jobs under way, {done_while_full} done meanwhile, {held} held and {waiting} waiting at its"
            " end, all done when there was room"
        )
        assert worker.stop() == 0
        assert "a pulse of the lease failed" not in worker.text()


def test_results_wait_for_a_redis_that_is_away_although_pictures_go_to_files(tmp_path: Path, long: bool):
    away_s = 60 if long else 4
    (tmp_path / "images").mkdir()
    store = f"file://{tmp_path}/images"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        proxy = stack.enter_context(FlakyProxy(server.url))
        stack.enter_context(client_app(server.url, sdtpu_image_store=store))
        fleet = stack.enter_context(Fleet(proxy.url, tmp_path, **settings(SDTPU_IMAGE_STORE=store, SDTPU_LEASE_S=60)))
        worker, ledger = fleet.start("files"), Ledger()
        jobs = [ledger.add(seed, 300) for seed in range(4)]  # two of them wait for a slot
        wait_until(
            lambda: all(generate.AsyncResult(task_id).state == "STARTED" for task_id in jobs), "the jobs to start"
        )
        proxy.cut()
        time.sleep(away_s)

        def stored() -> int:
            return len(list((tmp_path / "images").glob("*.png")))

        wait_until(lambda: stored() == len(jobs), lambda: f"{stored()} of {len(jobs)} pictures to be in files")
        proxy.restore()
        begin = time.monotonic()
        ledger.wait(60)
        print(
            f"\nRedis away for {away_s} s: all {len(jobs)} pictures were in files by then, all results"
            f" {time.monotonic() - begin:.1f} s after it was back"
        )
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        assert worker.stop() == 0
        assert worker.loop_stats()["job_steps"] == 4 * 300
