"""Workers are killed (SIGKILL) again and again: no job is lost, none is seen twice, every picture is right.

    python -m pytest tests/chaos/test_kills.py -n 0 -s            # some seconds, part of CI
    python -m pytest tests/chaos/test_kills.py -n 0 -s --long     # 20,000 jobs, 50 kills: some minutes

Two workers with the fake engine, whose pictures show how many steps their jobs took and with what they began, on a
Redis with an append-only file. Four jobs of five bring a picture, a mask, LoRAs or all of them. The kills come when
given shares of the jobs are done; which worker, both at once or not, and how long after, is drawn from a seed. A client
watches every result at the moment when it is stored.
"""

from __future__ import annotations

import contextlib
import threading
import time
from random import Random

import pytest

from tests.chaos.fleet import Fleet, Ledger, wait_until_no_key_is_left
from tests.chaos.pictures import mixed_parameters
from tests.chaos.servers import RedisServer
from tests.chaos.witness import Witness
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SETTINGS = {
    "SDTPU_CPU_DEVICES": "2",
    "SDTPU_SLOTS_PER_DEVICE": "4",
    "SDTPU_FAKE_STEP_MS": "0.2",
    "SDTPU_LEASE_S": "5",
    "SDTPU_MAX_DELIVERIES": "1000",
}


def test_killed_workers_lose_no_job_and_no_result_is_seen_twice(long, tmp_path):
    jobs, kills = (20_000, 50) if long else (800, 5)
    random, ledger, began = Random(20), Ledger(mixed=mixed_parameters), time.monotonic()
    with (
        RedisServer() as server,
        contextlib.closing(server.client()) as client,
        Witness(server.url) as witness,
        client_app(server.url),
        Fleet(server.url, tmp_path, **SETTINGS) as fleet,
    ):
        workers = [fleet.launch(name) for name in ("a", "b")]
        steps = [random.randint(1, 3) for _ in range(jobs)]
        producer = threading.Thread(target=lambda: [ledger.add(seed, n) for seed, n in enumerate(steps)])
        producer.start()
        killed = 0
        for i in range(kills):
            share = (i + random.random()) / kills * 0.95
            wait_until(lambda share=share: len(witness.ends) >= share * jobs, f"{share:.0%} of the jobs", 300)
            time.sleep(random.uniform(0, 0.3))
            for victim in random.choice(([0], [1], [0, 1])):
                workers[victim].kill()
                workers[victim] = fleet.launch(workers[victim].name)
                killed += 1
        producer.join()
        wait_until(lambda: len(witness.ends) == jobs, "all jobs to end", 300)
        wait_until_no_key_is_left(client)
        ended_s = time.monotonic() - began
        assert ledger.collect() == 0
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        assert not witness.changed()
        assert not witness.different_images()
        assert client.hgetall("sdtpu:dead:counts") == {}
        back = sum(worker.text().count("messages redelivered: ") for worker in fleet.workers)
        again = sum(worker.text().count("done already") for worker in fleet.workers)
        assert back >= 1
    print(
        f"\n{jobs} jobs, {killed} workers killed in {ended_s:.0f} s: 0 lost, 0 wrong pictures, 0 results seen twice,"
        f" 0 keys left; messages came back {back} times, {again} jobs were only acknowledged"
    )
