"""What the benchmarks are built on: the simulator keeps the rules, the compared policies and plans are right."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks import simulate
from benchmarks.fixed_policy import FixedBatches
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.planning.simulation import LANE, Arrival, make_arrivals
from sdtpu_worker.planning.simulation import simulate as run_pool
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob

COSTS = TickCosts(8, Cost(0.03, 0.01, 0.05))  # eight devices that do not slow each other down
STEPS = (10, 20, 30, 50)


def step_level(costs):
    return Aggregator({LANE: costs}, 1, 2, 0.1)


def bucketed(costs):
    return FixedBatches({LANE: costs}, 1, 2, bucketed=True)


def mixed(costs):
    return FixedBatches({LANE: costs}, 1, 2, bucketed=False)


@pytest.mark.parametrize("policy", [step_level, bucketed, mixed])
def test_a_job_alone_takes_its_own_time_and_the_overhead(policy):
    done = run_pool([Arrival(0.0, 30)], policy, COSTS, overhead_s=0.5)
    alone_s = 30 * 0.03 + 0.01 + 0.05
    assert alone_s + 0.5 <= done.latencies_s[0] < alone_s + 0.5 + 0.05
    assert done.waste == pytest.approx(0)


@pytest.mark.parametrize("policy", [step_level, bucketed, mixed])
@pytest.mark.parametrize("process", ["all-at-once", "poisson", "bursty"])
@pytest.mark.parametrize("hosts", [1, 3])
def test_every_job_of_every_process_is_done_once_and_not_before_its_time(policy, process, hosts):
    arrivals = make_arrivals(process, 6.0 * hosts, 200, STEPS, (0, 6, 9), seed=hosts)
    done = run_pool(arrivals, policy, COSTS, hosts, batches_held=4)
    assert len(done.latencies_s) == 200
    for arrival, latency_s in zip(arrivals, done.latencies_s, strict=True):
        assert latency_s >= arrival.num_steps * 0.03 + 0.06 - 1e-9
    assert 0 < done.occupancy <= 1
    assert done == run_pool(arrivals, policy, COSTS, hosts, batches_held=4), "nothing is left to chance"


def test_rates_and_bursts_are_as_asked():
    for process in ("poisson", "bursty"):
        arrivals = make_arrivals(process, 5.0, 4000, STEPS, seed=3)
        assert 4000 / arrivals[-1].at_s == pytest.approx(5.0, rel=0.15)
    sizes = Counter(arrival.at_s for arrival in make_arrivals("bursty", 5.0, 4000, STEPS))
    assert max(sizes.values()) > 20
    with pytest.raises(ValueError, match="got 'uniform'"):
        make_arrivals("uniform", 5.0, 1, STEPS)


def test_step_level_batching_beats_fixed_batches_of_mixed_lengths():
    limit_s = run_pool(make_arrivals("all-at-once", 1, 400, STEPS), step_level, COSTS).throughput
    for load in (0.6, 0.8):
        arrivals = make_arrivals("poisson", load * limit_s, 800, STEPS)
        ours = run_pool(arrivals, step_level, COSTS)
        fixed = [run_pool(arrivals, policy, COSTS, batches_held=8) for policy in (bucketed, mixed)]
        assert ours.mean_s < 0.5 * min(done.mean_s for done in fixed)
        assert ours.percentile_s(99) < 0.55 * min(done.percentile_s(99) for done in fixed)
        assert ours.waste < 0.01


def test_urgent_jobs_wait_less_and_more_hosts_serve_more():
    arrivals = make_arrivals("bursty", 12.0, 400, STEPS, (0, 6))
    one, two = (run_pool(arrivals, step_level, COSTS, hosts) for hosts in (1, 2))
    assert one.percentile_s(95, priority=0) < 0.7 * one.percentile_s(95, priority=6)
    assert two.mean_s < one.mean_s


def test_the_fewest_hosts_are_found():
    for fewest in (1, 2, 7, 64, 999, 1000):
        assert simulate.fewest_hosts(fewest.__le__, least=1) == fewest
    assert simulate.fewest_hosts(lambda count: False, least=3) is None


def test_the_commands_answer_and_draw(tmp_path, capsys):
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"512x512": COSTS.to_json()}))
    common = ["--costs", str(costs), "--jobs", "100"]
    simulate.main(["run", *common, "--arrivals", "bursty", "--priorities", "0,6"])
    assert "priority 6" in capsys.readouterr().out
    simulate.main(["curves", *common, "--independent", "--plot", str(tmp_path / "curves.png")])
    assert "95% fixed, mixed" in capsys.readouterr().out
    simulate.main(["hosts", *common, "--rate", "40", "--p99", "3", "--plot", str(tmp_path / "hosts.png")])
    assert "hosts serve 40 jobs/s with a p99 of" in capsys.readouterr().out
    for name in ("curves.png", "hosts.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        simulate.main(["run", "--costs", str(tmp_path / "not there.json")])
    assert "engine.py --json wrote" in capsys.readouterr().err


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_fixed_batches_run_to_their_end_and_nobody_joins(bucketed, slots):
    policy, engine = FixedBatches({LANE: COSTS}, slots, 2, bucketed), FakeEngine()
    jobs = {str(i): FakeJob(str(i), STEPS[i % 4], lane=LANE) for i in range(60)}
    for task_id, job in jobs.items():
        policy.add(task_id, LANE, job.num_steps, 0.0)
    images = {}
    batches = []
    while plan := policy.plan(0.0):
        if started := set(plan.inserted()):
            batches.append(started)
        images |= {image.task_id: image.pixels for image in engine.execute(plan, jobs).wait()}
    assert images == {task_id: job.num_steps for task_id, job in jobs.items()}
    if bucketed:
        assert all(len({jobs[task_id].num_steps for task_id in batch}) == 1 for batch in batches)
