"""What one device does in a phase of a tick: start a job in a slot, take denoising steps, decode a slot.

These functions are traced into the tick of `programs.py`. Shapes are as in `slots.py`, of this device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.diffusion.adapters import Adapted, Stack
from sdtpu_worker.diffusion.families.family import WINDOWS, Family, Pictures, PictureUse
from sdtpu_worker.diffusion.hoisting import hoist
from sdtpu_worker.diffusion.samplers import COLUMNS
from sdtpu_worker.diffusion.slots import Controls, Decoded, Geometry, Phases, Picture, Slots
from sdtpu_worker.diffusion.tiled_decoding import decode_in_tiles
from sdtpu_worker.models.selection import current_selection

_State = tuple[jax.Array, jax.Array, jax.Array]
CONTROL = "control"
"""The name of what only jobs with ControlNets cost in the compiled program, for `sdtpu plan`."""
_NOISE_OF_PICTURES = 2**32 - 1
"""What the noise of encoded pictures is drawn with; the noise of steps is with their numbers."""


def insert(
    family: Family, geometry: Geometry, params: Any, slots: Slots, todo: Phases, bank: Stack | None = None
) -> Slots:
    """Encode the prompt and start the job in its slot; the noise comes from nothing but the job's own key."""
    slot = todo.insert_slot

    def start(slots: Slots) -> Slots:
        pictures = _pictures(geometry, todo) if geometry.takes_pictures else None
        adapters = _adapters_of(geometry, bank, todo.adapters and todo.adapters.entry[None], family.rows)
        conditioning = family.encode(params, todo.inputs, pictures, adapters)
        latents, picture = _initial_noise(todo.key_data, geometry.latent_shape) * todo.first_level[1], None
        if pictures is not None:
            picture = _picture_of(family, geometry, params, todo, pictures)
            latents = jnp.where(todo.has_image, picture.latents * todo.first_level[0] + latents, latents)
        started = Slots(
            latents=latents,
            history=jnp.zeros((3, *geometry.latent_shape)),
            step=jnp.zeros((), jnp.int32),
            num_steps=todo.num_steps,
            guidance_scale=todo.guidance_scale,
            guidance_rescale=todo.guidance_rescale,
            image_guidance_scale=todo.image_guidance_scale,
            key_data=todo.key_data,
            conditioning={name: conditioning[name].astype(leaf.dtype) for name, leaf in geometry.conditioning.items()},
            table=todo.table,
            picture=picture,
            controls=_controls_of(family, geometry, params, todo) if geometry.controls else None,
            adapters=todo.adapters,
        )
        return jax.tree.map(lambda leaf, row: leaf.at[slot].set(row), slots, started)

    return jax.lax.cond(slot >= 0, start, lambda slots: slots, slots)


def _initial_noise(key_data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise that a job starts from, of this shape; `(2,) uint32` words of its key."""
    return jax.random.normal(jax.random.wrap_key_data(key_data), shape, jnp.float32)


def _pictures(geometry: Geometry, todo: Phases) -> Pictures:
    """Return a job's pictures as its family takes them."""
    key = jax.random.fold_in(jax.random.wrap_key_data(todo.key_data), _NOISE_OF_PICTURES)
    noise = jax.random.normal(key, (2, *geometry.latent_shape), jnp.float32)
    return Pictures(todo.image.astype(jnp.float32) / 127.5 - 1, todo.mask, noise)


def _picture_of(family: Family, geometry: Geometry, params: Any, todo: Phases, pictures: Pictures) -> Picture:
    """Return what a slot keeps of a job's image; its latents only if the job starts from them, or keeps some."""
    blends = family.picture_use is PictureUse.START
    kept = ~todo.mask[:: family.scale_factor, :: family.scale_factor] & todo.has_image & blends
    latents = jax.lax.cond(
        todo.has_image & ((todo.first_level[0] > 0) | kept.any()),
        lambda: family.encode_image(params, pictures.image, pictures.noise[0]),
        lambda: jnp.zeros(geometry.latent_shape, jnp.float32),
    )
    return Picture(latents, kept)


def _controls_of(family: Family, geometry: Geometry, params: Any, todo: Phases) -> Controls:
    """Return what a slot keeps for ControlNets: those that the job asks see their pictures once."""

    def embed(number: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
        def see() -> jax.Array:
            picture = todo.control_images[number].astype(jnp.float32) / 255
            return family.embed_control(params, number, picture).astype(shape.dtype)

        asked = todo.control_scale[number] != 0
        embedded: jax.Array = jax.lax.cond(asked, see, lambda: jnp.zeros(shape.shape, shape.dtype))
        return embedded

    embedded = tuple(embed(number, shape) for number, shape in enumerate(geometry.controls))
    return Controls(todo.control_scale, todo.control_first, todo.control_end, embedded)


def _adapters_of(geometry: Geometry, bank: Stack | None, entries: Any, repeats: int) -> Adapted | None:
    """Return what is added to the layers for the rows of a batch, gathered once; None without a bank.

    Args:
        geometry: the sizes.
        bank: of this device.
        entries: `(jobs,) int32`.
        repeats: rows of a job; the jobs' order repeats as often.
    """
    if geometry.adapters is None or bank is None:
        return None
    rows = jnp.concatenate([entries] * repeats)
    return {part: geometry.adapters.pick(bank, rows, part) for part in bank}


def advance(
    family: Family, geometry: Geometry, params: Any, slots: Slots, steps: jax.Array, bank: Stack | None = None
) -> Slots:
    """Take `steps` denoising steps in all slots of the device; a slot keeps its values after its job's last step."""
    num_slots, halves = geometry.slots_per_device, family.rows
    rows = jnp.arange(num_slots)
    # All negative prompts first, then the prompts: (H * S, …).
    conditioning = {
        name: leaf.swapaxes(0, 1).reshape(halves * num_slots, *leaf.shape[2:])
        for name, leaf in slots.conditioning.items()
    }

    blend = _make_blend(slots, geometry.latent_shape)
    add = _make_controls(family, geometry, params, slots)
    state = slots.latents, slots.history, slots.step

    def denoise(adapters: Adapted | None, params: Any, state: _State) -> _State:
        x, history, step = state
        row = slots.table[rows, jnp.minimum(step, MAX_STEPS - 1)]  # (S, len(COLUMNS))
        column = {name: row[:, i, None, None, None] for i, name in enumerate(COLUMNS)}
        x_in = jnp.concatenate([x * column["c_in"]] * halves)
        t = jnp.concatenate([row[:, COLUMNS.index("t")]] * halves)
        running = step < slots.num_steps
        asked = _without_ended(conditioning, jnp.concatenate([running] * halves))
        m = _guide(family.predict(params, x_in, t, asked, add(x_in, t, step, asked), adapters), slots)
        noise = _noise(slots.key_data, step, jnp.abs(column["n"]) + jnp.abs(column["r"]), x.shape)
        x_next = (
            column["a"] * x
            + column["b"] * m
            + column["c"] * history[:, 0]
            + column["d"] * history[:, 1]
            + column["e"] * history[:, 2]
            + column["n"] * noise
        )
        x_next = blend(x_next, column["s"], column["u"])
        h = column["p"] * x + column["q"] * m + column["r"] * noise
        pushed = jnp.concatenate([h[:, None], history[:, :2]], axis=1)
        running = running[:, None, None, None]
        push = running & (column["push"] > 0)
        return (
            jnp.where(running, x_next, x),
            jnp.where(push[:, None], pushed, history),
            step + running[:, 0, 0, 0],
        )

    def run() -> _State:
        adapters = _adapters_of(geometry, bank, slots.adapters and slots.adapters.entry, halves)
        step_of = partial(denoise, adapters)
        # Elsewhere than on a TPU nothing of the parameters is packed or cast in a step.
        take_step = hoist(step_of, params, state) if current_selection().is_tpu else partial(step_of, params)
        after: _State = jax.lax.fori_loop(0, steps, lambda _, state: take_step(state), state)
        return after

    # A phase without steps, as one that decodes, has nothing to gather.
    x, history, step = run() if bank is None else jax.lax.cond(steps > 0, run, lambda: state)
    return slots._replace(latents=x, history=history, step=step)


def _without_ended(conditioning: dict[str, jax.Array], running: jax.Array) -> dict[str, jax.Array]:
    """Return what the model sees of the rows: a job that has ended, and left a long prompt behind, costs nothing.

    Args:
        conditioning: by name `(R, …)`.
        running: `(R,) bool`.
    """
    if WINDOWS not in conditioning:
        return conditioning
    return {**conditioning, WINDOWS: jnp.where(running, conditioning[WINDOWS], 1)}


def _make_controls(
    family: Family, geometry: Geometry, params: Any, slots: Slots
) -> Callable[[jax.Array, jax.Array, jax.Array, dict[str, jax.Array]], Any]:
    """Return what adds up the ControlNets of a step: each runs only where a slot of the device asks it now.

    Args:
        family, geometry, params, slots: of this device.

    Returns:
        `add(x_in (R, C, h, w), t (R,), step (S,), conditioning by name (R, …)) -> what `Family.predict` takes`. A slot
        that does not ask a ControlNet gets zeros of it, exactly, whatever its neighbours ask.
    """
    controls = slots.controls
    if controls is None:
        return lambda x_in, t, step, conditioning: None
    repeats = family.rows
    embedded = [jnp.concatenate([each] * repeats) for each in controls.embedded]

    def add(x_in: jax.Array, t: jax.Array, step: jax.Array, conditioning: dict[str, jax.Array]) -> Any:
        def ask(number: int) -> Any:
            return family.control(params, number, x_in, t, conditioning, embedded[number])

        added = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: ask(0)))
        for number in range(len(geometry.controls)):
            now = (controls.first[:, number] <= step) & (step < jnp.minimum(controls.end[:, number], slots.num_steps))
            scale = jnp.concatenate([jnp.where(now, controls.scale[:, number], 0)] * repeats)

            def run(before: Any, number: int = number, scale: jax.Array = scale) -> Any:
                def plus(total: jax.Array, leaf: jax.Array) -> jax.Array:
                    amount = scale.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
                    return total + jnp.where(amount != 0, amount * leaf, 0).astype(total.dtype)

                return jax.tree.map(plus, before, ask(number))

            with jax.named_scope(CONTROL):
                added = jax.lax.cond(jnp.any(scale != 0), run, lambda before: before, added)
        return added

    return add


def _make_blend(slots: Slots, latent_shape: tuple[int, ...]) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Return what keeps an image where it is not drawn again: its latents with noise, at the sample's own level."""
    if slots.picture is None:
        return lambda x, signal, noise: x
    latents, kept = slots.picture.latents, slots.picture.kept[:, None]
    unit = jax.lax.cond(
        kept.any(),
        lambda: jax.vmap(lambda words: _initial_noise(words, latent_shape))(slots.key_data),
        lambda: jnp.zeros_like(latents),
    )
    return lambda x, signal, noise: jnp.where(kept, signal * latents + noise * unit, x)


def _guide(out: jax.Array, slots: Slots) -> jax.Array:
    """Return the guided outputs, `(S, C, h, w)`, of the model's, `(H * S, C, h, w)`.

    A scale of 1 or less is no guidance, as in diffusers: the prompt alone; so is an image's scale below 1. A rescale
    above 0 brings the guided output's standard deviation nearer to the conditional one's (arXiv 2305.08891, section
    3.4).
    """
    rows = out.shape[0] // slots.step.shape[0]
    if rows == 1:
        return out
    scale, rescale = slots.guidance_scale[:, None, None, None], slots.guidance_rescale[:, None, None, None]
    unconditional, *of_image, conditional = jnp.split(out, rows)
    is_guided = scale > 1
    guided = unconditional + scale * (conditional - unconditional)
    if of_image:
        image_scale = slots.image_guidance_scale[:, None, None, None]
        guided = unconditional + scale * (conditional - of_image[0]) + image_scale * (of_image[0] - unconditional)
        is_guided &= image_scale >= 1

    def deviation(leaf: jax.Array) -> jax.Array:
        return jnp.std(leaf, axis=(1, 2, 3), keepdims=True)

    rescaled = guided * (deviation(conditional) / deviation(guided))
    guided = jnp.where(rescale > 0, rescale * rescaled + (1 - rescale) * guided, guided)
    return jnp.where(is_guided, guided, conditional)


def _noise(key_data: jax.Array, step: jax.Array, amount: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise of a step: from the job's own key and the number of the step, whatever else is in the batch.

    Args:
        key_data: `(S, 2) uint32`.
        step: `(S,) int32`.
        amount: `(S, 1, 1, 1)`; where every job of the device has zero, no noise is drawn.
        shape: `(S, C, h, w)`.
    """

    def draw(words: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(words), step)
        return jax.random.normal(key, shape[1:], jnp.float32)

    return jax.lax.cond(jnp.any(amount != 0), lambda: jax.vmap(draw)(key_data, step), lambda: jnp.zeros(shape))


def decode(family: Family, geometry: Geometry, params: Any, slots: Slots, slot: jax.Array) -> Decoded:
    """Decode one slot to pixels, clipped, rounded and cast on the device: a quarter of the bytes leave it."""

    def run() -> Decoded:
        latents = jax.lax.dynamic_index_in_dim(slots.latents, slot, keepdims=False)
        if geometry.decode_tile:
            to_pixels = partial(family.decode, params)
            image = decode_in_tiles(to_pixels, latents, geometry.decode_tile, family.scale_factor)
        else:
            image = family.decode(params, latents)
        finite = jnp.isfinite(latents).all() & jnp.isfinite(image).all()
        unit = jnp.clip(image / 2 + 0.5, 0, 1)
        return Decoded(jnp.round(unit * 255).astype(jnp.uint8), finite)

    def nothing() -> Decoded:
        return Decoded(jnp.zeros((geometry.height, geometry.width, 3), jnp.uint8), jnp.ones((), bool))

    return jax.lax.cond(slot >= 0, run, nothing)
