"""The shipped scaling rule in virtual time: KEDA's and the HPA's steps, the hosts that it moves, and a small day."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import yaml

from benchmarks.autoscaling_day import DAY_S, MIX, Day, draw_day, oracle, rate_at
from benchmarks.autoscaling_hosts import LEASE_S, MAX_DELIVERIES, Fleet, Hardware, Job, Preemptions
from benchmarks.autoscaling_rule import MANIFEST, Autoscaler, ScalingRule, grace_s, scrape_interval_s
from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.planning.simulation import LANE, Arrival, Outcomes, make_arrivals, simulate

SHIPPED = ScalingRule.of_manifest()
HARDWARE = Hardware()
NEVER = Preemptions()


def follow(scaler: Autoscaler, metrics: Sequence[float | None], replicas: int, every_s: float = 15.0) -> list[int]:
    """Return the replicas after each look of both loops."""
    seen = []
    for number, metric in enumerate(metrics):
        replicas = scaler.poll(number * every_s, metric, replicas)
        replicas = scaler.sync(number * every_s + 5, metric, replicas)
        seen.append(replicas)
    return seen


def test_the_rule_is_the_one_of_the_shipped_manifest():
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    assert (SHIPPED.polling_s, SHIPPED.cooldown_s) == (spec["pollingInterval"], spec["cooldownPeriod"])
    assert (SHIPPED.least, SHIPPED.most) == (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 10)
    assert SHIPPED.threshold == float(spec["triggers"][0]["metadata"]["threshold"])
    assert scrape_interval_s() == 15
    assert grace_s() == 8


def test_a_manifest_with_what_is_not_simulated_is_refused(tmp_path):
    for old, new in (("selectPolicy", "Min"), ("idle", "")):
        spec = yaml.safe_load(MANIFEST.read_text())
        if old == "idle":
            spec["spec"]["idleReplicaCount"] = 1
        else:
            spec["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleUp"][old] = new
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(spec))
        with pytest.raises(ValueError, match="simulated"):
            ScalingRule.of_manifest(tmp_path / "other.yaml")


def test_one_job_starts_one_host_and_no_job_starts_none():
    assert follow(Autoscaler(SHIPPED), [0, 0, 1], 0) == [0, 0, 1]


def test_hosts_are_added_as_fast_as_the_policies_allow_and_no_further_than_the_threshold_asks():
    load = 7 * SHIPPED.threshold
    seen = follow(Autoscaler(SHIPPED), [load] * 16, 0)
    assert seen[0] == 3  # the first by KEDA, two more by the HPA
    assert seen == sorted(seen)
    assert seen[-1] == 7
    for earlier, later in itertools.pairwise(seen[::4]):  # a minute apart
        assert later <= max(earlier + 2, 2 * earlier)


def test_there_are_never_more_hosts_than_the_manifest_allows():
    assert max(follow(Autoscaler(SHIPPED), [1e6] * 60, 0)) == SHIPPED.most


def test_a_load_within_a_tenth_of_what_the_hosts_are_for_changes_nothing():
    for share, hosts in ((0.91, 4), (1.09, 4), (1.11, 5)):
        assert follow(Autoscaler(SHIPPED), [share * 4 * SHIPPED.threshold], 4) == [hosts]


def test_hosts_go_one_by_one_and_only_after_the_load_was_low_for_the_whole_window():
    seen = follow(Autoscaler(SHIPPED), [6 * SHIPPED.threshold] + [1] * 200, 6)
    window = int(SHIPPED.down.stabilization_s / 15)
    assert set(seen[:window]) == {6}
    assert seen[-1] == 1  # the last one is KEDA's, and a job is there
    (policy,) = SHIPPED.down.policies
    assert all(a - b <= policy.value for a, b in zip(seen, seen[int(policy.period_s / 15) :], strict=False))


def test_the_last_host_goes_only_after_the_cooldown():
    seen = follow(Autoscaler(SHIPPED), [1] + [0] * 100, 1)
    assert seen.index(0) == SHIPPED.cooldown_s / 15 + 1


def test_while_prometheus_is_away_no_host_comes_or_goes():
    for replicas in (0, 1, 5):
        assert set(follow(Autoscaler(SHIPPED), [None] * 200, replicas)) == {replicas}


def fleet_of(hosts: int, preemptions: Preemptions = NEVER, hardware: Hardware = HARDWARE) -> Fleet:
    """Return a fleet whose hosts are ready at the time 0."""
    fleet = Fleet(dataclasses.replace(hardware, cold_s=0.0, warm_s=0.0), preemptions, grace_s=8.0)
    fleet.scale(hosts)
    fleet.run(lambda: all(host.is_ready for host in fleet.hosts))
    return fleet


def jobs_of(fleet: Fleet, *steps: int) -> list[Job]:
    jobs = [Job(fleet.now, each) for each in steps]
    for job in jobs:
        fleet.enqueue(job)
    return jobs


def play(fleet: Fleet, until_s: float) -> None:
    fleet.at(until_s, lambda: None)
    fleet.run(lambda: fleet.now >= until_s)


def test_a_host_that_stops_finishes_what_it_can_and_hands_over_the_rest_at_its_step():
    fleet = fleet_of(1)
    short, long, *_ = jobs = jobs_of(fleet, 20, 50, *[50] * 12)  # 8 slots, 6 next in line
    play(fleet, 4.0)
    fleet.scale(0)
    assert (len(fleet.queue), fleet.load()) == (6, 14)
    fleet.scale(1)
    play(fleet, 100.0)
    assert all(job.done_at > 0 for job in jobs)
    assert short.done_at == pytest.approx(HARDWARE.job_s(20))
    done = int((12 / HARDWARE.ticks - HARDWARE.insert_s) / HARDWARE.step_s)
    assert long.done_at == pytest.approx(12 + HARDWARE.job_s(50 - done))  # not from its first step
    assert fleet.handed_over == 6 + 7


def test_jobs_of_a_host_that_dies_come_back_after_their_lease_and_start_anew():
    fleet = fleet_of(2)
    jobs = jobs_of(fleet, *[50] * 16)
    play(fleet, LEASE_S + 10)
    assert all(job.done_at > 0 for job in jobs)
    jobs = jobs_of(fleet, *[50] * 16)
    died_at = fleet.now + 1
    play(fleet, died_at)
    dead = fleet.hosts.pop()
    fleet._die(dead)
    assert fleet.load() == 16  # leases count until they expire
    play(fleet, died_at + 2 * LEASE_S + 2 * HARDWARE.job_s(50))
    late = [job for job in jobs if job.died]
    assert len(late) == 8 == fleet.redelivered
    for job in late:
        assert died_at + LEASE_S * 2 / 3 + HARDWARE.job_s(50) <= job.done_at
        assert job.done_at <= died_at + LEASE_S * 4 / 3 + 2 * HARDWARE.job_s(50)


def test_jobs_of_the_last_host_wait_for_one_that_has_been_in_contact_for_a_lease():
    fleet = fleet_of(1)
    (job,) = jobs_of(fleet, 10)
    fleet._die(fleet.hosts.pop())
    play(fleet, 100)
    assert (job.done_at, fleet.load()) == (-1.0, 1)
    fleet.scale(1)
    ready_at = fleet.now
    play(fleet, ready_at + 3 * LEASE_S)
    assert job.done_at >= ready_at + LEASE_S


def test_a_job_fails_after_as_many_deaths_as_the_setting_says():
    fleet = fleet_of(4)
    (job,) = jobs_of(fleet, 1000)
    for died in range(1, MAX_DELIVERIES + 1):
        host = next(host for host in fleet.hosts if job in host.running)
        fleet.hosts.remove(host)
        fleet._die(host)
        assert job.died == died
        play(fleet, fleet.now + 2 * LEASE_S)
    assert job.has_failed


COSTS = TickCosts(8, Cost(HARDWARE.step_s, HARDWARE.insert_s, HARDWARE.decode_s))


def serve_by_ticks(process: str, load: float, count: int, hosts: int = 1) -> tuple[list[Arrival], Outcomes]:
    """Return what the simulator of every tick says, for a load in shares of what slots without ticks would make."""
    mean_s = sum(HARDWARE.job_s(steps) for steps in MIX) / len(MIX) / HARDWARE.ticks
    arrivals = make_arrivals(process, load * hosts * HARDWARE.slots / mean_s, count, MIX)
    return arrivals, simulate(arrivals, lambda own: Aggregator({LANE: own}, 1, 2, 0.1), COSTS, hosts)


def test_a_tick_lasts_longer_than_the_work_of_a_slot_by_the_share_that_the_simulator_of_every_tick_says():
    _, theirs = serve_by_ticks("all-at-once", 1, 400)
    mean_s = sum(HARDWARE.job_s(steps) for steps in MIX) / len(MIX)
    assert HARDWARE.slots / mean_s == pytest.approx(theirs.throughput, rel=0.02)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_hosts_of_slots_serve_as_the_simulator_of_every_tick_says_and_never_better(load):
    arrivals, theirs = serve_by_ticks("poisson", load, 500, hosts=3)
    fleet = fleet_of(3)
    jobs = [Job(arrival.at_s, arrival.num_steps) for arrival in arrivals]
    for job in jobs:
        fleet.at(job.at_s, fleet.enqueue, job)
    fleet.run(lambda: False)
    latencies = sorted(job.done_at - job.at_s for job in jobs)
    for ours_s, theirs_s in (
        (sum(latencies) / len(latencies), theirs.mean_s),
        (latencies[int(0.99 * len(latencies))], theirs.percentile_s(99)),
    ):
        assert theirs_s <= ours_s <= 1.15 * theirs_s


def test_a_day_has_a_night_and_an_afternoon_and_is_drawn_from_its_seed():
    assert rate_at(4 * 3600) * 100 < rate_at(16 * 3600)
    times = [job.at_s for job in draw_day(1, 0.1)]
    assert times == sorted(times) == [job.at_s for job in draw_day(1, 0.1)]
    assert times != [job.at_s for job in draw_day(2, 0.1)]
    assert 0 <= times[0] < times[-1] < DAY_S


def test_no_job_of_a_small_day_is_lost_while_hosts_come_from_zero_are_preempted_and_go_to_zero_again():
    day = Day(SHIPPED, HARDWARE, Preemptions(mean_s=1800), seed=3, scale=0.1)
    figures = day.run()
    assert (figures.lost, figures.failed) == (0, 0)
    assert figures.deaths > 10
    assert figures.redelivered > 0
    assert figures.handed_over > 0
    assert figures.most_hosts > 1
    assert not day.fleet.hosts
    best = oracle(draw_day(3, 0.1), HARDWARE, SHIPPED.most)
    assert best.wait_p99_s <= figures.wait_p99_s
    work_hours = sum(HARDWARE.job_s(job.steps) for job in day.jobs) / HARDWARE.slots / 3600
    assert work_hours < best.host_hours < figures.host_hours


def test_a_trigger_on_what_waits_alone_takes_hosts_from_their_jobs():
    shipped = Day(SHIPPED, HARDWARE, NEVER, seed=3, scale=0.2).run()
    waiting = Day(SHIPPED, HARDWARE, NEVER, seed=3, scale=0.2, counts_held=False).run()
    assert waiting.stops > 1.5 * shipped.stops
    assert waiting.handed_over > shipped.handed_over
