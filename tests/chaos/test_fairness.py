"""Fair shares between tenants, urgent jobs in a tenant's queue, and refusals by the load that real workers publish.

    pytest tests/chaos/test_fairness.py -n 0

Two cores, workers on the fake engine: five jobs behind another tenant's 70 were done when 4 to 7 of those were; an
urgent one behind full hands took 0.6 s; a killed worker's report was gone after 12.5 s.
"""

from __future__ import annotations

import time

import pytest
import redis

from sdtpu_worker import DeadlineUnreachable, QueueFull, generate
from sdtpu_worker.contract.load_report import LOAD_TTL_S, read_loads
from sdtpu_worker.contract.queues import tenant_queue
from tests.chaos.fleet import Fleet
from tests.chaos.footprint import assert_nothing_left, pool_stats
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHARDS = 4
GREEDY, MODEST = "a", "d"


@pytest.fixture(scope="module")
def fleet(redis_url, tmp_path_factory):
    with Fleet(redis_url, tmp_path_factory.mktemp("fairness"), SDTPU_TENANT_SHARDS=str(SHARDS), SDTPU_FAKE_STEP_MS="5",
               SDTPU_CPU_DEVICES="4", SDTPU_SLOTS_PER_DEVICE="1") as fleet:  # fmt: skip
        yield fleet


@pytest.fixture
def client(fleet):
    with redis.Redis.from_url(fleet.redis_url) as client:
        yield client


@pytest.fixture
def app_conf():
    return {"sdtpu_tenant_shards": SHARDS}


def order(tenant: str | None, count: int, steps: int, priority: int = 6, **options):
    kwargs = {"num_inference_steps": steps, "tenant": tenant}
    return [generate.apply_async(("x",), {"seed": i, **kwargs}, priority=priority, **options) for i in range(count)]


def finished_at(jobs) -> list[float]:
    """Wait for jobs; return when each was done, in the worker's words."""
    for job in jobs:
        job.get(timeout=90)
    return [job.date_done.timestamp() for job in jobs]


def test_each_tenant_is_served_in_its_turn(fleet, app, client, capsys):
    queues = [tenant_queue("sdtpu", tenant, SHARDS) for tenant in (GREEDY, MODEST)]
    assert queues[0] != queues[1]
    levels = (3, 6, 9)
    greedy = {priority: order(GREEDY, 70, 20, priority) for priority in levels}
    modest = {priority: order(MODEST, 5, 20, priority) for priority in levels}
    worker = fleet.start("fair")
    greedy_at, modest_at = ({level: finished_at(jobs[level]) for level in levels} for jobs in (greedy, modest))
    done_before = {level: sum(at <= max(modest_at[level]) for at in greedy_at[level]) for level in levels}
    capacity = 2 * pool_stats(app)["slots"]
    assert max(done_before.values()) <= 5 + capacity, "five jobs take turns with five of the first's"
    for urgent, less_urgent in ((3, 6), (6, 9)):
        assert max(greedy_at[urgent]) < max(modest_at[less_urgent]), "a more urgent job goes first, whosever it is"
    assert_nothing_left(app, client)
    assert worker.stop() == 0
    with capsys.disabled():
        print(
            f"\nfair shares: five jobs sent behind another tenant's 70 of their priority were done when"
            f" {', '.join(map(str, done_before.values()))} of those were (priorities 3, 6 and 9)"
        )


def test_an_urgent_job_in_a_tenants_queue_takes_a_slot_from_behind_the_prefetch_limit(fleet, app, client, capsys):
    worker = fleet.start("urgent")
    low = order(None, 12, 1000, priority=9)
    wait_until(lambda: pool_stats(app)["deliveries"]["held"] == 8, "the worker's hands to be full")
    started = time.monotonic()
    (urgent,) = order(MODEST, 1, 4, priority=0)
    urgent.get(timeout=60)
    urgent_s = time.monotonic() - started
    assert not any(job.ready() for job in low[4:])
    assert pool_stats(app)["loop"]["preemptions"] >= 1
    for job in low:
        job.get(timeout=90)

    def credits() -> int:
        (stats,) = app.control.inspect(timeout=30, limit=1).stats().values()
        return stats["prefetch_count"]

    wait_until(lambda: credits() == 8, "the credit to be taken back")
    assert_nothing_left(app, client)
    assert worker.stop() == 0
    with capsys.disabled():
        print(f"\nurgent: a job in a tenant's queue behind full hands took {urgent_s:.2f} s")


def test_the_load_of_real_workers_refuses_what_cannot_be_done_and_ends_with_them(fleet, app, client, capsys):
    def loads() -> list[str]:
        return [load.host for load in read_loads(client, "sdtpu")]

    workers = [fleet.start(name, SDTPU_FAKE_STEP_MS="20") for name in ("stopped", "killed")]
    finished_at(order(None, 10, 40))  # now they know how long a job takes
    wait_until(lambda: len(loads()) == 2, "both to report")
    running = order(None, 60, 1000)
    wait_until(lambda: client.llen("sdtpu\x06\x166") < 50, "their hands to be full")
    wait_until(lambda: all(sum(load.held.values()) >= 8 for load in read_loads(client, "sdtpu")), "them to say so")
    with pytest.raises(DeadlineUnreachable, match="2 workers have 8 slots") as deadline:
        order(None, 1, 40, expires=0.2)
    assert deadline.value.eta_s > 0.2
    order(None, 1, 1, expires=600)[0].revoke()
    app.conf.sdtpu_max_queue = 20
    try:
        with pytest.raises(QueueFull, match="jobs wait ahead of it"):
            order(None, 1, 40)
        order(MODEST, 1, 1)[0].revoke()
    finally:
        app.conf.sdtpu_max_queue = 0
    for each in running:
        app.control.revoke(each.id, terminate=True)
    client.delete("sdtpu\x06\x166")
    stopped, killed = workers
    assert stopped.stop() == 0
    assert loads() == ["killed@chaos"], "withdrawn at once"
    killed.kill()
    at = time.monotonic()
    wait_until(lambda: loads() == [], "the report to run out", 4 * LOAD_TTL_S)
    gone_s = time.monotonic() - at
    (job,) = order(None, 1, 1, expires=0.2)
    job.revoke()
    with capsys.disabled():
        print(f"\nrefusals: by two workers' loads; withdrawn on a stop, gone {gone_s:.1f} s after a kill")
