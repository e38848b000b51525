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

from sdtpu_worker.contract.samplers import canonical_sampler
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
        num_inference_steps: denoising steps, 1 to 1000.
        guidance_scale: how strongly the prompt counts (classifier-free guidance), -1000 to 1000. A scale of 1 or less
            means no guidance, as in diffusers: the prompt alone, whatever the negative prompt is.
        height: pixels, a multiple of 8 and one of the worker's sizes (`sdtpu_resolutions`); None for the
            checkpoint's own.
        width: as `height`.
        sampler: a name that `contract.samplers` knows, kept in its canonical form; None for the checkpoint's own.
        image_format: png, jpeg or webp.

    Raises:
        InvalidRequest: a value is not allowed; the text says what was got and what is allowed.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    image_format: str = "png"

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        object.__setattr__(self, "guidance_scale", float(self.guidance_scale))
        object.__setattr__(self, "negative_prompt", self.negative_prompt or "")
        if self.sampler is not None:
            object.__setattr__(self, "sampler", canonical_sampler(self.sampler))
        if self.seed is not None:
            object.__setattr__(self, "seed", int(self.seed))

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


def _check_negative_prompt(name: str, value: Any) -> None:
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


def _check_integer(low: int, high: int) -> Any:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be an integer from {low} to {high}, got {brief(value)}")

    return check


def _check_guidance(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_GUIDANCE_SCALE <= value <= MAX_GUIDANCE_SCALE:  # also of NaN, and of any integer
        raise InvalidRequest(
            f"{name} must be a finite number from -{MAX_GUIDANCE_SCALE:.0f} to {MAX_GUIDANCE_SCALE:.0f},"
            f" got {brief(value)}"
        )


def _check_side(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE or value % SIDE_MULTIPLE:
        raise InvalidRequest(
            f"{name} must be a multiple of {SIDE_MULTIPLE} up to {MAX_SIDE} pixels, got {brief(value)}"
        )


def _check_sampler(name: str, value: Any) -> None:
    if value is not None:
        canonical_sampler(value)


def _check_choice(choices: Sequence[str]) -> Any:
    def check(name: str, value: Any) -> None:
        if isinstance(value, str) and value in choices:
            return
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")

    return check


_CHECKS: dict[str, Any] = {
    "prompt": _check_prompt,
    "negative_prompt": _check_negative_prompt,
    "seed": _check_seed,
    "num_inference_steps": _check_integer(1, MAX_STEPS),
    "guidance_scale": _check_guidance,
    "height": _check_side,
    "width": _check_side,
    "sampler": _check_sampler,
    "image_format": _check_choice(IMAGE_FORMATS),
}
_ARGUMENT_CHECKS = {**_CHECKS, "tenant": _check_tenant}
