"""The program on NVIDIA GPUs, as far as it can be shown without one: choices, what it lowers to, errors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo  # what asks for cuDNN, which is not here
from jax.sharding import NamedSharding

from sdtpu_worker.diffusion import kept_programs, sharding
from sdtpu_worker.diffusion.abstract_checkpoint import read_abstract
from sdtpu_worker.diffusion.programs import trace_tick
from sdtpu_worker.diffusion.sharding import REPLICATED, find_devices, make_mesh
from sdtpu_worker.diffusion.slots import Geometry
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.models.kernel_table import OLD_GPU, check_wanted, kernel_platform

COLLECTIVES = re.compile(r"stablehlo\.(all_reduce|all_gather|all_to_all|collective_\w+|reduce_scatter)")


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)


def lower_for_cuda(model: str, slots: int, platform: str = "gpu") -> tuple[str, Geometry]:
    """Return a worker's whole tick as it is given to XLA for NVIDIA GPUs."""
    checkpoint = read_abstract(model, jnp.bfloat16, prompt_windows=3)  # a worker's default
    mesh = make_mesh(jax.local_devices()[:2])
    geometry = Geometry.of(checkpoint.family, 2, slots, checkpoint.family.default_size)
    replicated = NamedSharding(mesh, REPLICATED)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), checkpoint.params
    )
    traced = trace_tick(checkpoint.family, params, geometry, mesh, platform)
    return traced.lower(lowering_platforms=("cuda",)).as_text(), geometry


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        ("sd15", 2 * (2 + 3) * 2),  # two layers down and three up, both attentions, of 4,096 and of 1,024 pixels
        ("sd21", 2 * (2 + 3) * 3),  # of 9,216, 2,304 and 576 pixels
        ("sdxl", 2 * (2 + 3) * 2 + 2 * (2 + 1 + 3) * 10),  # two blocks of 4,096 pixels, ten of 1,024
    ],
)
def test_the_whole_tick_of_a_real_model_lowers_for_cuda_with_cudnns_attention(with_cudnn, model, fused):
    text, geometry = lower_for_cuda(model, slots=4)
    assert text.count("@__cudnn$fmhaSoftmax") == fused
    assert not COLLECTIVES.search(text)
    donated = len(jax.tree.leaves(geometry.empty_slots()))
    assert len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)) == donated


def test_a_gpu_without_fused_attention_gets_the_plain_one():
    text, _ = lower_for_cuda("sd15", slots=1, platform=OLD_GPU)
    assert "cudnn" not in text


def test_a_kept_program_knows_the_libraries_of_its_gpu(monkeypatch, shipped, devices):
    mesh, installed = make_mesh(devices), {"nvidia-cudnn-cu12": "9.10"}
    monkeypatch.setattr(
        kept_programs, "package_versions", lambda names: {n: installed[n] for n in names if n in installed}
    )
    before = kept_programs.facts_of(shipped.family, shipped.params, mesh)
    assert kept_programs.facts_of(shipped.family, shipped.params, mesh) == before
    installed["nvidia-cudnn-cu12"] = "9.11"
    assert kept_programs.facts_of(shipped.family, shipped.params, mesh) != before


@pytest.mark.parametrize(
    ("platform", "capability", "name"),
    [
        ("gpu", "8.0", "gpu"),
        ("gpu", "12.1", "gpu"),
        ("gpu", "7.5", OLD_GPU),
        ("gpu", "gfx942", OLD_GPU),
        ("gpu", None, OLD_GPU),
        ("tpu", None, "tpu"),
        ("cpu", None, "cpu"),
    ],
)
def test_only_gpus_since_ampere_have_cudnns_attention(platform, capability, name):
    assert kernel_platform(platform, "a device", capability) == name


def test_cudnns_attention_on_an_older_gpu_is_refused():
    check_wanted("gpu", "cudnn")
    with pytest.raises(ConfigurationError, match="must be one of auto, plain on the platform gpu without fused"):
        check_wanted(OLD_GPU, "cudnn")


@pytest.mark.parametrize(
    ("installed", "platform", "words"),
    [
        ((), "gpu", r"pip install 'sdtpu_worker\[gpu\]' on a host with a GPU"),
        (("jax_cuda12_plugin",), "gpu", "`nvidia-smi` must list one"),
        ((), "tpu", r"pip install 'sdtpu_worker\[tpu\]' on a host with a TPU"),
        (("libtpu",), "tpu", "run on a host that has a TPU which no other process holds"),
    ],
)
def test_a_platform_that_is_missing_says_what_to_install(monkeypatch, installed, platform, words):
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: name in installed or None)
    with pytest.raises(ConfigurationError, match=f"sdtpu_platform is '{platform}', but the devices found are.*{words}"):
        find_devices(platform, 8)


def test_a_backend_that_fails_says_what_to_look_at(monkeypatch):
    def fail() -> list[jax.Device]:
        raise RuntimeError("Unable to initialize backend 'cuda': no supported devices found")

    monkeypatch.setattr(sharding.jax, "local_devices", fail)
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigurationError, match=r"JAX finds no devices.*no supported devices found.*nvidia-smi"):
        find_devices("gpu", 8)


def test_gpus_of_several_kinds_are_refused(monkeypatch):
    kinds = [SimpleNamespace(platform="gpu", device_kind=kind) for kind in ("NVIDIA L4", "NVIDIA L4", "NVIDIA A10G")]
    monkeypatch.setattr(sharding.jax, "local_devices", lambda: kinds)
    with pytest.raises(ConfigurationError, match="got NVIDIA A10G, NVIDIA L4; give each kind a worker"):
        find_devices("gpu", 8)
