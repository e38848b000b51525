"""What a worker serves: what a form for its jobs has to know. A part of its load report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sdtpu_worker.redaction import brief

MAX_NAMES = 200
"""How many names of one kind a report has; further ones are left out."""
_MAX_NAME_CHARACTERS = 256
PICTURE_USES = ("none", "start", "inpaint", "edit")
"""What a worker does with a picture: it takes none, starts from it, fills a part of it, or follows an instruction."""


@dataclass(frozen=True)
class Served:
    """What one worker serves.

    Attributes:
        model: the checkpoint's name; of a folder or a file its last part only.
        samplers: the samplers that a job may choose, by their canonical names.
        default_sampler: of a job that names none.
        default_guidance_scale: of a job that names none.
        follows_guidance_scale: whether a guidance scale above 1 has an effect.
        takes_negative_prompt: whether a negative prompt has one; with a model that was distilled with guidance, which
            is told the scale, it has none.
        loras: names that a job may give as `loras`.
        controlnets: names that a job may give as `controlnet`.
        pictures: what it does with a picture, one of `PICTURE_USES`.
        has_previews: whether jobs show the forming picture.
    """

    model: str
    samplers: tuple[str, ...] = ()
    default_sampler: str = ""
    default_guidance_scale: float = 7.5
    follows_guidance_scale: bool = True
    takes_negative_prompt: bool = True
    loras: tuple[str, ...] = ()
    controlnets: tuple[str, ...] = ()
    pictures: str = "none"
    has_previews: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-compatible data."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Any) -> Served:
        """Return what a report says; fields that this version does not know are ignored.

        Raises:
            ValueError: a field is missing, or out of its bounds.
        """
        if not isinstance(facts, Mapping):
            raise ValueError(f"serves of a load report must be a JSON object, got {brief(facts)}")
        scale = facts.get("default_guidance_scale")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"default_guidance_scale must be a number, got {brief(scale)}")
        if facts.get("pictures") not in PICTURE_USES:
            raise ValueError(f"pictures must be one of {', '.join(PICTURE_USES)}, got {brief(facts.get('pictures'))}")
        return cls(
            model=_name("model", facts.get("model")),
            samplers=_names("samplers", facts.get("samplers")),
            default_sampler=_name("default_sampler", facts.get("default_sampler")),
            default_guidance_scale=float(scale),
            follows_guidance_scale=facts.get("follows_guidance_scale") is True,
            takes_negative_prompt=facts.get("takes_negative_prompt") is True,
            loras=_names("loras", facts.get("loras")),
            controlnets=_names("controlnets", facts.get("controlnets")),
            pictures=facts["pictures"],
            has_previews=facts.get("has_previews") is True,
        )


def _name(field: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_NAME_CHARACTERS:
        raise ValueError(f"{field} must be a string of at most {_MAX_NAME_CHARACTERS} characters, got {brief(value)}")
    return value


def _names(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        raise ValueError(f"{field} must be a list of at most {MAX_NAMES} names, got {brief(value)}")
    return tuple(_name(f"a name in {field}", each) for each in value)
