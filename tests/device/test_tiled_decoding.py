"""Images that are decoded in tiles: the seams do not show, and a worker does it by itself where memory is short."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.memory import bytes_per_device, memory_needs
from sdtpu_worker.diffusion.tiled_decoding import decode_in_tiles, tile_side
from sdtpu_worker.errors import ConfigurationError
from tests.support.colour_family import Colour, colour_checkpoint
from tests.support.engines import generate_all

LANE = (96, 128)


class Wide(Colour):
    """A family whose decoder is the largest part of its memory: each pixel has a thousand numbers on the way."""

    default_size = LANE

    def decode(self, params, latents):
        wide = latents.transpose(1, 2, 0)[..., None] * jnp.arange(1, 1001, dtype=jnp.float32)
        return jnp.sort(wide, axis=-1)[..., 0] * params["brush"]["strength"]


@pytest.mark.parametrize("size", [(8, 8), (9, 23), (5, 17), (4, 31), (64, 65)])
@pytest.mark.parametrize("side", [5, 8])
def test_what_needs_no_neighbours_is_the_same_in_tiles(size, side):
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(3, *size)), jnp.float32)

    def double(part: jax.Array) -> jax.Array:
        return part.repeat(2, 1).repeat(2, 2).transpose(1, 2, 0)

    np.testing.assert_allclose(decode_in_tiles(double, latents, side, 2), double(latents), rtol=1e-5, atol=1e-6)


def test_no_more_than_a_tile_is_decoded_at_a_time():
    shapes = []

    def note(part: jax.Array) -> jax.Array:
        shapes.append(part.shape)
        return jnp.zeros((8 * part.shape[1], 8 * part.shape[2], 3))

    assert decode_in_tiles(note, jnp.zeros((4, 128, 40)), tile_side(128, 40), 8).shape == (1024, 320, 3)
    assert set(shapes) == {(4, 64, 40)}


def test_the_side_of_a_tile_is_at_most_half_of_the_image():
    assert [tile_side(*size) for size in ((128, 128), (64, 64), (9, 4), (1, 1))] == [64, 32, 5, 1]


def test_an_image_in_tiles_is_near_the_whole_one_with_no_edge_where_they_meet(shipped, devices, compile_cache):
    requests = [GenerationRequest(f"a {colour} circle on a white background", seed=i, num_inference_steps=8)
                for i, colour in enumerate(("red", "blue", "green"))]  # fmt: skip
    whole, tiled = (
        np.stack([image.pixels for image in generate_all(engine, requests)]).astype(np.float32)
        for engine in (Engine(shipped, devices[:2], 2, None, compile_cache, vae_tiling=how) for how in ("off", "on"))
    )
    difference = np.abs(whole - tiled)
    assert 0 < difference.mean() < 12

    def steepness(images: np.ndarray) -> float:
        """Return the mean difference of neighbouring pixels where tiles begin and end, at 16, 32 and 48."""
        columns = np.abs(np.diff(images, axis=2)).mean(axis=(0, 1, 3))
        rows = np.abs(np.diff(images, axis=1)).mean(axis=(0, 2, 3))
        return float(np.mean([lines[at - 1] for lines in (rows, columns) for at in (16, 32, 48)]))

    assert steepness(tiled) < 1.25 * steepness(whole) + 1


def test_images_are_decoded_in_tiles_only_where_the_programs_do_not_fit_otherwise(devices, monkeypatch, caplog):
    checkpoint = colour_checkpoint(Wide())

    def make(how: str) -> Engine:
        return Engine(checkpoint, devices[:1], 1, (LANE,), vae_tiling=how)

    engines = {how: make(how) for how in ("off", "on")}
    parameters = bytes_per_device(checkpoint.params)

    def needed(engine: Engine) -> int:
        slots = bytes_per_device(engine.snapshot(LANE, 0, 0).state)
        return sum(memory_needs(parameters, slots, engine._programs.ticks.values()).values())

    whole, tiled = needed(engines["off"]), needed(engines["on"])
    assert tiled < 0.7 * whole
    monkeypatch.setattr("sdtpu_worker.diffusion.memory.device_memory", lambda device: (whole + tiled) // 2)
    with pytest.raises(ConfigurationError, match="out of memory"):
        make("off")
    engine = make("auto")
    assert "sdtpu_vae_tiling" in caplog.text
    assert engine.fingerprints[LANE] == engines["on"].fingerprints[LANE] != engines["off"].fingerprints[LANE]
    monkeypatch.setattr("sdtpu_worker.diffusion.memory.device_memory", lambda device: whole + 2**20)
    assert make("auto").fingerprints[LANE] == engines["off"].fingerprints[LANE]
    monkeypatch.setattr("sdtpu_worker.diffusion.memory.device_memory", lambda device: tiled - 2**10)
    with pytest.raises(ConfigurationError, match="out of memory"):
        make("auto")


def test_a_compiler_that_finds_no_room_is_reported_as_a_model_that_does_not_fit(
    random_checkpoint, devices, monkeypatch
):
    def refuse(self, *args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.3G of 15.75G.\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(ConfigurationError, match=r"does not fit: RESOURCE_EXHAUSTED.*of 15\.75G\.; lower sdtpu_slots"):
        Engine(load_checkpoint(str(random_checkpoint)), devices[:1])
