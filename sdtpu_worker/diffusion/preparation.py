"""The host's part of a job, done before a slot is free: what the family encodes, the coefficient table, the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtpu_worker.aggregator.jobs import NO_LOAD, Load
from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import DEFAULT_IMAGE_GUIDANCE_SCALE, DEFAULT_STRENGTH, LISTED, GenerationRequest
from sdtpu_worker.diffusion.adapters import JobAdapters
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.families.family import WINDOWS, Family, PictureUse
from sdtpu_worker.diffusion.samplers import make_table
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief


@dataclass(frozen=True)
class ControlPicture:
    """A ControlNet that a job asks.

    Attributes:
        number: of the ControlNet in the family.
        image: `(height, width, 3) uint8`.
        scale: how strongly it counts.
        first, end: the first row of the table that it counts in, and the row that it no longer counts in.
    """

    number: int
    image: np.ndarray
    scale: float
    first: int
    end: int


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to be inserted.

    Attributes:
        parameters: what the image is made with besides prompts and seed, as results report it; no default is left.
        num_steps: denoising steps of the devices: the rows of the table that count.
        inputs: by name, what the family encodes when the job gets its slot.
        key_data: `(2,) uint32`, high and low word of the key.
        guidance_scale, guidance_rescale, image_guidance_scale: as in the request.
        first_level: how much of the image's latents and of the noise the job starts with.
        table: `(MAX_STEPS, columns) float32` coefficients.
        truncated: a prompt had more tokens than the text encoder takes.
        image: `(height, width, 3) uint8`, what the job starts from; None for noise alone.
        mask: `(height, width) bool`, True where the image is drawn again; None for everywhere.
        load: what the job asks of its device beyond words and steps.
        controls: the ControlNets that it asks.
        adapters: its LoRAs; None for a job without.
        preserve_unmasked: the picture has the image's own pixels where the mask does not cover them.
    """

    task_id: str
    lane: Lane
    parameters: Mapping[str, Any]
    num_steps: int
    inputs: Mapping[str, np.ndarray]
    key_data: np.ndarray
    guidance_scale: float
    guidance_rescale: float
    image_guidance_scale: float
    first_level: tuple[float, float]
    table: np.ndarray
    truncated: bool
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    preserve_unmasked: bool = True
    load: Load = NO_LOAD
    controls: tuple[ControlPicture, ...] = ()
    adapters: JobAdapters | None = None

    def finish(self, pixels: np.ndarray) -> np.ndarray:
        """Return the picture of decoded pixels, both `(height, width, 3) uint8`."""
        if self.image is None or self.mask is None or not self.preserve_unmasked:
            return pixels
        return np.where(self.mask[..., None], pixels, self.image)


def prepare_job(
    checkpoint: Checkpoint,
    lanes: Collection[Lane],
    task_id: str,
    request: GenerationRequest,
    key_data: np.ndarray | None,
    pictures: Mapping[str, Any],
) -> PreparedJob:
    """Return a job that an engine can insert.

    Args:
        checkpoint: the loaded model.
        lanes: the resolutions that have programs.
        task_id: names the job in plans.
        request: with a seed, unless `key_data` is given.
        key_data: `(2,) uint32`, raw key words (for split keys), instead of the request's seed.
        pictures: the request's, by parameter: `image`, `(height, width, 3) uint8`; `mask_image`,
            `(height, width) bool`; `control_image`, a list of images.

    Raises:
        InvalidRequest: no lane has the size, the sampler is not known, there is no seed, a LoRA does not fit, or the
            model cannot do it.
    """
    request = checkpoint.defaults.fill(request)
    assert request.num_inference_steps is not None
    assert request.guidance_scale is not None
    lane = _find_lane(checkpoint.family.default_size, request, pictures)
    if lane not in lanes:
        raise InvalidRequest(
            f"height x width must be one of {', '.join(map(format_size, lanes))} (sdtpu_resolutions),"
            f" got {format_size(lane)}"
        )
    begins_at_image = request.image is not None and checkpoint.family.picture_use is not PictureUse.EDIT
    skipped = _skipped_steps(request, request.num_inference_steps) if begins_at_image else 0
    table = make_table(
        checkpoint.schedule, request.num_inference_steps, request.sampler, request.sigmas, request.eta, skipped
    )
    is_noise_alone = not begins_at_image or (request.mask_image is not None and not skipped)
    if key_data is None:
        if request.seed is None:
            raise InvalidRequest("seed is missing: pass one, or the key's words")
        key_data = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
    inputs, truncated = checkpoint.family.make_inputs(request, lane)
    controls = _find_controls(checkpoint.family.control_names, request, pictures, table.num_rows)
    adapters = _find_adapters(checkpoint, request)
    encoded = _encoded_pictures(checkpoint.family.picture_use, request, is_noise_alone)
    return PreparedJob(
        task_id=task_id,
        lane=lane,
        parameters=request.parameters(),
        num_steps=table.num_rows,
        inputs=inputs,
        key_data=np.asarray(key_data, np.uint32),
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        image_guidance_scale=_or(request.image_guidance_scale, DEFAULT_IMAGE_GUIDANCE_SCALE),
        first_level=(0.0, table.init_noise_sigma) if is_noise_alone else table.first_level,
        table=table.rows,
        truncated=truncated,
        image=pictures.get("image"),
        mask=pictures.get("mask_image"),
        preserve_unmasked=request.preserve_unmasked,
        load=Load(
            encoded, frozenset(control.number for control in controls), int(adapters is not None), _windows(inputs) - 1
        ),
        controls=controls,
        adapters=adapters,
    )


def _windows(inputs: Mapping[str, np.ndarray]) -> int:
    """Return how many windows a job's longest prompt has."""
    return int(inputs[WINDOWS].max()) if WINDOWS in inputs else 1


def _encoded_pictures(use: PictureUse, request: GenerationRequest, is_noise_alone: bool) -> int:
    """Return how many times the job's start asks the encoder."""
    if request.image is None:
        return 0
    starts_at_image = not is_noise_alone or (use is PictureUse.START and request.mask_image is not None)
    return starts_at_image + (use in (PictureUse.INPAINT, PictureUse.EDIT))


def _find_adapters(checkpoint: Checkpoint, request: GenerationRequest) -> JobAdapters | None:
    """Return the LoRAs that a request names.

    Raises:
        InvalidRequest: the worker has none, or one is not known, broken or for another model.
    """
    if not request.loras:
        return None
    if checkpoint.adapters is None:
        raise InvalidRequest(
            f"loras must be left out: this worker has none for single jobs (sdtpu_loras), got {brief(request.loras)}"
        )
    return checkpoint.adapters.load(request.loras)


def _find_controls(
    names: Sequence[str], request: GenerationRequest, pictures: Mapping[str, Any], num_rows: int
) -> tuple[ControlPicture, ...]:
    """Return the ControlNets that a request asks, with the rows in which they count by diffusers' rule.

    Raises:
        InvalidRequest: there is no such ControlNet, or as many pictures as ControlNets are not given.
    """
    images = pictures.get("control_image", ())
    wanted = request.controlnet
    if not images and wanted is None:
        return ()
    if not names:
        raise InvalidRequest("control_image must be left out: this worker has no ControlNet (sdtpu_controlnets)")
    if wanted is None and len(names) > 1:
        raise InvalidRequest(f"controlnet must say which of {', '.join(names)} is meant, got none")
    wanted = wanted or (names[0],)
    if unknown := [name for name in wanted if name not in names]:
        raise InvalidRequest(f"controlnet must be of {', '.join(names)} (sdtpu_controlnets), got {brief(unknown[0])}")
    if len(images) != len(wanted):
        raise InvalidRequest(
            f"control_image must be one picture for each ControlNet ({', '.join(wanted)}), got {len(images)}"
        )
    found = []
    for i, name in enumerate(wanted):
        scale, start, end = (
            _of(name, given, i, len(wanted))
            for name, given in (
                ("controlnet_conditioning_scale", request.controlnet_conditioning_scale),
                ("control_guidance_start", request.control_guidance_start),
                ("control_guidance_end", request.control_guidance_end),
            )
        )
        counts = [row for row in range(num_rows) if row / num_rows >= start and (row + 1) / num_rows <= end]
        if not counts or not scale:
            continue
        found.append(ControlPicture(names.index(name), images[i], scale, counts[0], counts[-1] + 1))
    return tuple(found)


def _of(name: str, values: Sequence[float], i: int, count: int) -> float:
    """Return the value for a ControlNet, of one for all or one for each."""
    if len(values) not in (1, count):
        raise InvalidRequest(f"{name} must be one number, or {count}, one for each ControlNet, got {len(values)}")
    return values[0] if len(values) == 1 else values[i]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _find_lane(default: Lane, request: GenerationRequest, pictures: Mapping[str, Any]) -> Lane:
    """Return the size that a request names, else that of its first picture, else the checkpoint's own.

    Raises:
        InvalidRequest: a picture has another size.
    """
    every = [(name, each) for name, given in pictures.items() for each in (given if name in LISTED else [given])]
    height, width = every[0][1].shape[:2] if every else default
    lane = request.height or height, request.width or width
    for name, pixels in every:
        if pixels.shape[:2] != lane:
            raise InvalidRequest(
                f"{name} must have the size of the result, {format_size(lane)} (height x width),"
                f" got {format_size(pixels.shape[:2])}; scale it, or name another height and width"
            )
    return lane


def _skipped_steps(request: GenerationRequest, steps: int) -> int:
    """Return how many steps are left out at the start, by the rule of diffusers' pipelines.

    Raises:
        InvalidRequest: all of them.
    """
    strength = _or(request.strength, DEFAULT_STRENGTH if request.mask_image is None else 1.0)
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise InvalidRequest(
            f"strength must be at least 1 / num_inference_steps, {1 / steps:g}, or no step is taken, got {strength}"
        )
    return steps - taken


def plain_request(
    family: Family, lane: Lane, prompt: str, seed: int, steps: int
) -> tuple[GenerationRequest, dict[str, np.ndarray]]:
    """Return a request that the model serves, and its pictures: grey ones, if there must be some.

    Args:
        family: the model.
        lane: the size.
        prompt, seed, steps: of the request.
    """
    needed: dict[str, Any] = dict.fromkeys(family.picture_use.needed, "grey:")
    pictures = {"image": np.full((*lane, 3), 127, np.uint8), "mask_image": np.ones(lane, bool)}
    height, width = lane
    request = GenerationRequest(prompt, seed=seed, num_inference_steps=steps, height=height, width=width, **needed)
    return request, {name: pictures[name] for name in needed}


def format_size(lane: Lane) -> str:
    """Return a size as settings and messages write it, `height x width` without the spaces."""
    return f"{lane[0]}x{lane[1]}"
