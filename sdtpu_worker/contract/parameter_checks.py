"""One check for each kind of parameter: it raises InvalidRequest with what was got and what is allowed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from sdtpu_worker.contract.samplers import resolve_sampler
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

MAX_PROMPT_CHARACTERS = 10_000
MAX_SEED = 2**63 - 1
MAX_GUIDANCE_SCALE = 1000.0
MAX_TENANT_CHARACTERS = 128
MAX_SIDE = 4096
MAX_TOLD_SIDE = 65_536
SIDE_MULTIPLE = 8
MAX_LISTED = 8
MAX_LORAS = 4
MAX_LORA_WEIGHT = 100.0
_SEED_DIGITS = re.compile("[0-9]{1,19}")


def check_text(name: str, value: Any) -> None:
    """Check a text without control characters."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, got {type(value).__name__}: {brief(value)}")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(f"{name} must have at most {MAX_PROMPT_CHARACTERS:,} characters, got {len(value):,}")
    for position, character in enumerate(value):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise InvalidRequest(
                f"{name} must not have control characters, got {character!r} at position {position}; remove it"
            )


def check_optional_text(name: str, value: Any) -> None:
    """Check a text, or None."""
    if value is not None:
        check_text(name, value)


def check_prompt(name: str, value: Any) -> None:
    """Check a text that says something."""
    check_text(name, value)
    if not value.strip():
        raise InvalidRequest(f"{name} must not be empty, got {brief(value)}")


def check_tenant(name: str, value: Any) -> None:
    """Check the name of a tenant."""
    if value is None:
        return
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TENANT_CHARACTERS:
        raise InvalidRequest(f"{name} must be a string of 1 to {MAX_TENANT_CHARACTERS} characters, got {brief(value)}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise InvalidRequest(f"{name} must not have control characters, got {brief(value)}")


def check_seed(name: str, value: Any) -> None:
    """Check an integer, or a text of its decimal digits."""
    if value is None or (isinstance(value, str) and _SEED_DIGITS.fullmatch(value) and int(value) <= MAX_SEED):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
        raise InvalidRequest(
            f"{name} must be an integer from 0 to 2**63 - 1, or a string of its decimal digits, got {brief(value)}"
        )


def check_integer(low: int, high: int, optional: bool = False) -> Any:
    """Return a check of an integer within bounds."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidRequest(f"{name} must be an integer from {low} to {high}, got {brief(value)}")

    return check


def check_guidance(name: str, value: Any) -> None:
    """Check a finite guidance scale."""
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -MAX_GUIDANCE_SCALE <= value <= MAX_GUIDANCE_SCALE:  # also of NaN, and of any integer
        raise InvalidRequest(
            f"{name} must be a finite number from -{MAX_GUIDANCE_SCALE:.0f} to {MAX_GUIDANCE_SCALE:.0f},"
            f" got {brief(value)}"
        )


def check_fraction(low: float = 0.0, optional: bool = True) -> Any:
    """Return a check of a number from `low` to 1."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= 1:
            raise InvalidRequest(f"{name} must be a number from {low:g} to 1, got {brief(value)}")

    return check


def check_each(check: Any, optional: bool = False) -> Any:
    """Return a check of one value, or of a list with 1 to `MAX_LISTED` of them."""

    def check_all(name: str, value: Any) -> None:
        if value is None and optional:
            return
        values = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(values) <= MAX_LISTED:
            raise InvalidRequest(f"{name} must be one value, or a list of 1 to {MAX_LISTED}, got {len(values)}")
        for each in values:
            if each is None:
                raise InvalidRequest(f"{name} must have no null in its list, got {brief(value)}")
            check(name, each)

    return check_all


def each_of(kind: Any) -> Any:
    """Return what makes a tuple of one value, or of a list of them."""
    return lambda value: tuple(map(kind, value if isinstance(value, list | tuple) else [value]))


def check_name(name: str, value: Any) -> None:
    """Check a name out of the worker's settings."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TENANT_CHARACTERS or not value.isprintable():
        raise InvalidRequest(f"{name} must be a name of 1 to {MAX_TENANT_CHARACTERS} characters, got {brief(value)}")


def check_loras(name: str, value: Any) -> None:
    """Check a list of names, and of pairs of name and weight; each name once."""
    if value is None:
        return
    if not isinstance(value, list | tuple) or len(value) > MAX_LORAS:
        raise InvalidRequest(
            f"{name} must be a list of at most {MAX_LORAS} names or pairs of name and weight, like"
            f' [["pixel", 0.8]], got {brief(value)}'
        )
    pairs = _pairs(value)
    for its_name, weight in pairs:
        check_name(f"{name}: a LoRA", its_name)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not -MAX_LORA_WEIGHT <= weight <= MAX_LORA_WEIGHT:  # also of NaN
            raise InvalidRequest(
                f"{name} must have finite weights from -{MAX_LORA_WEIGHT:.0f} to {MAX_LORA_WEIGHT:.0f}, got"
                f" {brief(weight)} for {brief(its_name)}; several LoRAs are a list of pairs"
            )
    names = [its_name for its_name, _ in pairs]
    if len(set(names)) < len(names):
        raise InvalidRequest(f"{name} must name each LoRA once, got {brief(names)}")


def loras_of(value: Any) -> tuple[tuple[str, float], ...]:
    """Return the pairs of name and weight that a sound list of them and of names means; a name alone has weight 1."""
    return tuple((name, float(weight)) for name, weight in _pairs(value))


def _pairs(value: Any) -> list[Any]:
    return [each if isinstance(each, list | tuple) and len(each) == 2 else (each, 1.0) for each in value]


def check_optional_name(name: str, value: Any) -> None:
    """Check a name, or None."""
    if value is not None:
        check_name(name, value)


def check_flag(name: str, value: Any) -> None:
    """Check True or False."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {brief(value)}")


def check_pair(low: int) -> Any:
    """Return a check of two integers, in pixels."""

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


def check_side(name: str, value: Any) -> None:
    """Check a side of an image, in pixels."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE or value % SIDE_MULTIPLE:
        raise InvalidRequest(
            f"{name} must be a multiple of {SIDE_MULTIPLE} up to {MAX_SIDE} pixels, got {brief(value)}"
        )


def check_sampler(name: str, value: Any) -> None:
    """Check the name of a sampler."""
    if value is not None:
        resolve_sampler(value)


def check_choice(choices: Sequence[str], optional: bool = False) -> Any:
    """Return a check of one of these words."""

    def check(name: str, value: Any) -> None:
        if (value is None and optional) or (isinstance(value, str) and value in choices):
            return
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}, got {brief(value)}")

    return check
