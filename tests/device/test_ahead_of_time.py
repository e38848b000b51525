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
from sdtpu_worker.diffusion.matmul_counts import count_matmuls
from sdtpu_worker.errors import ConfigurationError, InvalidCheckpoint
from sdtpu_worker.planning.hlo import parse_module
from sdtpu_worker.planning.hlo_traffic import Traffic
from tests.support.paths import ROOT

LIMIT_S = 280


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


def test_a_kernel_counts_once_for_each_place_of_its_grid():
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def function(a, b):
        blocks = [pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 32), lambda i: (0, 0))]
        return pl.pallas_call(
            kernel, jax.ShapeDtypeStruct((40, 32), a.dtype), grid=(5,), in_specs=blocks,
            out_specs=pl.BlockSpec((8, 32), lambda i: (i, 0)), interpret=True,
        )(a, b)  # fmt: skip

    assert count_matmuls(function, shape(40, 16), shape(16, 32)) == {(8, 16, 32): 5}


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
    command, env = plan("--json", "--load", "1000", "--price", "1", temporary=tmp_path), environment(tmp_path)
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    assert "compiling" in run.stderr
    found = json.loads(run.stdout)
    (compiled,) = (each for each in found["settings"] if each["kind"] == "compiled")
    assert (found["topology"], found["answer"], found["best_slots_per_device"]) == ("v5e:2x4", "quick", 1)
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
