"""A tick's instructions travel as one array: what the host writes is what a device reads, number for number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.diffusion.packed_instructions import InstructionPacking
from sdtpu_worker.diffusion.slots import NOTHING, Geometry


@pytest.fixture
def geometry(shipped) -> Geometry:
    return Geometry.of(shipped.family, num_devices=3, slots_per_device=2, size=(64, 64))


def test_every_number_arrives_as_it_was_written(geometry):
    packing, draw = InstructionPacking(geometry), np.random.default_rng(0)
    words, todo = packing.no_instructions()
    plain = geometry.no_instructions()
    pictures = {name: getattr(plain.phases, name) for name in ("image", "mask", "control_images")}
    for view, leaf in zip(jax.tree.leaves(todo), jax.tree.leaves(plain._replace(phases=plain.phases._replace(
            image=None, mask=None, control_images=None))), strict=True):  # fmt: skip
        bits = draw.integers(0, 2**32, leaf.shape, np.uint32)
        leaf[...] = bits % 2 if leaf.dtype == bool else np.where(np.isnan(v := bits.view(leaf.dtype)), 1, v)
        view[...] = leaf
    for device in range(3):
        read = jax.jit(packing.unpack)(words[device], jax.tree.map(lambda leaf: leaf[device], pictures))  # noqa: B023  # at once
        wanted = jax.tree.map(lambda leaf: leaf[device], plain)  # noqa: B023  # likewise
        jax.tree.map(np.testing.assert_array_equal, read, wanted)
        assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, wanted)


def test_fresh_instructions_do_nothing_whatever_was_written_before(geometry):
    packing = InstructionPacking(geometry)
    words, todo = packing.no_instructions()
    todo.phases.decode_slot[...] = 1
    todo.num_phases[...] = 2
    assert (words != packing.no_instructions()[0]).any()
    _, again = packing.no_instructions()
    assert (again.phases.decode_slot == NOTHING).all()
    assert (again.phases.insert_slot == NOTHING).all()
    assert not again.num_phases.any()
    assert not again.phases.steps.any()


def test_the_shapes_of_a_program_are_those_of_what_it_is_given(geometry):
    packing = InstructionPacking(geometry)
    words, _ = packing.no_instructions()
    shape = packing.shapes(geometry.no_pictures(3)).words
    assert (words.shape, words.dtype) == (shape.shape, shape.dtype)
    assert words.shape[0] == 3


def test_an_input_that_fits_no_word_is_refused(geometry):
    inputs = {**geometry.inputs, "small": jax.ShapeDtypeStruct((3,), jnp.float16)}
    with pytest.raises(TypeError, match="must be of 32 bits or bool, got float16"):
        InstructionPacking(Geometry(**{**vars(geometry), "inputs": inputs}))
