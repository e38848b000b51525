"""The compiled programs. One fused tick per resolution; inside it every device follows its own instructions.

Shapes below: D devices, S slots per device, N = D * S slots, P phases per tick, C latent channels, h x w latents,
L = 77 tokens, E embedding width. Everything with a leading N or D is sharded over the mesh's one axis; parameters are
replicated. Nothing crosses devices, so there is no collective and a device with nothing to do costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdtpu_worker.aggregator.plan import phases_per_tick
from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.samplers import COLUMNS
from sdtpu_worker.diffusion.sharding import AXIS, REPLICATED, SHARDED

NOTHING = -1


class Slots(NamedTuple):
    """The state of all slots; donated to every tick and returned by it."""

    latents: Any  # (N, C, h, w) float32
    history: Any  # (N, 3, C, h, w) float32, newest first
    step: Any  # (N,) int32, the next step to take
    num_steps: Any  # (N,) int32, 0 for a slot that was never used
    guidance_scale: Any  # (N,) float32
    context: Any  # (N, 2, L, E) dtype of the model, negative prompt first
    table: Any  # (N, MAX_STEPS, len(COLUMNS)) float32


class Phases(NamedTuple):
    """What every device does in each phase of a tick: decode, then insert, then advance."""

    decode_slot: Any  # (D, P) int32, a slot of the device, or NOTHING
    insert_slot: Any  # (D, P) int32, a slot of the device, or NOTHING
    prompt_ids: Any  # (D, P, 2, L) int32, negative prompt first
    key_data: Any  # (D, P, 2) uint32, the job's key
    num_steps: Any  # (D, P) int32
    guidance_scale: Any  # (D, P) float32
    init_noise_sigma: Any  # (D, P) float32
    table: Any  # (D, P, MAX_STEPS, len(COLUMNS)) float32
    steps: Any  # (D, P) int32, denoising steps to take


class Instructions(NamedTuple):
    """What every device does in one tick."""

    num_phases: Any  # (D,) int32, how many of its phases a device runs
    phases: Phases


class Decoded(NamedTuple):
    """What a tick returns; only the entries of phases that decode hold an image."""

    pixels: Any  # (D, P, height, width, 3) uint8
    finite: Any  # (D, P) bool, False if the latents or the image had a NaN or an infinity


class SlotState(NamedTuple):
    """The whole state of one job of each device, as it leaves and comes back; as `Slots` with D instead of N."""

    latents: Any
    history: Any
    step: Any
    num_steps: Any
    guidance_scale: Any
    context: Any
    table: Any


@dataclass(frozen=True)
class Geometry:
    """The sizes that one tick program is compiled for."""

    num_devices: int
    slots_per_device: int
    phases: int  # P, the most phases of a tick
    height: int
    width: int
    latent_shape: tuple[int, int, int]  # (C, h, w)
    prompt_length: int
    embedding_width: int
    dtype: Any

    @classmethod
    def of(cls, checkpoint: Checkpoint, num_devices: int, slots_per_device: int, height: int, width: int) -> Geometry:
        """Return the sizes for a checkpoint and a resolution in pixels."""
        factor = checkpoint.vae_scale_factor
        return cls(
            num_devices=num_devices,
            slots_per_device=slots_per_device,
            phases=phases_per_tick(slots_per_device),
            height=height,
            width=width,
            latent_shape=(checkpoint.latent_channels, height // factor, width // factor),
            prompt_length=checkpoint.tokenizer.length,
            embedding_width=checkpoint.text_encoder.config.hidden_size,
            dtype=checkpoint.dtype,
        )

    def empty_slots(self) -> Slots:
        """Return the state before any job, as host arrays."""
        n, length, width = self.num_devices * self.slots_per_device, self.prompt_length, self.embedding_width
        return Slots(
            latents=np.zeros((n, *self.latent_shape), np.float32),
            history=np.zeros((n, 3, *self.latent_shape), np.float32),
            step=np.zeros(n, np.int32),
            num_steps=np.zeros(n, np.int32),
            guidance_scale=np.zeros(n, np.float32),
            context=np.zeros((n, 2, length, width), self.dtype),
            table=np.zeros((n, MAX_STEPS, len(COLUMNS)), np.float32),
        )

    def empty_states(self) -> SlotState:
        """Return one state per device, as host arrays of zeros."""
        rows = [np.zeros((self.num_devices, *leaf.shape[1:]), leaf.dtype) for leaf in self.empty_slots()]
        return SlotState(*rows)

    def no_instructions(self) -> Instructions:
        """Return fresh instructions that do nothing. A dispatch aliases its arrays, so never use them twice."""
        d = self.num_devices
        dp = d, self.phases
        phases = Phases(
            decode_slot=np.full(dp, NOTHING, np.int32),
            insert_slot=np.full(dp, NOTHING, np.int32),
            prompt_ids=np.zeros((*dp, 2, self.prompt_length), np.int32),
            key_data=np.zeros((*dp, 2), np.uint32),
            num_steps=np.zeros(dp, np.int32),
            guidance_scale=np.zeros(dp, np.float32),
            init_noise_sigma=np.ones(dp, np.float32),
            table=np.zeros((*dp, MAX_STEPS, len(COLUMNS)), np.float32),
            steps=np.zeros(dp, np.int32),
        )
        return Instructions(np.zeros(d, np.int32), phases)


def tick_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that a tick reads: without the VAE's encoder, since every leaf makes a dispatch slower."""
    vae = {name: params["vae"][name] for name in ("decoder", "post_quant_conv") if name in params["vae"]}
    return {"text_encoder": params["text_encoder"], "unet": params["unet"], "vae": vae}


def lower_tick(checkpoint: Checkpoint, params: Any, geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the tick, ahead of time.

    Args:
        params: `tick_params` of the checkpoint on the mesh, replicated (arrays or shapes).

    Returns:
        What `.compile()` makes `tick(params, slots, instructions) -> (slots, Decoded)` of; the slots passed in are
        donated. A wrong shape, dtype or sharding is an error: the result never compiles again.
    """

    def local_tick(params: Any, slots: Slots, todo: Instructions) -> tuple[Slots, Decoded]:
        todo = jax.tree.map(lambda leaf: leaf[0], todo)  # this device's own row

        def phase(i: jax.Array, carry: tuple[Slots, Decoded]) -> tuple[Slots, Decoded]:
            slots, decoded = carry
            now = jax.tree.map(lambda leaf: leaf[i], todo.phases)
            image = _decode(checkpoint, geometry, params, slots, now.decode_slot)
            decoded = jax.tree.map(lambda all_, one: all_.at[0, i].set(one), decoded, image)
            slots = _insert(checkpoint, geometry, params, slots, now)
            return _advance(checkpoint, geometry, params, slots, now.steps), decoded

        pixels = jnp.zeros((1, geometry.phases, geometry.height, geometry.width, 3), jnp.uint8)
        nothing = Decoded(pixels, jnp.ones((1, geometry.phases), bool))
        return jax.lax.fori_loop(0, todo.num_phases, phase, (slots, nothing))

    tick = jax.shard_map(
        local_tick, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    shapes = _sharded_shapes(mesh, (geometry.empty_slots(), geometry.no_instructions()))
    return jax.jit(tick, donate_argnums=1).lower(params, *shapes)


def lower_snapshot(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that reads one slot of each device.

    Returns:
        What `.compile()` makes `snapshot(slots, slot (D,) int32) -> SlotState` of; the slots stay as they are.
    """

    def local_snapshot(slots: Slots, slot: jax.Array) -> SlotState:
        return SlotState(*(jax.lax.dynamic_slice_in_dim(leaf, slot[0], 1) for leaf in slots))

    return _lower_sharded(local_snapshot, mesh, geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32))


def lower_restore(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that writes one slot of each device.

    Returns:
        What `.compile()` makes `restore(slots, slot (D,) int32, SlotState) -> slots` of; the slots passed in are
        donated, devices with the slot NOTHING keep theirs.
    """

    def local_restore(slots: Slots, slot: jax.Array, state: SlotState) -> Slots:
        def write() -> Slots:
            put_row = jax.lax.dynamic_update_slice_in_dim
            return Slots(*(put_row(leaf, row, slot[0], 0) for leaf, row in zip(slots, state, strict=True)))

        return jax.lax.cond(slot[0] >= 0, write, lambda: slots)

    shapes = geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32), geometry.empty_states()
    return _lower_sharded(local_restore, mesh, *shapes, donate=0)


def lower_preview(geometry: Geometry, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the program that makes a small image of one slot of each device.

    Returns:
        What `.compile()` makes `preview(colours (C + 1, 3) float32, slots, slot (D,) int32) -> (D, h, w, 3) uint8`
        of: latents, scaled as the model sees them, times the first C rows of `colours`, plus the last.
    """

    def local_preview(colours: jax.Array, slots: Slots, slot: jax.Array) -> jax.Array:
        step, num_steps = slots.step[slot[0]], slots.num_steps[slot[0]]
        c_in = slots.table[slot[0], jnp.clip(step, 0, jnp.maximum(num_steps, 1) - 1), COLUMNS.index("c_in")]
        latents = jax.lax.dynamic_slice_in_dim(slots.latents, slot[0], 1) * c_in
        rgb = jnp.einsum("nchw,cd->nhwd", latents, colours[:-1]) + colours[-1]
        return jnp.round(jnp.clip(rgb, 0, 255)).astype(jnp.uint8)

    preview = jax.shard_map(
        local_preview, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    colours = jax.ShapeDtypeStruct(
        (geometry.latent_shape[0] + 1, 3), jnp.float32, sharding=NamedSharding(mesh, REPLICATED)
    )
    shapes = _sharded_shapes(mesh, (geometry.empty_slots(), np.zeros(geometry.num_devices, np.int32)))
    return jax.jit(preview).lower(colours, *shapes)


def lower_safety_check(checkpoint: Checkpoint, params: Any, mesh: Mesh) -> jax.stages.Lowered:
    """Trace and lower the safety checker.

    Returns:
        What `.compile()` makes `check(params, pixel_values (D, 3, H, W) float32, wanted (D,) bool) -> (D,) bool` of.
    """
    checker: Any = checkpoint.safety_checker
    extractor: Any = checkpoint.feature_extractor

    def local_check(params: Any, pixel_values: jax.Array, wanted: jax.Array) -> jax.Array:
        def run() -> jax.Array:
            return checker(pixel_values, params=params)

        return jax.lax.cond(wanted[0], run, lambda: jnp.zeros(1, bool))

    check = jax.shard_map(
        local_check, mesh=mesh, in_specs=(REPLICATED, SHARDED, SHARDED), out_specs=SHARDED, check_vma=False
    )
    sharded, count = NamedSharding(mesh, SHARDED), mesh.shape[AXIS]
    crop = extractor.crop_size
    pixel_values = jax.ShapeDtypeStruct((count, 3, crop["height"], crop["width"]), jnp.float32, sharding=sharded)
    wanted = jax.ShapeDtypeStruct((count,), jnp.bool_, sharding=sharded)
    return jax.jit(check).lower(params, pixel_values, wanted)


def _sharded_shapes(mesh: Mesh, tree: Any) -> Any:
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _lower_sharded(local: Any, mesh: Mesh, *arrays: Any, donate: int | tuple[int, ...] = ()) -> jax.stages.Lowered:
    program = jax.shard_map(local, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED, check_vma=False)
    return jax.jit(program, donate_argnums=donate).lower(*_sharded_shapes(mesh, arrays))


def _insert(checkpoint: Checkpoint, geometry: Geometry, params: Any, slots: Slots, todo: Phases) -> Slots:
    """Encode the prompt and start the job in its slot; the noise comes from nothing but the job's own key."""
    slot = todo.insert_slot

    def start(slots: Slots) -> Slots:
        key = jax.random.wrap_key_data(todo.key_data)
        noise = jax.random.normal(key, (1, *geometry.latent_shape), jnp.float32)[0]
        context = checkpoint.text_encoder(todo.prompt_ids, params=params["text_encoder"])[0]
        return Slots(
            latents=slots.latents.at[slot].set(noise * todo.init_noise_sigma),
            history=slots.history.at[slot].set(0.0),
            step=slots.step.at[slot].set(0),
            num_steps=slots.num_steps.at[slot].set(todo.num_steps),
            guidance_scale=slots.guidance_scale.at[slot].set(todo.guidance_scale),
            context=slots.context.at[slot].set(context.astype(geometry.dtype)),
            table=slots.table.at[slot].set(todo.table),
        )

    return jax.lax.cond(slot >= 0, start, lambda slots: slots, slots)


def _advance(checkpoint: Checkpoint, geometry: Geometry, params: Any, slots: Slots, steps: jax.Array) -> Slots:
    """Take `steps` denoising steps in all slots of the device; a slot keeps its values after its job's last step."""
    rows = jnp.arange(geometry.slots_per_device)
    # Unconditional halves first, then the conditional ones: (2S, L, E).
    context = slots.context.swapaxes(0, 1).reshape(-1, *slots.context.shape[2:])
    guidance_scale = slots.guidance_scale[:, None, None, None]

    def denoise(_: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, history, step = carry
        row = slots.table[rows, jnp.minimum(step, MAX_STEPS - 1)]  # (S, len(COLUMNS))
        column = {name: row[:, i, None, None, None] for i, name in enumerate(COLUMNS)}
        x_in = jnp.concatenate([x * column["c_in"]] * 2)
        t = jnp.concatenate([row[:, 0]] * 2)
        out = checkpoint.unet.apply({"params": params["unet"]}, x_in, t, context).sample.astype(jnp.float32)
        unconditional, conditional = jnp.split(out, 2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        m = jnp.where(guidance_scale > 1, guided, conditional)  # a scale of 1 or less is no guidance, as in diffusers
        h = column["p"] * x + column["q"] * m
        x_next = (
            column["a"] * x
            + column["b"] * m
            + column["c"] * history[:, 0]
            + column["d"] * history[:, 1]
            + column["e"] * history[:, 2]
        )
        pushed = jnp.concatenate([h[:, None], history[:, :2]], axis=1)
        running = (step < slots.num_steps)[:, None, None, None]
        push = running & (column["push"] > 0)
        return (
            jnp.where(running, x_next, x),
            jnp.where(push[:, None], pushed, history),
            step + running[:, 0, 0, 0],
        )

    x, history, step = jax.lax.fori_loop(0, steps, denoise, (slots.latents, slots.history, slots.step))
    return slots._replace(latents=x, history=history, step=step)


def _decode(checkpoint: Checkpoint, geometry: Geometry, params: Any, slots: Slots, slot: jax.Array) -> Decoded:
    """Decode one slot to pixels, clipped, rounded and cast on the device: a quarter of the bytes leave it."""

    def run() -> Decoded:
        latents = jax.lax.dynamic_slice_in_dim(slots.latents, slot, 1) / checkpoint.vae.config.scaling_factor
        image = checkpoint.vae.apply({"params": params["vae"]}, latents, method=checkpoint.vae.decode).sample
        image = image.astype(jnp.float32)
        finite = jnp.isfinite(latents).all() & jnp.isfinite(image).all()
        unit = jnp.clip(image / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        return Decoded(jnp.round(unit[0] * 255).astype(jnp.uint8), finite)

    def nothing() -> Decoded:
        return Decoded(jnp.zeros((geometry.height, geometry.width, 3), jnp.uint8), jnp.ones((), bool))

    return jax.lax.cond(slot >= 0, run, nothing)
