"""The parameters of a job, validated at the client and again in the worker."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.contract.parameter_checks import (
    check_choice,
    check_each,
    check_flag,
    check_fraction,
    check_guidance,
    check_integer,
    check_loras,
    check_name,
    check_optional_name,
    check_optional_text,
    check_pair,
    check_prompt,
    check_sampler,
    check_seed,
    check_side,
    check_tenant,
    each_of,
    loras_of,
)
from sdtpu_worker.contract.picture_reference import check_picture, is_result, named_picture, shown_picture
from sdtpu_worker.contract.prompt_syntax import PROMPT_SYNTAXES, read_weighted
from sdtpu_worker.contract.samplers import SIGMA_SPACINGS, resolve_sampler
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

MAX_STEPS = 1000
DRAWN_SEED_BITS = 53
"""Bits of a seed that nobody chose: JavaScript's numbers, and so every browser's JSON, carry that many exactly."""
MAX_CLIP_SKIP = 11
DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE = 50, 7.5
"""Of checkpoints that ask for nothing else."""
DEFAULT_STRENGTH = 0.8
"""Of a job with an image and no mask, as in diffusers; with a mask it is 1."""
DEFAULT_IMAGE_GUIDANCE_SCALE = 1.5
PICTURES = ("image", "mask_image", "control_image")
"""The parameters that are pictures."""
LISTED = ("control_image",)
"""Of these, the ones that may be several pictures."""
IMAGE_FORMATS = ("png", "jpeg", "webp")
PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
"""The parameters that are prompts."""


@dataclass(frozen=True)
class GenerationRequest:
    """The parameters of one job, under the names of the diffusers pipeline call.

    Attributes:
        prompt: what the image shows, 1 to 10,000 characters. A plain one is cut after 77 tokens, and the result says
            so.
        negative_prompt: what the image should not show; empty or None for none.
        seed: 0 to 2**63 - 1, also given as a string of its decimal digits; None has the client draw one of 53 bits.
        num_inference_steps: denoising steps, 1 to 1000; None for the checkpoint's own: 50, few for a distilled one.
        guidance_scale: how strongly the prompt counts (classifier-free guidance), -1000 to 1000; None for the
            checkpoint's own: 7.5, less for a distilled one. A scale of 1 or less means no guidance, as in diffusers:
            the prompt alone, whatever the negative prompt is.
        height: pixels, a multiple of 8 and one of the worker's sizes (`sdtpu_resolutions`); None for the
            checkpoint's own.
        width: as `height`.
        sampler: a name that `contract.samplers` knows, kept in its canonical form; None for the checkpoint's own.
            A name may say the sigmas too, as `DPM++ 2M Karras` does.
        image_format: png, jpeg or webp.
        sigmas: how the sampler spaces its noise levels: karras, exponential or beta; None as the checkpoint says.
        eta: how much noise DDIM and TCD add at every step, 0 to 1; None for the sampler's own.
        guidance_rescale: 0 to 1, how far the contrast that guidance adds is taken back (arXiv 2305.08891).
        clip_skip: how many of the last layers of the text encoders are left out for the prompt, 0 to 11; a negative
            prompt gets all of them, as in diffusers.
        prompt_2, negative_prompt_2: for the second text encoder of a checkpoint that has two; None for the same text.
        original_size, target_size: `(height, width)` that a Stable Diffusion XL checkpoint is told, in pixels; None for
            the image's own.
        crops_coords_top_left: `(top, left)` that it is told, in pixels; None for `(0, 0)`.
        image: a picture to start from, as `contract.picture_reference` names one; its size is the result's. What was an
            earlier result becomes its image's URI here.
        strength: how much of the image is given up, above 0 to 1: the share of the steps that are taken. None for 0.8,
            and for 1 with a mask.
        mask_image: a picture of the same size: where it is light, the image is drawn again; the rest stays.
        preserve_unmasked: what the mask does not cover has the image's own pixels, bit for bit; without, they are what
            the autoencoder makes of them.
        image_guidance_scale: how strongly the image counts for a checkpoint that follows edit instructions
            (InstructPix2Pix); None for 1.5. Below 1 there is no guidance at all, as in diffusers.
        control_image: a picture for a ControlNet, or one for each; its size is the result's.
        controlnet: the name of a ControlNet of the worker (`sdtpu_controlnets`), or several; None for its only one.
        controlnet_conditioning_scale: how strongly it counts; one number, or one for each. Also understood as
            `conditioning_scale`.
        control_guidance_start, control_guidance_end: 0 to 1, the shares of the steps at which it begins and ceases to
            count; one number, or one for each.
        loras: at most 4 LoRAs of the worker (`sdtpu_loras`), each as a name or as a pair of name and weight, -100 to
            100; kept as pairs.
        prompt_syntax: how the prompts are read: `plain`, as text; `weighted`, as `contract.prompt_syntax` says, in as
            many windows of 75 tokens as they need and the worker takes (`sdtpu_prompt_windows`).

    Raises:
        InvalidRequest: a value is not allowed; the text says what was got and what is allowed.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    image_format: str = "png"
    sigmas: str | None = None
    eta: float | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    image: str | None = None
    strength: float | None = None
    mask_image: str | None = None
    preserve_unmasked: bool = True
    image_guidance_scale: float | None = None
    control_image: tuple[str, ...] | None = None
    controlnet: tuple[str, ...] | None = None
    controlnet_conditioning_scale: tuple[float, ...] = (1.0,)
    control_guidance_start: tuple[float, ...] = (0.0,)
    control_guidance_end: tuple[float, ...] = (1.0,)
    loras: tuple[tuple[str, float], ...] = ()
    prompt_syntax: str = "plain"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        for name, kind in _KINDS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, kind(value))
        object.__setattr__(self, "negative_prompt", self.negative_prompt or "")
        object.__setattr__(self, "loras", loras_of(self.loras or ()))
        if self.sampler is not None:
            self._resolve_sampler(self.sampler)
        for name in ("mask_image", "strength", "image_guidance_scale"):
            if (value := getattr(self, name)) is not None and self.image is None:
                raise InvalidRequest(f"{name} must come with an image, got {brief(value)} without one")
        if self.prompt_syntax == "weighted":
            for name in PROMPTS:
                read_weighted(name, getattr(self, name) or "")

    def _resolve_sampler(self, name: str) -> None:
        sampler, sigmas = resolve_sampler(name)
        if sigmas and self.sigmas not in (None, sigmas):
            raise InvalidRequest(f"sigmas must be what the sampler {brief(name)} says, got {brief(self.sigmas)}")
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "sigmas", self.sigmas or sigmas)

    @classmethod
    def parse(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationRequest:
        """Return the request that a task's arguments make: the prompt first or by name, the others by name.

        In a chain the first argument may be the result of an earlier job, whose image is then the one to start from.
        The argument `tenant`, which chooses the job's queue, is checked too, but it is not a part of the request.

        Raises:
            InvalidRequest: an argument is missing, unknown or not allowed.
        """
        check_arguments(args, kwargs)
        if kwargs.get("idempotency_key") is not None:
            raise InvalidRequest(
                "idempotency_key must be given to generate.delay or apply_async of this package, which does not send"
                " it; a client that writes messages itself repeats the task id"
            )
        given = {name: value for name, value in _by_name(args, kwargs).items() if name in _CHECKS}
        if "prompt" not in given:
            raise InvalidRequest("prompt is missing: pass it as the first argument, a string")
        return cls(**given)

    def with_seed(self, task_id: str) -> GenerationRequest:
        """Return the request with a seed: its own, else one derived from the task id."""
        return self if self.seed is not None else dataclasses.replace(self, seed=seed_from_task_id(task_id))

    def with_defaults(
        self, sampler: str, num_inference_steps: int = DEFAULT_STEPS, guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    ) -> GenerationRequest:
        """Return the request with a checkpoint's own values where it has none."""
        return dataclasses.replace(
            self,
            sampler=self.sampler or sampler,
            num_inference_steps=self.num_inference_steps or num_inference_steps,
            guidance_scale=guidance_scale if self.guidance_scale is None else self.guidance_scale,
        )

    def parameters(self) -> dict[str, Any]:
        """Return what every result reports besides prompts and seed."""
        return {name: getattr(self, name) for name in ("num_inference_steps", "guidance_scale", "sampler")}

    def options(self) -> dict[str, Any]:
        """Return what else was asked for than every result reports: JSON-compatible, without what is the default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in _OPTIONS}
        return {name: _plain(name, value) for name, value in values.items() if value != defaults[name]}

    def to_json(self) -> dict[str, Any]:
        """Return the parameters as a JSON-compatible dict."""
        return dataclasses.asdict(self)


def _plain(name: str, value: Any) -> Any:
    """Return a parameter as results report it."""
    if name in PICTURES:
        return [shown_picture(uri) for uri in value] if name in LISTED else shown_picture(value)
    if name == "loras":
        return [list(pair) for pair in value]
    return list(value) if isinstance(value, tuple) else value


def check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a task; some may be missing, because a partial signature gets them later.

    Raises:
        InvalidRequest: an argument is unknown, given twice or not allowed.
    """
    for name, value in _by_name(args, kwargs).items():
        if name not in _ARGUMENT_CHECKS:
            raise InvalidRequest(f"unknown parameter {brief(name)}; the parameters are {', '.join(_ARGUMENT_CHECKS)}")
        _ARGUMENT_CHECKS[name](name, value)


def _by_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's arguments by name; a positional mapping is an earlier result, whose image is the one meant.

    Raises:
        InvalidRequest: an argument is given twice.
    """
    if len(args) > 1:
        raise InvalidRequest(f"only the prompt is positional, got {len(args)} positional arguments; name the others")
    given = dict(kwargs)
    if args:
        name = "image" if is_result(args[0]) else "prompt"
        if given.get(name) is not None:
            raise InvalidRequest(f"{name} was given twice, by position and by name; give it once")
        given[name] = args[0]
    for other, name in _ALIASES.items():
        if other in given:
            if name in given:
                raise InvalidRequest(f"{name} was given twice, also as {other}; give it once")
            given[name] = given.pop(other)
    return given


def draw_seed() -> int:
    """Return a random seed that survives the JSON of a browser: 0 to 2**53 - 1."""
    return secrets.randbits(DRAWN_SEED_BITS)


def seed_from_task_id(task_id: str) -> int:
    """Return the seed of a job that has none, 0 to 2**53 - 1: the same after every redelivery and retry."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big") >> (64 - DRAWN_SEED_BITS)


_CHECKS: dict[str, Any] = {
    "prompt": check_prompt,
    "negative_prompt": check_optional_text,
    "seed": check_seed,
    "num_inference_steps": check_integer(1, MAX_STEPS, optional=True),
    "guidance_scale": check_guidance,
    "height": check_side,
    "width": check_side,
    "sampler": check_sampler,
    "image_format": check_choice(IMAGE_FORMATS),
    "sigmas": check_choice(SIGMA_SPACINGS, optional=True),
    "eta": check_fraction(),
    "guidance_rescale": check_fraction(),
    "clip_skip": check_integer(0, MAX_CLIP_SKIP),
    "prompt_2": check_optional_text,
    "negative_prompt_2": check_optional_text,
    "original_size": check_pair(1),
    "target_size": check_pair(1),
    "crops_coords_top_left": check_pair(0),
    "image": check_picture,
    "strength": check_fraction(),
    "mask_image": check_picture,
    "preserve_unmasked": check_flag,
    "image_guidance_scale": check_guidance,
    "control_image": check_each(check_picture, optional=True),
    "controlnet": check_each(check_name, optional=True),
    "controlnet_conditioning_scale": check_each(check_guidance),
    "control_guidance_start": check_each(check_fraction(optional=False)),
    "control_guidance_end": check_each(check_fraction(optional=False)),
    "loras": check_loras,
    "prompt_syntax": check_choice(PROMPT_SYNTAXES),
}
_ALIASES = {"conditioning_scale": "controlnet_conditioning_scale"}
_OPTIONS = (*list(_CHECKS)[list(_CHECKS).index("image_format") + 1 :],)
_KINDS: dict[str, Any] = {
    "seed": int,
    "guidance_scale": float,
    "eta": float,
    "guidance_rescale": float,
    "original_size": tuple,
    "target_size": tuple,
    "crops_coords_top_left": tuple,
    "image": named_picture,
    "strength": float,
    "mask_image": named_picture,
    "image_guidance_scale": float,
    "control_image": each_of(named_picture),
    "controlnet": each_of(str),
    "controlnet_conditioning_scale": each_of(float),
    "control_guidance_start": each_of(float),
    "control_guidance_end": each_of(float),
}
_ARGUMENT_CHECKS = {**_CHECKS, "tenant": check_tenant, "idempotency_key": check_optional_name}
