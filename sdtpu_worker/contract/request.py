"""The parameters of a job, validated at the client and again in the worker."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtpu_worker.contract.samplers import SIGMA_SPACINGS, resolve_sampler
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**63 - 1
DRAWN_SEED_BITS = 53
"""Bits of a seed that nobody chose: JavaScript's numbers, and so every browser's JSON, carry that many exactly."""
MAX_GUIDANCE_SCALE = 1000.0
MAX_TENANT_CHARACTERS = 128
MAX_SIDE = 4096
MAX_TOLD_SIDE = 65_536
MAX_CLIP_SKIP = 11
DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE = 50, 7.5
"""Of checkpoints that ask for nothing else."""
SIDE_MULTIPLE = 8
IMAGE_FORMATS = ("png", "jpeg", "webp")
_SEED_DIGITS = re.compile("[0-9]{1,19}")


@dataclass(frozen=True)
class GenerationRequest:
    """The parameters of one job, under the names of the diffusers pipeline call.

    Attributes:
        prompt: what the image shows, 1 to 10,000 characters. It is cut after 77 tokens, and the result says so.
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

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        for name, kind in _KINDS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, kind(value))
        object.__setattr__(self, "negative_prompt", self.negative_prompt or "")
        if self.sampler is not None:
            self._resolve_sampler(self.sampler)

    def _resolve_sampler(self, name: str) -> None:
        sampler, sigmas = resolve_sampler(name)
        if sigmas and self.sigmas not in (None, sigmas):
            raise InvalidRequest(f"sigmas must be what the sampler {brief(name)} says, got {brief(self.sigmas)}")
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "sigmas", self.sigmas or sigmas)

    @classmethod
    def parse(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GenerationRequest:
        """Return the request that a task's arguments make: the prompt first or by name, the others by name.

        The argument `tenant`, which chooses the job's queue, is checked too, but it is not a part of the request.

        Raises:
            InvalidRequest: an argument is missing, unknown or not allowed.
        """
        check_arguments(args, kwargs)
        if not args and "prompt" not in kwargs:
            raise InvalidRequest("prompt is missing: pass it as the first argument, a string")
        given = {name: value for name, value in kwargs.items() if name in _CHECKS}
        if args:
            given["prompt"] = args[0]
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
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != defaults[name]
        }

    def to_json(self) -> dict[str, Any]:
        """Return the parameters as a JSON-compatible dict."""
        return dataclasses.asdict(self)


def check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of a task; some may be missing, because a partial signature gets them later.

    Raises:
        InvalidRequest: an argument is unknown, given twice or not allowed.
    """
    if len(args) > 1:
        raise InvalidRequest(f"only the prompt is positional, got {len(args)} positional arguments; name the others")
    if args and "prompt" in kwargs:
        raise InvalidRequest("prompt was given twice, by position and by name; give it once")
    given = {**kwargs, **({"prompt": args[0]} if args else {})}
    for name, value in given.items():
        if name not in _ARGUMENT_CHECKS:
            raise InvalidRequest(f"unknown parameter {brief(name)}; the parameters are {', '.join(_ARGUMENT_CHECKS)}")
        _ARGUMENT_CHECKS[name](name, value)


def draw_seed() -> int:
    """Return a random seed that survives the JSON of a browser: 0 to 2**53 - 1."""
    return secrets.randbits(DRAWN_SEED_BITS)


def seed_from_task_id(task_id: str) -> int:
    """Return the seed of a job that has none, 0 to 2**53 - 1: the same after every redelivery and retry."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big") >> (64 - DRAWN_SEED_BITS)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, got {type(value).__name__}: {brief(value)}")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(f"{name} must have at most {MAX_PROMPT_CHARACTERS:,} characters, got {len(value):,}")
    for position, character in enumerate(value):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise InvalidRequest(
                f"{name} must not have control characters, got {character!r} at position {position}; remove it"
            )


def _check_optional_text(name: str, value: Any) -> None:
    if value is not None:
        _check_text(name, value)


def _check_prompt(name: str, value: Any) -> None:
    _check_text(name, value)
    if not value.strip():
        raise InvalidRequest(f"{name} must not be empty, got {brief(value)}")


def _check_tenant(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TENANT_CHARACTERS:
        raise InvalidRequest(f"{name} must be a string of 1 to {MAX_TENANT_CHARACTERS} characters, got {brief(value)}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InvalidRequest(f"{name} must not have control characters, got {brief(value)}")


def _check_seed(name: str, value: Any) -> None:
    if value is None or (isinstance(value, str) and _SEED_DIGITS.fullmatch(value) and int(value) <= MAX_SEED):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
        raise InvalidRequest(
            f"{name} must be an integer from 0 to 2**63 - 1, or a string of its decimal digits, got {brief(value)}"
        )


def _check_integer(low: int, high: int, optional: bool = False) -> Any:
    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be an integer from {low} to {high}, got {brief(value)}")

    return check


def _check_guidance(name: str, value: Any) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_GUIDANCE_SCALE <= value <= MAX_GUIDANCE_SCALE:  # also of NaN, and of any integer
        raise InvalidRequest(
            f"{name} must be a finite number from -{MAX_GUIDANCE_SCALE:.0f} to {MAX_GUIDANCE_SCALE:.0f},"
            f" got {brief(value)}"
        )


def _check_fraction(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InvalidRequest(f"{name} must be a number from 0 to 1, got {brief(value)}")


def _check_pair(low: int) -> Any:
    def check(name: str, value: Any) -> None:
        if value is None:
            return
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        if not is_pair or any(type(side) is not int or not low <= side <= MAX_TOLD_SIDE for side in value):
            raise InvalidRequest(
                f"{name} must be two integers from {low} to {MAX_TOLD_SIDE:,}, the vertical one first,"
                f" got {brief(value)}"
            )

    return check


def _check_side(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE or value % SIDE_MULTIPLE:
        raise InvalidRequest(
            f"{name} must be a multiple of {SIDE_MULTIPLE} up to {MAX_SIDE} pixels, got {brief(value)}"
        )


def _check_sampler(name: str, value: Any) -> None:
    if value is not None:
        resolve_sampler(value)


def _check_choice(choices: Sequence[str], optional: bool = False) -> Any:
    def check(name: str, value: Any) -> None:
        if (value is None and optional) or (isinstance(value, str) and value in choices):
            return
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")

    return check


_CHECKS: dict[str, Any] = {
    "prompt": _check_prompt,
    "negative_prompt": _check_optional_text,
    "seed": _check_seed,
    "num_inference_steps": _check_integer(1, MAX_STEPS, optional=True),
    "guidance_scale": _check_guidance,
    "height": _check_side,
    "width": _check_side,
    "sampler": _check_sampler,
    "image_format": _check_choice(IMAGE_FORMATS),
    "sigmas": _check_choice(SIGMA_SPACINGS, optional=True),
    "eta": _check_fraction,
    "guidance_rescale": _check_fraction,
    "clip_skip": _check_integer(0, MAX_CLIP_SKIP),
    "prompt_2": _check_optional_text,
    "negative_prompt_2": _check_optional_text,
    "original_size": _check_pair(1),
    "target_size": _check_pair(1),
    "crops_coords_top_left": _check_pair(0),
}
_OPTIONS = (*list(_CHECKS)[list(_CHECKS).index("image_format") + 1 :],)
_KINDS: dict[str, Any] = {
    "seed": int,
    "guidance_scale": float,
    "eta": float,
    "guidance_rescale": float,
    "original_size": tuple,
    "target_size": tuple,
    "crops_coords_top_left": tuple,
}
_ARGUMENT_CHECKS = {**_CHECKS, "tenant": _check_tenant}
