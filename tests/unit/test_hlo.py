"""What `sdtpu plan` reads of an optimised program, on a small one whose bytes can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtpu_worker.planning.hlo import Shape, parse_module, shapes_in
from sdtpu_worker.planning.hlo_traffic import Traffic, Work
from sdtpu_worker.planning.memory_report import read_total

TICK = (Path(__file__).parent / "hlo" / "tick.txt").read_text()
X, W, SCALAR = 8 * 128 * 4, 256 * 128 * 2, 4


def traffic(text: str = TICK) -> Traffic:
    return Traffic(parse_module(text))


@pytest.mark.parametrize(
    ("text", "size", "space"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 0),
        ("bf16[3,40]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, 0),  # the last tile is filled up
        ("bf16[3,40]{0,1:T(8,128)(2,1)}", 40 * 128 * 2, 0),  # the other axis lies along the lanes
        ("bf16[2,3,40]{2,1,0:T(8,128)(2,1)S(1)}", 2 * 8 * 128 * 2, 1),
        ("pred[]{:T(512)}", 1, 0),
        ("s4[6]", 3, 0),
        ("u32[]{:S(2)}", 4, 2),
    ],
)
def test_a_shape_takes_whole_tiles_of_its_memory(text, size, space):
    (shape,) = shapes_in(text)
    assert (shape.num_bytes, shape.space) == (size, space)


def test_a_shape_without_a_layout_takes_its_elements():
    assert Shape("f32", (3, 5)).num_bytes == 60


def test_a_step_counts_what_it_moves_through_the_hbm_alone():
    step = traffic().tick().step
    # The weights are copied to VMEM, x is read, and the kernel writes its result; what lies in VMEM is free.
    assert step == Work(hbm_bytes=W + X + X, cycles=100, kernels=1)


def test_the_tick_of_a_single_device_has_no_scope_of_the_sharding():
    assert traffic(TICK.replace("/shard_map/while", "/while")).tick() == traffic().tick()


def test_a_loop_counts_as_often_as_it_runs():
    assert traffic().tick().decode == Work(hbm_bytes=5 * 2 * X)


def test_an_insert_is_that_of_a_job_without_a_picture():
    parts = traffic().tick()
    assert parts.insert == Work(hbm_bytes=2 * X)
    copied = 128 * 128 * 4  # the copy has eight rows along the lanes
    assert parts.picture == Work(hbm_bytes=X + copied)


@pytest.mark.parametrize("option", ["windows", "control"])
def test_what_only_some_jobs_ask_for_is_no_part_of_a_step(option):
    plain = traffic().tick()
    kernel = "%kernel.1 = f32[8,128]{1,0:T(8,128)} custom-call(%fusion.1)"
    assert TICK.count(kernel) == 1
    asked = (
        "%asked.1 = f32[8,128]{1,0:T(8,128)} conditional(%flag.1, %x.1, %x.1), true_computation=%picture,"
        f' false_computation=%no_picture, metadata={{op_name="jit(local_tick)/advance/while/body/{option}/cond"}}\n  '
    )
    found = traffic(TICK.replace(kernel, asked + kernel)).tick()
    assert found.step == plain.step
    copied = X + 128 * 128 * 4
    assert getattr(found, option) == Work(hbm_bytes=copied)
    assert getattr(found, {"windows": "control", "control": "windows"}[option]) == Work()
    of_all_jobs = traffic(TICK.replace(kernel, asked.replace(f"/{option}/cond", "/cond") + kernel)).tick()
    assert of_all_jobs.step.hbm_bytes == plain.step.hbm_bytes + copied


def test_a_kernel_looks_at_one_window_in_a_step_and_at_all_beside_it():
    found = Traffic(parse_module(TICK), lambda text, has_windows: 500 if has_windows else 200).tick()
    assert (found.step.kernels, found.step.kernel_cycles) == (1, 200)
    assert found.windows == Work(kernel_cycles=300)


def test_a_phase_and_a_tick_have_what_is_left():
    parts = traffic().tick()
    assert parts.phase == Work(hbm_bytes=2 * X)
    # An update in place reads what it writes and its place, and writes no more than that.
    assert parts.tick == Work(hbm_bytes=2 * X + SCALAR)


def test_a_fusion_that_slices_an_operand_reads_the_slice():
    in_hbm = TICK.replace("fusion(%x.1, %copy-done.1)", "fusion(%x.1, %w.1)")
    assert traffic(in_hbm).tick().step.hbm_bytes == W + X + 8 * 128 * 2 + X


@pytest.mark.parametrize(("space", "size"), [("S(1)", X), ("", 2 * X)])
def test_a_slice_that_is_fetched_ahead_moves_the_slice_alone(space, size):
    """Once code is generated, the text has it so; before, as `async-start` of a computation with a slice."""
    whole, part = "f32[64,128]{1,0:T(8,128)}", f"f32[8,128]{{1,0:T(8,128){space}}}"
    text = f"""HloModule jit_ahead, is_scheduled=true

ENTRY %main (p: f32[64,128]) -> f32[8,128] {{
  %p = {whole} parameter(0)
  %slice-start.1 = (({whole}), {part}, s32[]{{:S(2)}}) slice-start(%p), slice={{[0:8], [0:128]}}
  ROOT %slice-done.1 = {part} slice-done(%slice-start.1)
}}
"""
    assert traffic(text).total() == Work(hbm_bytes=size)


def test_loops_of_unknown_length_are_told():
    unknown = TICK.replace('{"known_trip_count":{"n":"5"}}', "{}")
    assert traffic(unknown).tick().decode == Work(hbm_bytes=2 * X, loops_of_unknown_length=1)


def test_arguments_aliases_and_collectives_are_counted():
    found = traffic()
    assert (found.argument_bytes, found.aliased, found.collectives) == (W + X + SCALAR, 2, {})
    negate = "%negate.11 = f32[8,128]{1,0:T(8,128)} negate(%conditional.12)"
    with_one = TICK.replace(negate, negate.replace("negate(", "all-reduce-start(").replace("%all", "%neg"))
    assert traffic(with_one).collectives == {"all-reduce": 1}


def test_a_program_that_is_no_tick_is_refused():
    with pytest.raises(ValueError, match="no tick"):
        traffic(TICK.replace("/advance/while", "/other/while")).tick()


@pytest.mark.parametrize("text", ["", "something else", TICK[: len(TICK) // 2], "HloModule a\n\n}\n"])
def test_a_text_that_is_not_whole_is_refused(text):
    with pytest.raises(ValueError, match="HLO"):
        parse_module(text)


def test_the_memory_report_says_the_main_memory():
    report = (
        "Memory Space: vmem (color=1)\nTotal bytes: 5 (5B)\nMemory Space: default (color=0)\nTotal bytes: 77 (77B)\n"
    )
    assert read_total(report) == 77
    assert read_total("nothing") is None
