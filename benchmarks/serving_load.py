"""The load of `serving.py`: who arrives when, drawn from a seed, and the process that sends it.

`python -m benchmarks.serving_load` is that process. It reads an `Order` in JSON from stdin, sends every job when it is
due, whether or not earlier ones are done (open loop), and never looks at a result. It prints the time of its start
when it is connected, and at the end by how much it was late.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from celery import Celery

from tools.embedded_checkpoint.scenes import every_scene

MIXES = {"equal": (30,), "mixed": (10, 20, 30, 50)}
"""Step counts, each as frequent as the others."""


@dataclass(frozen=True)
class Arrival:
    """One job; `at_s` counts from the producer's start."""

    task_id: str
    at_s: float
    prompt: str
    seed: int
    num_inference_steps: int


@dataclass(frozen=True)
class Message:
    """What is sent for a job: a task by its name, with keyword arguments."""

    at_s: float
    task_id: str
    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Order:
    """Everything that the producer needs; the messages are in the order of their times."""

    broker_url: str
    queue: str
    messages: list[Message]


def draw_arrivals(seed: str, mix: str, jobs: int, rate: float | None) -> list[Arrival]:
    """Draw a schedule; the same seed gives the same one, whoever serves it.

    A run is short, so what would only average out in a long one is held fixed: every step count of the mix comes
    equally often, in random order, and the exponential gaps are scaled so that the jobs come at exactly their rate
    (a Poisson process, given the number of its arrivals).

    Args:
        seed: of the drawing; also the beginning of the task ids.
        mix: a name of `MIXES`.
        rate: jobs per second; None for all at once.
    """
    rng = random.Random(seed)
    counts = MIXES[mix]
    steps = [counts[i % len(counts)] for i in range(jobs)]
    rng.shuffle(steps)
    scenes = every_scene()
    gaps = [rng.expovariate(1.0) for _ in range(jobs)]
    scale = jobs / rate / sum(gaps) if rate else 0.0
    arrivals, at_s = [], 0.0
    for i in range(jobs):
        at_s += scale * gaps[i]
        caption = rng.choice(scenes).caption()
        arrivals.append(Arrival(f"{seed}-{i:04d}", at_s, caption, rng.getrandbits(31), steps[i]))
    return arrivals


class Producer:
    """A running producer process.

    Attributes:
        started_at: `time.time()` to which the schedule's times are added.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.started_at = self._read("started_at")

    def max_late_s(self) -> float:
        """Wait until everything is sent; return by how much a job was sent after its time, at worst."""
        return self._read("max_late_s")

    def _read(self, name: str) -> float:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"the producer ended with code {self._process.wait()} before it said {name}")
        return json.loads(line)[name]


@contextlib.contextmanager
def producing(order: Order) -> Iterator[Producer]:
    """Run the producer process."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving_load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        json.dump(asdict(order), process.stdin)
        process.stdin.close()
        try:
            yield Producer(process)
        finally:
            process.terminate()


def main() -> None:
    order = json.load(sys.stdin)
    app = Celery("producer", broker=order["broker_url"], set_as_current=False)
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        connection.ensure_connection(max_retries=3)
        started_at, max_late_s = time.time() + 0.1, 0.0
        _say(started_at=started_at)
        for message in order["messages"]:
            due_at = started_at + message["at_s"]
            time.sleep(max(0.0, due_at - time.time()))
            max_late_s = max(max_late_s, time.time() - due_at)
            app.send_task(
                message["name"],
                kwargs=message["kwargs"],
                task_id=message["task_id"],
                queue=order["queue"],
                producer=producer,
            )
        _say(max_late_s=max_late_s)


def _say(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
