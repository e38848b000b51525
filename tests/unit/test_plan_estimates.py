"""What `sdtpu plan` says of a chip from what was compiled for it: peaks, estimates, hosts for a load."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning.chips import CHIPS, GIB, parse_topology
from sdtpu_worker.planning.estimates import best, estimate, scale
from sdtpu_worker.planning.load import hosts_for_load
from tests.support.plan_facts import MORE, V5E, WEIGHTS, facts, work

# Chips


def test_peaks_follow_from_clock_and_matrix_units():
    units = {"v4": 8, "v5e": 4, "v5p": 8, "v6e": 4}
    for chip in CHIPS.values():
        assert 2 * units[chip.name] * chip.lanes**2 * chip.clock_hz == pytest.approx(chip.flops, rel=0.002)


@pytest.mark.parametrize(
    ("m", "k", "n", "padded"),
    [
        (4096, 320, 1280, 2 * 4096 * 384 * 1280),
        (4096, 40, 4096, 2 * 4096 * 128 * 4096),  # scores of heads of 40
        (40, 4096, 4096, 2 * 128 * 4096 * 4096),  # and their values: rows do not hide the loading of tiles
        (4096, 4096, 40, 2 * 128 * 4096 * 4096),
    ],
)
def test_a_matrix_unit_works_on_whole_tiles(m, k, n, padded):
    assert V5E.padded_flops(m, k, n) == padded


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [("v6e", "v6e:2x4", 8), ("v5e:2x2", "v5e:2x2", 4), ("v4", "v4:2x2x1", 4), ("v5e:", "v5e:2x4", 8)],
)
def test_a_topology_is_a_chip_and_its_layout(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips) == (name, chips)


@pytest.mark.parametrize("text", ["v7", "", "v5e:2x4x1", "v4:2x2", "v5e:0x4", "v5e:4x4", "v5e:2x4 "])
def test_another_topology_is_refused(text):
    with pytest.raises(ConfigurationError, match="--topology must"):
        parse_topology(text)


# Estimates


def test_a_step_takes_the_longest_of_its_limits():
    found = estimate(facts(2), 2, V5E)
    assert (found.step.limit, found.step.seconds) == ("HBM traffic", pytest.approx(4e-3))
    assert found.hbm_gb_per_image_step == pytest.approx((WEIGHTS + 2 * MORE) / 2e9)
    assert found.ms_per_image_step == pytest.approx(2)
    assert found.decode.limit == "padded FLOPs"
    slower = estimate(facts(2, cycles=9_000_000), 2, V5E)
    assert (slower.step.limit, slower.step.seconds) == ("cycles", pytest.approx(6e-3))


def test_kernels_run_after_the_compilers_own_operations_and_not_beside_them():
    found = estimate(facts(2, cycles=6_000_000, kernel_cycles=3_000_000), 2, V5E)
    assert (found.step.limit, found.step.seconds) == ("cycles", pytest.approx(6e-3))
    assert (found.step.cycles, found.step.kernel_cycles) == (6_000_000, 3_000_000)
    doubled = scale(facts(2, cycles=6_000_000, kernel_cycles=3_000_000), found, 4, V5E)
    assert doubled.step.kernel_cycles == 6_000_000


def test_what_kernels_leave_out_is_in_the_flops_and_not_in_what_the_matrix_unit_does():
    less = facts(1)
    less["matmuls_on_chip"] = {**less["matmuls"], "decode": [[128, 128, 128, 3]]}
    found = estimate(less, 1, V5E).decode
    assert (found.flops, found.padded_flops) == (7 * 2 * 128**3, 3 * 2 * 128**3)


def test_latency_and_images_follow_from_the_step():
    found = estimate(facts(2), 2, V5E)
    decode_s = 7 * 2 * 128**3 / V5E.flops
    assert found.latency_s(20) == pytest.approx(20 * 4e-3 + decode_s)
    assert found.images_per_s(20) == pytest.approx(8 * 2 / (20 * 4e-3 + 2 * decode_s))


def test_other_slot_counts_read_the_weights_once():
    scaled = scale(facts(1), estimate(facts(1), 1, V5E), 4, V5E)
    compiled = estimate(facts(4), 4, V5E)
    assert (scaled.kind, compiled.kind) == ("arithmetic", "compiled")
    assert scaled.step == compiled.step
    assert scaled.total_bytes == 2 * GIB + 4 * GIB


def test_what_only_some_jobs_ask_for_stands_beside_the_step():
    found = estimate(facts(2) | {"prompt_windows": 1}, 2, V5E)
    assert (found.windows, found.control) == (None, None)
    more = facts(2) | {"controlnets": ["pose"], "controlnet_bytes": WEIGHTS}
    more["programs"]["tick"]["parts"] |= {"windows": work(MORE), "control": work(WEIGHTS + 2 * MORE)}
    whole = estimate(more, 2, V5E)
    assert whole.step == found.step
    assert (whole.windows.hbm_bytes, whole.control.flops) == (MORE, 9 * 2 * 2 * 128**3)
    scaled = scale(more, whole, 4, V5E)
    assert (scaled.windows.hbm_bytes, scaled.control.hbm_bytes) == (2 * MORE, WEIGHTS + 4 * MORE)


def test_what_needs_more_memory_than_the_chip_has_does_not_fit():
    assert estimate(facts(1, temp=13 * GIB), 1, V5E).fits
    assert not estimate(facts(1, temp=14 * GIB), 1, V5E).fits
    assert estimate(facts(1, temp=14 * GIB), 1, CHIPS["v6e"]).fits


def test_the_best_setting_fits_and_has_no_slots_that_gain_nothing():
    one, four = (estimate(facts(slots), slots, V5E) for slots in (1, 4))
    assert best([one, four], 30) == four
    assert best([one, replace(four, fits=False)], 30) == one
    assert best([one, replace(four, slots=2, step=replace(four.step, seconds=2 * one.step.seconds))], 30) == one
    assert best([replace(one, fits=False)], 30) is None


# Loads


def test_hosts_and_money_for_a_load():
    setting = estimate(facts(4), 4, V5E)  # 32 slots, 6 ms a step: about 178 images of 30 steps a second
    limit = 3600 * setting.images_per_s(30)
    found = hosts_for_load(setting, 2.5 * limit, [30], 5.0, 8, 1.5)
    assert found["kind"] == "simulated"
    assert found["hosts"] == 3
    assert found["p99_s"] <= 5
    assert found["cost_per_hour"] == 3 * 8 * 1.5
    assert found["cost_per_1000_images"] == pytest.approx(1000 * 36 / (2.5 * limit), rel=1e-2)
    assert hosts_for_load(setting, limit / 2, [30], 5.0, 8, None)["cost_per_hour"] is None


def test_a_latency_that_no_host_reaches_is_refused():
    with pytest.raises(ConfigurationError, match="--p99 must be more than"):
        hosts_for_load(estimate(facts(4), 4, V5E), 100, [1000], 1.0, 8, None)


def test_hosts_are_planned_with_a_reserve_and_a_part_of_a_great_load_is_simulated():
    setting = estimate(facts(4), 4, V5E)
    limit = 3600 * setting.images_per_s(30)
    assert hosts_for_load(setting, 0.94 * limit, [30], 60.0, 8, None)["hosts"] == 1
    assert hosts_for_load(setting, 0.97 * limit, [30], 60.0, 8, None)["hosts"] == 2
    great = hosts_for_load(setting, 500 * limit, [30], 5.0, 8, None)
    assert 500 / 0.95 <= great["hosts"] <= 580
    assert great["simulated_jobs"] >= 100 * 4 * great["simulated_hosts"]
    assert great["utilisation"] <= 0.95


def test_a_load_for_more_hosts_than_are_simulated_is_refused_at_once():
    with pytest.raises(ConfigurationError, match=r"--load must be one that 1000 hosts serve, at most .* got 1e"):
        hosts_for_load(estimate(facts(4), 4, V5E), 1e12, [30], 30.0, 8, None)
