"""What is on the devices while they serve: the state of every slot, and what a tick tells every device to do.

Shapes: D devices, S slots per device, N = D * S slots, P phases per tick, C latent channels, h x w latents, H rows of
the batch per job (see `Family.rows`). Everything with a leading N or D is sharded over the mesh's one axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from sdtpu_worker.aggregator.plan import Lane, phases_per_tick
from sdtpu_worker.contract.request import MAX_STEPS
from sdtpu_worker.diffusion.adapters import AdapterLayout
from sdtpu_worker.diffusion.families.family import Family, PictureUse, Shapes
from sdtpu_worker.diffusion.samplers import COLUMNS
from sdtpu_worker.diffusion.tiled_decoding import tile_side
from sdtpu_worker.models.kernel_table import AUTO

NOTHING = -1


class Slots(NamedTuple):
    """The state of all slots; donated to every tick and returned by it.

    The state of one job of each device, as it leaves and comes back, is the same with D instead of N.
    """

    latents: Any  # (N, C, h, w) float32
    history: Any  # (N, 3, C, h, w) float32, newest first
    step: Any  # (N,) int32, the next row of the table
    num_steps: Any  # (N,) int32, rows of the table that count; 0 for a slot that was never used
    guidance_scale: Any  # (N,) float32
    guidance_rescale: Any  # (N,) float32
    image_guidance_scale: Any  # (N,) float32
    key_data: Any  # (N, 2) uint32, the job's key
    conditioning: dict[str, Any]  # by name (N, H, …), what the family keeps; the negative prompt first
    table: Any  # (N, MAX_STEPS, len(COLUMNS)) float32
    picture: Picture | None  # None for a family that takes no pictures
    controls: Controls | None  # None for a worker without ControlNets
    adapters: AdapterUse | None  # None for a worker whose jobs name no LoRAs


class Picture(NamedTuple):
    """What a slot keeps of the image that its job started from."""

    latents: Any  # (N, C, h, w) float32, of the image; zeros without one
    kept: Any  # (N, h, w) bool, True where the image stays as it is


class Controls(NamedTuple):
    """What a slot keeps for ControlNets; K of them."""

    scale: Any  # (N, K) float32, how strongly each counts; 0 for those that the job does not ask
    first: Any  # (N, K) int32, the first row that each counts in
    end: Any  # (N, K) int32, the row that it no longer counts in
    embedded: tuple[Any, ...]  # of each (N, …), what it made of its picture


class AdapterUse(NamedTuple):
    """What a slot keeps of its job's LoRAs, which lie in the bank of its device."""

    entry: Any  # (N,) int32, of the device's bank; 0 for a job without LoRAs
    digest: Any  # (N, 2) uint32, of what is in it; zeros for a job without


class Phases(NamedTuple):
    """What every device does in each phase of a tick: decode, then insert, then advance."""

    decode_slot: Any  # (D, P) int32, a slot of the device, or NOTHING
    insert_slot: Any  # (D, P) int32, a slot of the device, or NOTHING
    inputs: dict[str, Any]  # by name (D, P, …), what the family encodes
    key_data: Any  # (D, P, 2) uint32, the job's key
    num_steps: Any  # (D, P) int32
    guidance_scale: Any  # (D, P) float32
    guidance_rescale: Any  # (D, P) float32
    image_guidance_scale: Any  # (D, P) float32
    first_level: Any  # (D, P, 2) float32, how much of the image's latents and of the noise a job starts with
    table: Any  # (D, P, MAX_STEPS, len(COLUMNS)) float32
    steps: Any  # (D, P) int32, denoising steps to take
    has_image: Any  # (D, P) bool
    image: Any  # (D, P, height, width, 3) uint8; None for a family that takes no pictures
    mask: Any  # (D, P, height, width) bool, True where the image is drawn again; None likewise
    control_scale: Any  # (D, P, K) float32; this and the next are None for a worker without ControlNets
    control_first: Any  # (D, P, K) int32
    control_end: Any  # (D, P, K) int32
    control_images: Any  # (D, P, K, height, width, 3) uint8
    adapters: AdapterUse | None  # of the job, (D, P, …); None for a worker whose jobs name no LoRAs


class Instructions(NamedTuple):
    """What every device does in one tick."""

    num_phases: Any  # (D,) int32, how many of its phases a device runs
    phases: Phases


class Decoded(NamedTuple):
    """What a tick returns; only the entries of phases that decode hold an image."""

    pixels: Any  # (D, P, height, width, 3) uint8
    finite: Any  # (D, P) bool, False if the latents or the image had a NaN or an infinity


@dataclass(frozen=True)
class Geometry:
    """The sizes that one tick program is compiled for.

    Attributes:
        num_devices: D.
        slots_per_device: S.
        phases: P, the most phases of a tick.
        height, width: of an image, in pixels.
        latent_shape: `(C, h, w)`.
        inputs: shapes and dtypes of what the family makes of a request.
        conditioning: by name `(H, …)`, shapes and dtypes of what a slot keeps for the family.
        takes_pictures: a job may start from an image.
        controls: shapes and dtypes of what the ControlNets make of a picture.
        decode_tile: side in latents of the tiles that an image is decoded in; 0 for all of it at once.
        adapters: how the LoRAs of single jobs lie in a bank; None for a worker whose jobs name none.
        adapter_entries: of a device's bank.
        attention: how attentions are computed, see `sdtpu_attention`.
    """

    num_devices: int
    slots_per_device: int
    phases: int
    height: int
    width: int
    latent_shape: tuple[int, int, int]
    inputs: Shapes
    conditioning: Shapes
    takes_pictures: bool = False
    controls: tuple[jax.ShapeDtypeStruct, ...] = ()
    decode_tile: int = 0
    adapters: AdapterLayout | None = None
    adapter_entries: int = 0
    attention: str = AUTO

    @classmethod
    def of(
        cls,
        family: Family,
        num_devices: int,
        slots_per_device: int,
        size: Lane,
        in_tiles: bool = False,
        adapters: AdapterLayout | None = None,
        adapter_entries: int = 0,
        attention: str = AUTO,
    ) -> Geometry:
        """Return the sizes for a model and a resolution.

        Args:
            family: the model.
            num_devices: D.
            slots_per_device: S.
            size: `(height, width)` of an image in pixels.
            in_tiles: images are decoded in tiles.
            adapters, adapter_entries, attention: see the attributes.
        """
        factor, rows, (height, width) = family.scale_factor, family.rows, size
        return cls(
            num_devices=num_devices,
            slots_per_device=slots_per_device,
            phases=phases_per_tick(slots_per_device),
            height=height,
            width=width,
            latent_shape=(family.latent_channels, height // factor, width // factor),
            inputs=family.input_shapes(),
            conditioning={
                name: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype)
                for name, leaf in family.conditioning_shapes(size).items()
            },
            takes_pictures=family.picture_use is not PictureUse.NONE,
            controls=family.control_shapes(size),
            decode_tile=tile_side(height // factor, width // factor) if in_tiles else 0,
            adapters=adapters,
            adapter_entries=adapter_entries,
            attention=attention,
        )

    def empty_slots(self) -> Slots:
        """Return the state before any job, as host arrays."""
        return self._empty_rows(self.num_devices * self.slots_per_device)

    def empty_states(self) -> Slots:
        """Return one state per device, as host arrays of zeros."""
        return self._empty_rows(self.num_devices)

    def no_instructions(self, pictures: Mapping[str, Any] | None = None) -> Instructions:
        """Return fresh instructions that do nothing. A dispatch aliases its arrays, so never use them twice.

        Args:
            pictures: `image`, `mask` and `control_images`, for all devices; None for zeros, see `no_pictures`.
        """
        d, k = self.num_devices, len(self.controls)
        dp = d, self.phases
        phases = Phases(
            decode_slot=np.full(dp, NOTHING, np.int32),
            insert_slot=np.full(dp, NOTHING, np.int32),
            inputs=_zeros(dp, self.inputs),
            key_data=np.zeros((*dp, 2), np.uint32),
            num_steps=np.zeros(dp, np.int32),
            guidance_scale=np.zeros(dp, np.float32),
            guidance_rescale=np.zeros(dp, np.float32),
            image_guidance_scale=np.zeros(dp, np.float32),
            first_level=np.zeros((*dp, 2), np.float32),
            table=np.zeros((*dp, MAX_STEPS, len(COLUMNS)), np.float32),
            steps=np.zeros(dp, np.int32),
            has_image=np.zeros(dp, bool),
            control_scale=np.zeros((*dp, k), np.float32) if k else None,
            control_first=np.zeros((*dp, k), np.int32) if k else None,
            control_end=np.zeros((*dp, k), np.int32) if k else None,
            adapters=self._no_adapters(dp),
            **(self.no_pictures(d) if pictures is None else pictures),
        )
        return Instructions(np.zeros(d, np.int32), phases)

    def no_pictures(self, num_devices: int) -> dict[str, Any]:
        """Return `image`, `mask` and `control_images` of instructions without any, for this many devices."""
        leading, size = (num_devices, self.phases), (self.height, self.width)
        found: dict[str, Any] = {"image": None, "mask": None, "control_images": None}
        if self.takes_pictures:
            found["image"] = np.zeros((*leading, *size, 3), np.uint8)
            found["mask"] = np.zeros((*leading, *size), bool)
        if self.controls:
            found["control_images"] = np.zeros((*leading, len(self.controls), *size, 3), np.uint8)
        return found

    def _empty_rows(self, n: int) -> Slots:
        return Slots(
            latents=np.zeros((n, *self.latent_shape), np.float32),
            history=np.zeros((n, 3, *self.latent_shape), np.float32),
            step=np.zeros(n, np.int32),
            num_steps=np.zeros(n, np.int32),
            guidance_scale=np.zeros(n, np.float32),
            guidance_rescale=np.zeros(n, np.float32),
            image_guidance_scale=np.zeros(n, np.float32),
            key_data=np.zeros((n, 2), np.uint32),
            conditioning=_zeros((n,), self.conditioning),
            table=np.zeros((n, MAX_STEPS, len(COLUMNS)), np.float32),
            picture=self._no_picture(n) if self.takes_pictures else None,
            controls=self._no_controls(n) if self.controls else None,
            adapters=self._no_adapters((n,)),
        )

    def _no_picture(self, n: int) -> Picture:
        return Picture(np.zeros((n, *self.latent_shape), np.float32), np.zeros((n, *self.latent_shape[1:]), bool))

    def _no_controls(self, n: int) -> Controls:
        shape = n, len(self.controls)
        embedded = tuple(np.zeros((n, *each.shape), each.dtype) for each in self.controls)
        return Controls(np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.int32), embedded)

    def _no_adapters(self, leading: tuple[int, ...]) -> AdapterUse | None:
        if self.adapters is None:
            return None
        return AdapterUse(np.zeros(leading, np.int32), np.zeros((*leading, 2), np.uint32))


def _zeros(leading: tuple[int, ...], shapes: Shapes) -> dict[str, Any]:
    return {name: np.zeros((*leading, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
