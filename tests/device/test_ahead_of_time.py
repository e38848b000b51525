"""Programs for devices that are not here: counts of what is traced, and real compiles with libtpu."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.abstract_checkpoint import read_abstract
from sdtpu_worker.diffusion.ahead_of_time import _matmuls, count_parts
from sdtpu_worker.diffusion.families.family import PictureUse
from sdtpu_worker.diffusion.matmul_counts import collecting_kernels, count_least_and_most, count_matmuls
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.planning.hlo import parse_module
from sdtpu_worker.planning.hlo_traffic import Traffic
from tests.support.paths import ROOT

LIMIT_S = 280


def flops(matmuls: list[list[int]]) -> int:
    return sum(2 * m * k * n * times for m, k, n, times in matmuls)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# Counts


def test_products_and_convolutions_are_counted():
    def function(a, b, image, kernel):
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.einsum("bik,bkj->bij", a, b), out

    found = count_matmuls(function, shape(3, 5, 7), shape(3, 7, 11), shape(2, 4, 6, 8), shape(3, 3, 8, 16))
    assert found == {(5, 7, 11): 3, (2 * 4 * 6, 8, 16): 9}


def test_loops_count_as_often_as_they_run_and_the_dearest_branch_counts():
    def function(a, b, flag):
        def step(i, carry):
            return carry @ b

        looped = jax.lax.fori_loop(0, 6, step, a)
        return jax.lax.cond(flag, lambda: jax.jit(jnp.matmul)(looped, b) @ b, lambda: looped @ b)

    found = count_matmuls(function, shape(2, 4), shape(4, 4), jax.ShapeDtypeStruct((), bool))
    assert found == {(2, 4, 4): 6 + 2}


def test_the_cheapest_branch_is_counted_beside_the_dearest():
    def function(a, b, flag):
        return jax.lax.cond(flag, lambda: a @ b @ b, lambda: a @ b)

    least, most = count_least_and_most(function, shape(2, 4), shape(4, 4), jax.ShapeDtypeStruct((), bool))
    assert (least, most) == ({(2, 4, 4): 1}, {(2, 4, 4): 2})


def test_a_kernel_counts_once_for_each_place_of_its_grid():
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def function(a, b):
        blocks = [pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))]
        return pl.pallas_call(
            kernel, jax.ShapeDtypeStruct((40, 32), a.dtype), grid=(5,), in_specs=blocks,
            out_specs=pl.BlockSpec((8, 32), lambda i: (i, 0)), interpret=True, name="product",
        )(a, b)  # fmt: skip

    assert count_matmuls(function, shape(40, 16), shape(16, 32)) == {(8, 16, 32): 5}
    looped = jax.jit(lambda a, b: jax.lax.fori_loop(0, 3, lambda i, y: y + function(a, b), function(a, b)))
    with collecting_kernels() as found:
        count_matmuls(looped, *(jax.ShapeDtypeStruct(sizes, jnp.bfloat16) for sizes in ((40, 16), (16, 32))))
    ((key, work),) = found.items()
    assert key == "product(bf16[40,16], bf16[16,32])"
    assert (work.steps, work.matmuls, work.matmuls_of_one_window) == (5, {(8, 16, 32): 5}, {(8, 16, 32): 5})
    assert work.equation.params["name"] == "product"


# Models as shapes


@pytest.mark.parametrize(
    ("name", "parameters", "size"),
    [("sd15", 859_520_964, (512, 512)), ("sd21", 865_910_724, (768, 768)), ("sdxl", 2_567_463_684, (1024, 1024))],
)
def test_known_models_have_the_public_checkpoints_parameters(name: str, parameters: int, size: Lane):
    found = read_abstract(name, jnp.bfloat16)
    assert sum(leaf.size for leaf in found.params["unet"].values()) == parameters
    assert {leaf.dtype for leaf in found.params["unet"].values()} == {jnp.dtype(jnp.bfloat16)}
    assert found.family.default_size == size
    assert (found.family.rows, found.defaults.num_inference_steps, found.adapters) == (2, 50, None)


def test_a_folder_of_configs_is_the_same_model_as_its_weights(shipped_shapes):
    found = read_abstract("embedded", jnp.float32)
    assert {(part, name): leaf.shape for part, leaves in found.params.items() for name, leaf in leaves.items()} == (
        shipped_shapes
    )


@pytest.fixture
def shipped_shapes() -> dict[tuple[str, str], tuple[int, ...]]:
    from sdtpu_worker.diffusion.checkpoint import load_checkpoint

    params = load_checkpoint("embedded").params
    return {(part, name): leaf.shape for part, leaves in params.items() for name, leaf in leaves.items()}


def test_guidance_and_adapters_follow_the_options():
    found = read_abstract("embedded", jnp.bfloat16, guidance="off", lora_rank=4)
    assert found.family.rows == 1
    assert found.adapters is not None
    assert found.adapters.rank == 4


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd15", 361_279_120), ("sdxl", 1_251_014_160)],  # as diffusers' own class has
)
def test_a_usual_controlnet_has_the_public_ones_parameters(name: str, parameters: int):
    found = read_abstract(name, jnp.bfloat16, controlnets={"usual 1": "", "usual 2": ""})
    assert found.family.control_names == ("usual 1", "usual 2")
    for part in ("controlnet usual 1", "controlnet usual 2"):
        assert sum(leaf.size for leaf in found.params[part].values()) == parameters


def test_long_prompts_and_controlnets_count_beside_the_step():
    counts = {}
    for windows in (1, 2, 3):
        found = read_abstract("embedded", jnp.bfloat16, prompt_windows=windows, controlnets={"usual 1": ""})
        geometry = Geometry.of(found.family, 1, 2, found.family.default_size)
        counts[windows] = count_parts(found.family, found.params, geometry)
    assert counts[3]["step"] == counts[1]["step"]
    assert counts[3]["insert"] == counts[1]["insert"]
    assert counts[3]["control"] == counts[1]["control"] != []
    assert counts[1]["windows"] == []
    assert flops(counts[2]["windows"]) > 0
    # Keys and values of a further window cost as much as those of the one before, and so does attending to it.
    assert flops(counts[3]["windows"]) == 2 * flops(counts[2]["windows"])


def test_on_a_tpu_small_layers_look_at_all_windows_in_every_step_and_kernels_at_those_that_a_row_has():
    facts = {}
    for windows in (1, 3):
        found = read_abstract("embedded", jnp.bfloat16, prompt_windows=windows)
        geometry = Geometry.of(found.family, 1, 2, (256, 256))  # layers of 1,024 and of 256 pixels
        facts[windows], _ = _matmuls(found.family, found.params, geometry, "tpu")

    def whole(windows: int, name: str) -> int:
        return flops(facts[windows][name]["step"]) + flops(facts[windows][name]["windows"])

    one, three = (facts[windows]["matmuls_on_chip"] for windows in (1, 3))
    assert flops(one["step"]) < flops(three["step"])
    assert flops(three["step"]) - flops(one["step"]) < flops(three["windows"])
    # Whatever is part of the step, all together is what the layers do, but for what enlargements leave out.
    assert whole(3, "matmuls_on_chip") - whole(1, "matmuls_on_chip") == whole(3, "matmuls") - whole(1, "matmuls")
    of_windows = [each for key, each in facts[3]["kernels"].items() if "_of_windows(" in key]
    assert of_windows
    assert all(0 < flops(each["matmuls_of_one_window"]) < flops(each["matmuls"]) for each in of_windows)
    others = [each for key, each in facts[1]["kernels"].items()]
    assert all(each["matmuls_of_one_window"] == each["matmuls"] for each in others)


def test_what_the_programs_have_no_room_for_is_not_there():
    found = read_abstract("embedded", jnp.bfloat16, image_inputs=False)
    assert found.family.picture_use is PictureUse.NONE
    assert not any("encoder" in name for name in found.params["vae"])


@pytest.mark.parametrize("name", ["sd3", "/no/such/folder", "owner/name"])
def test_a_model_that_is_not_there_is_refused(name: str):
    with pytest.raises(InvalidCheckpoint, match=r"--model must be one of sd15, sd21, sdxl, embedded"):
        read_abstract(name, jnp.bfloat16)


def test_a_folder_without_configs_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="model_index"):
        read_abstract(str(tmp_path), jnp.bfloat16)


# Programs


def test_a_program_of_this_machine_is_read():
    def function(x, table):
        return jax.lax.fori_loop(0, 7, lambda i, carry: jnp.sin(carry) @ table, x)

    text = jax.jit(function).lower(shape(64, 64), shape(64, 64)).compile().as_text()
    found = Traffic(parse_module(text))
    assert found.argument_bytes == 2 * 64 * 64 * 4
    assert found.collectives == {}
    assert found.total().loops_of_unknown_length == 0
    assert found.total().hbm_bytes >= 7 * 3 * 64 * 64 * 4  # each of seven rounds reads x and the table, and writes x


def plan(*arguments: str, temporary: Path) -> list[str]:
    return [
        sys.executable, "-c", "import sys; sys.argv[0] = 'sdtpu'; from sdtpu_worker.cli import sdtpu; sdtpu()",
        "plan", "--model", "embedded", "--slots-per-device", "1", "--cache", str(temporary / "cache"), *arguments,
    ]  # fmt: skip


def environment(temporary: Path) -> dict[str, str]:
    scratch = temporary / "tmp"
    scratch.mkdir(exist_ok=True)
    return {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_the_shipped_model_is_planned_for_a_real_chip_and_remembered(tmp_path: Path):
    options = ["--json", "--load", "1000", "--price", "1", "--topology", "v5e:1x1"]
    command, env = plan(*options, temporary=tmp_path), environment(tmp_path)
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    assert "compiling" in run.stderr
    found = json.loads(run.stdout)
    (compiled,) = (each for each in found["settings"] if each["kind"] == "compiled")
    assert (found["topology"], found["answer"], found["best_slots_per_device"]) == ("v5e:1x1", "quick", 1)
    assert compiled["fits"]
    assert compiled["collectives"] == 0
    assert compiled["aliased_buffers"] == compiled["state_buffers"] > 0
    assert compiled["memory"]["argument_bytes"] > 5_000_000  # the parameters alone
    assert compiled["memory"]["total_bytes"] > compiled["memory"]["argument_bytes"]
    assert compiled["padded_gflops_per_image_step"] > compiled["gflops_per_image_step"] > 0
    assert compiled["hbm_gb_per_image_step"] > 0
    assert found["load"]["hosts"] == 1
    assert list((tmp_path / "tmp").iterdir()) == []
    started = time.monotonic()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert "compiled before" in again.stderr
    assert "compiling" not in again.stderr
    assert json.loads(again.stdout) == found
    assert time.monotonic() - started < LIMIT_S / 2


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "65"], "must be multiples of"),
        (["--model", "/no/such/folder"], "--model must be one of"),
        (["--memory-limit", "0.5", "--model", "sdxl"], "--memory-limit"),
    ],
)
def test_what_the_compiler_refuses_is_one_line(tmp_path: Path, arguments: list[str], words: str):
    command = plan(*arguments, temporary=tmp_path)
    run = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert run.returncode == 1, run.stderr
    error = run.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error
    assert list((tmp_path / "tmp").iterdir()) == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_compiler_never_outlives_the_command(tmp_path: Path, number: signal.Signals, code: int):
    command, env = plan(temporary=tmp_path), environment(tmp_path)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert "tracing" in process.stderr.readline()
            (child,) = children_of(process.pid)
            process.send_signal(number)
            process.stderr.read()
            assert process.wait(60) == code
        finally:
            process.kill()
    until = time.monotonic() + 60
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(child)
    if number != signal.SIGKILL:
        assert list((tmp_path / "tmp").iterdir()) == []
