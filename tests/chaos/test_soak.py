"""What a worker takes up stays what it is: under mixed load, for an hour of the policy's time, behind a long queue.

    pytest tests/chaos/test_soak.py -n 0 --long

Two cores, a worker on the fake engine. Ten minutes: 4,994 jobs, 41 failed programs, 9 times without connections:
memory 80.2 to 82.1 MB in nine of them, threads, files and connections as before. An hour of virtual time: 6,038 jobs,
190 failed programs, 68 blocks of memory more. 5,000 jobs for later: +0.4 MiB, none held; 20,000 that wait: at most 9
claimed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import redis
from celery import chord, group
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from sdtpu_worker import DeadlineUnreachable, GenerationFailed, InvalidRequest, generate
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob
from sdtpu_worker.testing.processes import private_redis
from tests.chaos.fleet import Fleet, Ledger
from tests.chaos.footprint import (
    assert_nothing_left,
    difference,
    drop_connections,
    footprint,
    is_as_before,
    pool_stats,
    settled,
)
from tests.support.clients import client_app
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SEED = 7
KEEP_NOTHING = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""glibc keeps what each thread frees for that thread: some MiB, filled in the course of an hour, that look like a leak
and would hide one."""


@pytest.fixture
def start(tmp_path):
    """Give a function that starts a worker on a Redis of its own; yields it, the client's app and a client of Redis."""
    with contextlib.ExitStack() as stack:

        def start(**settings: str):
            url = stack.enter_context(private_redis())
            app = stack.enter_context(client_app(url, sdtpu_tenant_shards=2))
            fleet = stack.enter_context(Fleet(url, tmp_path, SDTPU_TENANT_SHARDS="2", **settings))
            return fleet.start("soak"), app, stack.enter_context(redis.Redis.from_url(url))

        yield start


ENDS: dict[str, tuple[type, ...]] = {
    "plain": (),
    "countdown": (),
    "part": (),
    "expires": (TaskRevokedError,),
    "cancelled": (TaskRevokedError,),
    "soft limit": (SoftTimeLimitExceeded,),
    "hard limit": (TimeLimitExceeded,),
    "invalid": (InvalidRequest,),
    "raise": (GenerationFailed,),
    "nan": (GenerationFailed,),
}
"""By kind of job, the errors that it may end in."""
WEIGHTS = {
    "plain": 60,
    "countdown": 6,
    "canvas": 3,
    "expires": 6,
    "cancelled": 6,
    "soft limit": 3,
    "hard limit": 3,
    "invalid": 6,
    "raise": 0.3,
    "nan": 1,
}


class Mix:
    """Every kind of job there is, drawn by chance, and what each may become."""

    def __init__(self, app: Any, seed: int) -> None:
        self.app, self.random, self.ledger = app, random.Random(seed), Ledger()
        self.kinds: dict[str, str] = {}
        self.to_revoke: list[tuple[float, str]] = []
        self.number = self.sent = self.refused = 0

    def send(self) -> None:
        """Enqueue one job, or a few in a canvas; each kind once to begin with."""
        draw, kinds = self.random, list(WEIGHTS)
        kind = kinds[self.sent] if self.sent < len(kinds) else draw.choices(kinds, list(WEIGHTS.values()))[0]
        self.sent += 1
        self.number += 1
        options: dict[str, Any] = {"priority": draw.choice((0, 3, 6, 6, 6, 9)), "retries": draw.choice((0, 0, 0, 1))}
        steps, prompt = draw.randint(1, 60), kind if kind in ("raise", "nan") else "x"
        if kind == "canvas":
            self._send_canvas()
            return
        if kind == "invalid":
            job = self.app.send_task("sdtpu.generate", ([7],), {"seed": 1}, queue="sdtpu.t1", **options)
            self.ledger.jobs[job.id] = job, 1, 1
            self.kinds[job.id] = kind
            return
        if kind in ("cancelled", "soft limit", "hard limit"):
            steps = 1000
        if kind.endswith("limit"):
            options["soft_time_limit" if kind == "soft limit" else "time_limit"] = 0.05
        if kind == "countdown":
            options["countdown"] = draw.uniform(0.1, 4)
        if kind == "expires":
            options["expires"] = draw.uniform(0.05, 2)
        kwargs = {"seed": self.number, "num_inference_steps": steps, "tenant": draw.choice((None, "a", "b", "c"))}
        try:
            job = generate.apply_async((prompt,), kwargs, **options)
        except DeadlineUnreachable:
            self.refused += 1
            return
        self.ledger.jobs[job.id] = job, self.number, steps
        self.kinds[job.id] = kind
        if kind == "cancelled":
            self.to_revoke.append((time.monotonic() + draw.uniform(0, 0.5), job.id))

    def revoke_due(self) -> None:
        """Cancel those whose time has come."""
        due = [task_id for at, task_id in self.to_revoke if at <= time.monotonic()]
        if due:
            self.to_revoke = [(at, task_id) for at, task_id in self.to_revoke if task_id not in due]
            self.app.control.revoke(due, terminate=True)

    def wrong_ends(self) -> list[tuple[str, Any]]:
        """Return the jobs that became something that their kind cannot become."""
        return [
            (self.kinds[task_id], error)
            for task_id, error in self.ledger.errors.items()
            if not isinstance(error, ENDS[self.kinds[task_id]])
        ]

    def _send_canvas(self) -> None:
        def part() -> Any:
            self.number += 1
            kwargs = {"seed": self.number, "num_inference_steps": self.random.randint(1, 60)}
            return generate.si("x", **kwargs)

        parts = [part() for _ in range(3)]
        if self.random.random() < 0.5:
            body = part()
            result = chord(parts, body).apply_async()
            results, parts = [result, *result.parent.results], [body, *parts]
        else:
            results = group(parts).apply_async().results
        for job, signature in zip(results, parts, strict=True):
            self.ledger.jobs[job.id] = job, signature.kwargs["seed"], signature.kwargs["num_inference_steps"]
            self.kinds[job.id] = "part"


def use_every_thread(app: Any, client: redis.Redis) -> None:
    """Have the worker hold as many jobs as it can: two batches, and one of urgent ones beyond its prefetch limit."""
    ledger, slots = Ledger(), pool_stats(app)["slots"]
    for i in range(2 * slots):
        ledger.add(i, 400, priority=9)
    wait_until(lambda: client.hlen("sdtpu:unacked") >= 2 * slots, "two batches to be taken")
    for i in range(slots):
        ledger.add(i, 50, priority=0)
    ledger.wait(90)


def slope_per_minute(samples: list[tuple[float, int]]) -> float:
    """Return the slope of the line through `(seconds, value)` with the least squares."""
    at, values = np.array(samples, float).T
    return 60 * float(np.polyfit(at - at[0], values, 1)[0])


def growth_of_most_minutes(samples: list[tuple[float, int]]) -> float:
    """Return the median growth from one minute to the next: a leak is in all of them.

    Python takes memory by the MiB, now and then, as the most garbage that there ever was grows more and more slowly.
    """
    minutes: dict[int, list[int]] = {}
    for at, kib in samples:
        minutes.setdefault(int((at - samples[0][0]) // 60), []).append(kib)
    return float(np.median(np.diff([np.median(each) for each in minutes.values()])))


def test_mixed_load_leaves_nothing_behind(start, long, capsys):
    settings = {"SDTPU_CPU_DEVICES": "4", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_FAKE_STEP_MS": "10"}
    worker, app, client = start(**settings, **KEEP_NOTHING)
    warm_s, load_s, drop_s, rate = (60, 540, 60, 8) if long else (4, 10, 5, 10)
    mix, samples, drops = Mix(app, SEED), list[tuple[float, int]](), 0
    use_every_thread(app, client)
    before = footprint(worker, client)
    started = time.monotonic()
    drop_at = started + drop_s
    while (now := time.monotonic()) < started + warm_s + load_s:
        mix.send()
        mix.revoke_due()
        if now >= drop_at:
            drop_at += drop_s
            drops += 1
            drop_connections(worker, client)
        if mix.number % 10 == 0:
            mix.ledger.collect()
            if now >= started + warm_s:
                samples.append((now, worker.memory_kib()))
        time.sleep(mix.random.expovariate(rate))
    while mix.to_revoke:
        mix.revoke_due()
        time.sleep(0.05)
    mix.ledger.wait(120)
    use_every_thread(app, client)
    after = settled(worker, client, before, slots=8)
    slope, grown_kib = slope_per_minute(samples), samples[-1][1] - samples[0][1]
    loop = pool_stats(app)["loop"]
    assert (mix.wrong_ends(), mix.ledger.wrong_pictures()) == ([], [])
    assert worker.is_running
    assert is_as_before(before, after, slots=8), (before, after)
    assert loop["retried"]
    assert_nothing_left(app, client)
    assert grown_kib < (4_096 if long else 8_192)
    if long:
        assert loop["preemptions"]
        assert slope < 200
        assert growth_of_most_minutes(samples) < 200
    ends = Counter(type(error).__name__ for error in mix.ledger.errors.values())
    with capsys.disabled():
        print(
            f"\nsoak: {len(mix.kinds):,} jobs of {len(set(mix.kinds.values()))} kinds in {warm_s + load_s} s"
            f" ({len(mix.ledger.results):,} pictures, all right; {dict(ends)}, {mix.refused} refused),"
            f" {drops} dropped connections,"
            f" {loop['preemptions']} preemptions, {loop['failures']} failed programs: memory {slope:+.0f} KiB a minute"
            f" in all, {growth_of_most_minutes(samples) if long else 0:+.0f} in most"
            f" ({before.memory_kib:,} to {after.memory_kib:,} KiB), {difference(before, after)}"
        )


class VirtualClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class VirtualWorker:
    """The real device loop, policy and quarantine on a fake engine, without their threads, in virtual time."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        costs = {(64, 64): TickCosts(8, Cost(0.1, 0.02, 0.16))}
        self.engine = FakeEngine()
        self.policy = Aggregator(costs, 1, 2, 0.25)
        self.loop = DeviceLoop(self.engine, self.policy, clock=self.clock)

    def next_at(self) -> float:
        """Return when there is something to do."""
        oldest, wait_s = self.loop._ticks.oldest, self.loop._wait_s()
        if self.loop._inbox._arrivals or self.loop._inbox._cancelled:
            return self.clock.now
        times = [oldest.ends_at if oldest else np.inf, np.inf if wait_s is None else self.clock.now + max(0.0, wait_s)]
        return float(min(times))

    def turn(self) -> None:
        """Do what is due: the ticks that have ended, then one turn of the loop."""
        loop, now = self.loop, self.clock.now
        oldest = loop._ticks.oldest
        if oldest is not None and oldest.ends_at <= now:
            while (tick := loop._ticks._to_wait_for.get_nowait()) is not oldest:
                pass  # a tick from before a failure
            try:
                end: Any = tick.executed.wait()
            except Exception as exc:
                end = exc
            loop._inbox.end(tick, end, now)
        loop._take_in()
        if loop._failure is not None and not loop._ticks:
            loop._recover(loop._failure)
        elif loop._failure is None and loop._is_due(now):
            loop._dispatch(now)
        if not loop._ticks:
            while not loop._ticks._to_wait_for.empty():
                loop._ticks._to_wait_for.get_nowait()
        self.engine.ticks.clear()

    def run_until(self, at: float) -> None:
        """Let the time pass."""
        turns = 0
        while (next_at := self.next_at()) <= at:
            turns = turns + 1 if next_at <= self.clock.now else 0
            assert turns < 100, "time does not pass"
            self.clock.now = max(self.clock.now, next_at)
            self.turn()
        self.clock.now = at

    def records(self) -> Counter[str]:
        """Count what is kept of jobs."""
        loop, inbox, jobs, policy = self.loop, self.loop._inbox, self.loop._jobs, self.policy
        return Counter(
            here=len(jobs), arrivals=len(inbox._arrivals), cancelled=len(inbox._cancelled),
            ended=len(inbox._ended), ticks=len(loop._ticks), quarantine=len(jobs._quarantine),
            to_wait_for=loop._ticks._to_wait_for.qsize(), **policy.counts(),
        )  # fmt: skip


def test_an_hour_of_mixed_load_in_virtual_time_leaves_nothing_in_the_loop(long, capsys):
    minutes = 60 if long else 4
    draw, worker = random.Random(SEED), VirtualWorker()
    ends: Counter[str] = Counter()
    most: Counter[str] = Counter()
    blocks: list[int] = []
    number = 0

    def wanted(task_id: str) -> Callable[[], bool]:
        return lambda: task_id not in unwanted

    unwanted: set[str] = set()
    logging.disable()  # pytest would keep the lines
    started = time.monotonic()
    for minute in range(1, minutes + 1):
        submissions = []
        while worker.clock.now < 60 * minute - 10:
            worker.run_until(worker.clock.now + draw.expovariate(2))
            number += 1
            task_id, kind = f"job-{number}", draw.random()
            terms = Terms(
                draw.choice((0, 3, 6, 6, 9)),
                worker.clock.now + draw.uniform(0, 5) if kind < 0.05 else np.inf,
                draw.uniform(0.5, 3) if kind > 0.95 else np.inf,
                draw.uniform(0.5, 3) if 0.9 < kind < 0.95 else np.inf,
            )
            if 0.05 < kind < 0.06:
                worker.engine.poison = frozenset({task_id})
            if 0.06 < kind < 0.08:
                worker.engine.nan = frozenset({task_id})
            job = FakeJob(task_id, draw.randint(1, 50), value=1000 * number)
            submissions.append((job, worker.loop.submit(job, terms, wanted(task_id), alone=0.08 < kind < 0.085)))
            if 0.1 < kind < 0.15:
                worker.loop.cancel(draw.choice(submissions)[0].task_id)
            if 0.15 < kind < 0.17:
                unwanted.add(task_id)
            most |= worker.records()
        while +worker.records():
            worker.run_until(worker.clock.now + 1)
            assert worker.clock.now < 60 * minute + 120
        for job, submission in submissions:
            error = submission.future.exception(0)
            ends["picture" if error is None else type(error).__name__] += 1
            if error is None:
                assert submission.future.result().pixels == job.value + job.num_steps
        submissions.clear()
        del submission, job, error
        unwanted.clear()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    logging.disable(logging.NOTSET)
    elapsed_s = time.monotonic() - started
    grown = blocks[-1] - blocks[1]
    stats = worker.loop.stats
    assert sum(ends.values()) == number
    assert set(ends) == {"picture", "JobCancelled", "JobOverdue", "GenerationFailed"}
    assert stats.preemptions
    assert stats.retried
    assert grown < 1_000
    with capsys.disabled():
        print(
            f"\nvirtual time: {number:,} jobs in {minutes} minutes ({elapsed_s:.0f} s of real time), {stats.ticks:,}"
            f" ticks, {stats.preemptions:,} preemptions, {stats.failures} failed programs, {dict(ends)}; at most"
            f" {most['here']} jobs here; every minute nothing is left, {grown:+,} blocks of memory since the second"
        )


class Copies:
    """Enqueues many copies of one job, under ids of their own, faster than a client could."""

    LIST = "sdtpu\x06\x166"

    def __init__(self, client: redis.Redis) -> None:
        self.client, self.count = client, 0
        self.template_id = generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 1}, queue="elsewhere").id
        raw: Any = client.rpop("elsewhere\x06\x166")
        self.raw = raw.decode()

    def send(self, count: int, eta: datetime | None = None) -> None:
        raw = self.raw.replace('"eta": null', f'"eta": "{eta.isoformat()}"') if eta else self.raw
        batch = self.client.pipeline(transaction=False)
        for _ in range(count):
            self.count += 1
            batch.lpush(self.LIST, raw.replace(self.template_id, f"{self.template_id[:-7]}{self.count:07}"))
        batch.execute()


def test_a_long_queue_and_jobs_for_later_take_no_memory_and_keep_nobody_waiting(start, long, capsys):
    worker, app, client = start(SDTPU_CPU_DEVICES="4", SDTPU_SLOTS_PER_DEVICE="1")
    waiting, later = (20_000, 5_000) if long else (800, 500)
    copies, capacity = Copies(client), 2 * pool_stats(app)["slots"]
    copies.send(150)
    wait_until(lambda: not client.llen(copies.LIST), "the first jobs to be done")
    before = footprint(worker, client)

    copies.send(later, datetime.now(UTC) + timedelta(hours=1))
    sent_at = time.monotonic()
    generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 1}, priority=0).get(timeout=60)
    urgent_s = time.monotonic() - sent_at
    generate.apply_async(("x",), {"seed": 1, "num_inference_steps": 1}, priority=9).get(timeout=60)
    behind_s = time.monotonic() - sent_at
    assert client.zcard("sdtpu:delayed") == later
    wait_until(lambda: pool_stats(app)["deliveries"]["held"] == 0, "the last message to be acknowledged")
    later_kib = worker.memory_kib() - before.memory_kib
    assert later_kib < 4_096

    copies.send(waiting)
    sent_at, most_held, kib = time.monotonic(), 0, list[int]()
    while client.llen(copies.LIST) > waiting // 2 or not kib:
        claimed, delayed = client.pipeline().hlen("sdtpu:unacked").zcard("sdtpu:delayed").execute()
        most_held = max(most_held, claimed - delayed)
        kib.append(worker.memory_kib())
        time.sleep(0.05)
    rate = (waiting - client.llen(copies.LIST)) / (time.monotonic() - sent_at)
    assert most_held <= 2 * capacity, "held, or about to be acknowledged"
    waiting_kib = max(kib) - before.memory_kib
    assert waiting_kib < 8_192
    client.delete(copies.LIST)

    ids = [f"{copies.template_id[:-7]}{150 + number:07}" for number in (1, later)]  # some are due at once
    app.control.revoke(ids[1])
    wait_until(lambda: ids[1] in str(app.control.inspect(timeout=10, limit=1).revoked()), "the revoke to be known")
    records = dict(client.hgetall("sdtpu:unacked"))
    due = [tag for tag, record in records.items() if any(task_id.encode() in record for task_id in ids)]
    assert len(due) == 2
    past = f'"eta": "{datetime.now(UTC).isoformat()}"'
    for tag in due:
        record = re.sub('"eta": "[^"]*"', past, records[tag].decode())
        client.hset("sdtpu:unacked", tag, record)
        client.zadd("sdtpu:delayed", {tag: time.time()})
    assert generate.AsyncResult(ids[0]).get(timeout=60)["seed"] == 1
    wait_until(lambda: generate.AsyncResult(ids[1]).state == "REVOKED", "the revoked one to be dropped")
    client.hdel("sdtpu:unacked", *client.zrange("sdtpu:delayed", 0, -1))
    client.delete("sdtpu:delayed")
    assert_nothing_left(app, client)
    assert footprint(worker, client).files <= before.files + 8
    with capsys.disabled():
        print(
            f"\nlong queue: {later:,} jobs due in an hour: memory {later_kib:+,} KiB, none held; an urgent job sent"
            f" after them took {urgent_s:.1f} s and one of the lowest priority {behind_s:.1f} s; {waiting:,} waiting"
            f" jobs: at most {most_held} claimed at a time (prefetch {capacity}), memory {waiting_kib:+,} KiB,"
            f" {rate:.0f} jobs/s"
        )
