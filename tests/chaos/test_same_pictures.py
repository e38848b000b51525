"""The real engine: pictures that were begun by a worker that was killed or stopped are the same, byte for byte.

    python -m pytest tests/chaos/test_same_pictures.py -n 0 -s            # part of CI
    python -m pytest tests/chaos/test_same_pictures.py -n 0 -s --long     # 300 jobs, 20 kills

The shipped checkpoint on workers with simulated devices. The jobs are of six kinds: from text, from a picture, with a
mask, with the shipped LoRA at two weights, with a picture, a mask and the LoRA; under five samplers, two without
guidance. First every job runs undisturbed; then again while workers are killed (SIGKILL) when given shares of the jobs
are done, or stopped (SIGTERM) in mid-denoise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from PIL import Image, ImageDraw

from sdtpu_worker.images.store import read_image_bytes
from sdtpu_worker.testing.processes import wait_for_line
from tests.chaos.fleet import Fleet, Ledger, WorkerProcess, wait_until_no_key_is_left
from tests.chaos.servers import RedisServer
from tests.chaos.witness import Witness
from tests.support.clients import client_app
from tests.support.paths import XLA_CACHE
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PROMPTS = ("a red circle on a white background", "a large blue star on a yellow background", "a green heart")


@dataclass
class Studio:
    """Two workers of a fleet, and the pictures that they made undisturbed, by seed and steps."""

    server: RedisServer
    fleet: Fleet
    workers: list[WorkerProcess]
    steps: int
    calm: dict[tuple[int, int], bytes]

    def launch(self) -> WorkerProcess:
        """Start one more worker."""
        return self.fleet.launch(f"w{len(self.fleet.workers)}")


def kind_of(seed: int) -> dict[str, Any]:
    """Return what the job of a seed brings besides its prompt; six kinds in turn."""
    picture, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), 0)
    ImageDraw.Draw(picture).ellipse((4, 16, 28, 48), fill=("red", "blue")[seed // 6 % 2])
    ImageDraw.Draw(mask).rectangle((34, 8, 63, 55), fill=255)
    kinds: tuple[dict[str, Any], ...] = (
        {"sampler": "euler_ancestral"},
        {"image": picture, "strength": 0.6},
        {"image": picture, "mask_image": mask, "loras": [("outline", 1.0)], "sampler": "ddim"},
        {"loras": [("outline", 0.5)], "guidance_scale": 1.0},
        {"image": picture, "mask_image": mask, "sampler": "pndm"},
        {"loras": [("outline", 1.0)], "guidance_scale": 1.0, "sampler": "euler"},
    )
    return kinds[seed % 6]


def add_jobs(ledger: Ledger, count: int, steps: int) -> None:
    for seed in range(count):
        ledger.add(seed, steps, PROMPTS[seed % len(PROMPTS)])


def pictures(ledger: Ledger) -> dict[tuple[int, int], bytes]:
    assert not ledger.errors
    return {ledger.jobs[task_id][1:]: read_image_bytes(result) for task_id, result in ledger.results.items()}


def wait_for_worker(worker: WorkerProcess) -> None:
    wait_for_line(worker.process, worker.log, " ready.", 240)


@pytest.fixture(scope="module")
def studio(long: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    jobs, steps, devices = (300, 20, 4) if long else (16, 10, 2)
    settings = {
        "SDTPU_CPU_DEVICES": str(devices),
        "SDTPU_COMPILE_CACHE": XLA_CACHE,
        "SDTPU_LEASE_S": "5",
        "SDTPU_GRACE_S": "0",
        "SDTPU_MAX_DELIVERIES": "100",
        "SDTPU_LORAS": "outline=embedded-outline",
        "SDTPU_LORA_RANK": "4",
    }
    with (
        RedisServer() as server,
        client_app(server.url),
        Fleet(server.url, tmp_path_factory.mktemp("studio"), "sdtpu_worker.app", **settings) as fleet,
    ):
        studio = Studio(server, fleet, [], steps, {})
        studio.workers = [studio.launch(), studio.launch()]
        ledger = Ledger(mixed=kind_of)
        add_jobs(ledger, jobs, steps)
        add_jobs(ledger, 4, 50 * steps)
        for worker in studio.workers:
            wait_for_worker(worker)
        ledger.wait(600)
        studio.calm = pictures(ledger)
        yield studio


def test_pictures_whose_workers_were_killed_are_the_same_bytes(studio, long):
    random, ledger, kills = Random(21), Ledger(mixed=kind_of), 20 if long else 2
    jobs = sum(steps == studio.steps for _, steps in studio.calm)
    with contextlib.closing(studio.server.client()) as client, Witness(studio.server.url) as witness:
        add_jobs(ledger, jobs, studio.steps)
        began, killed = time.monotonic(), 0
        for i in range(kills):
            share = (i + random.random()) / kills * 0.9
            wait_until(lambda share=share: len(witness.ends) >= share * jobs, f"{share:.0%} of the jobs", 300)
            time.sleep(random.uniform(0, 1))
            victim = random.randrange(2) if long else i
            killed += studio.workers[victim].is_running
            studio.workers[victim].kill()
            studio.workers[victim] = studio.launch()
        ledger.wait(300)
        ended_s = time.monotonic() - began
        wait_until_no_key_is_left(client)
        assert not witness.changed()
        assert not witness.different_images()
    found = pictures(ledger)
    assert len(found) == jobs
    assert [at for at, picture in found.items() if picture != studio.calm[at]] == []
    print(
        f"\nreal engine, {jobs} jobs of {studio.steps} steps, {killed} workers killed in {ended_s:.0f} s:"
        f" 0 lost, {jobs} of {jobs} pictures equal the undisturbed ones byte for byte"
    )


def test_pictures_that_were_handed_over_in_mid_denoise_are_the_same_bytes(studio):
    ledger, steps = Ledger(mixed=kind_of), 50 * studio.steps
    for worker in studio.workers:
        wait_for_worker(worker)
    before = [worker.text().count("] received") for worker in studio.workers]
    with contextlib.closing(studio.server.client()) as client:
        add_jobs(ledger, 4, steps)
        wait_until(lambda: len(client.keys("sdtpu:starts:*")) >= 2, "jobs to have slots")
        time.sleep(0.2)
        took = [worker.text().count("] received") - count for worker, count in zip(studio.workers, before, strict=True)]
        first, second = studio.workers if took[0] else studio.workers[::-1]
        assert first.stop() == 0
        ledger.wait(120)
        assert second.stop() == 0
        wait_until_no_key_is_left(client)
    handed_over = first.loop_stats()["handed_over"]
    assert handed_over >= 1
    found = pictures(ledger)
    assert [at for at, picture in found.items() if picture != studio.calm[at]] == []
    print(
        f"\nreal engine, SIGTERM in mid-denoise: {handed_over} of 4 jobs of {steps} steps handed over,"
        " 4 of 4 pictures equal the undisturbed ones byte for byte"
    )
