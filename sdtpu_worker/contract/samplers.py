"""The samplers' names, as jobs may write them: our own, diffusers' classes, and those of other programs.

A client checks a name without a device side, so nothing heavy is imported here. `resolve_sampler` understands a
name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

SIGMA_SPACINGS = ("karras", "exponential", "beta")
_MAX_NAME_CHARACTERS = 100

DIFFUSERS_CLASSES: Mapping[str, tuple[str, ...]] = {
    "pndm": ("PNDMScheduler",),
    "ddim": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
    "euler": ("EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler",),
    "heun": ("HeunDiscreteScheduler",),
    "lms": ("LMSDiscreteScheduler",),
    "dpm2": ("KDPM2DiscreteScheduler",),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler",),
    "dpmsolver++": ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"),
    "dpmsolver": (),
    "sde-dpmsolver++": (),
    "sde-dpmsolver": (),
    "dpmsolver++_2s": ("DPMSolverSinglestepScheduler",),
    "dpmsolver++_sde": ("DPMSolverSDEScheduler",),
    "unipc": ("UniPCMultistepScheduler",),
    "deis": ("DEISMultistepScheduler",),
    "lcm": ("LCMScheduler",),
    "tcd": ("TCDScheduler",),
}
"""The canonical names, each with the diffusers classes that it stands for. The names with no class of their own are
`algorithm_type`s of DPMSolverMultistepScheduler."""

SAMPLER_NAMES = tuple(DIFFUSERS_CLASSES)

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "pndm": ("PLMS",),
    "euler": ("Euler", "K_EULER"),
    "euler_ancestral": ("Euler a", "K_EULER_ANCESTRAL"),
    "heun": ("Heun", "K_HEUN"),
    "lms": ("LMS", "K_LMS"),
    "dpm2": ("DPM2", "KDPM2", "K_DPM_2"),
    "dpm2_ancestral": ("DPM2 a", "KDPM2 a", "K_DPM_2_ANCESTRAL"),
    "dpmsolver++": ("DPM++ 2M", "DPMSolverMultistep"),
    "sde-dpmsolver++": ("DPM++ 2M SDE",),
    "dpmsolver++_2s": ("DPM++ 2S", "DPMSolverSinglestep"),
    "dpmsolver++_sde": ("DPM++ SDE",),
    "ddim": ("DDIM",),
    "ddpm": ("DDPM",),
    "unipc": ("UniPC",),
    "deis": ("DEIS",),
    "lcm": ("LCM",),
    "tcd": ("TCD",),
}
"""What A1111's web UI and hosted services call the samplers; ` Karras`, ` Exponential` or ` Beta` may follow."""


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Return the sampler that a name means, and the spacing of sigmas where the name says one.

    Upper and lower case, spaces, hyphens and underscores make no difference: `DPM++ 2M Karras`, `dpm++_2m_karras` and
    `dpmsolver++ karras` are `("dpmsolver++", "karras")`.

    Args:
        name: a canonical name (`SAMPLER_NAMES`), a diffusers class or another program's name.

    Returns:
        The canonical name, and `karras`, `exponential`, `beta` or None.

    Raises:
        InvalidRequest: no sampler has the name; the text lists the samplers and the nearest name.
    """
    if not isinstance(name, str) or len(name) > _MAX_NAME_CHARACTERS:
        raise InvalidRequest(f"sampler must be one of {', '.join(SAMPLER_NAMES)}, got {brief(name)}")
    folded = _fold(name)
    if folded in _MEANING:
        return _MEANING[folded], None
    for spacing in SIGMA_SPACINGS:
        stem = folded.removesuffix(spacing)
        if stem != folded and stem in _MEANING:
            return _MEANING[stem], spacing
    raise InvalidRequest(f"sampler must be one of {', '.join(SAMPLER_NAMES)}, got {brief(name)}{_nearest(folded)}")


def _nearest(folded: str) -> str:
    spaced = {f"{stem}{spacing}": f"{name} {spacing}" for stem, name in _MEANING.items() for spacing in SIGMA_SPACINGS}
    known = {**_MEANING, **spaced}
    near = difflib.get_close_matches(folded, known, n=1, cutoff=0.6)
    return f"; did you mean {known[near[0]]}?" if near else ""


def _fold(name: str) -> str:
    return name.casefold().translate({ord(character): None for character in " -_"})


def _all_meanings() -> dict[str, str]:
    meaning = {_fold(sampler): sampler for sampler in SAMPLER_NAMES}
    for names in (DIFFUSERS_CLASSES, OTHER_NAMES):
        for sampler, others in names.items():
            for other in others:
                if meaning.setdefault(_fold(other), sampler) != sampler:
                    raise AssertionError(f"{other} means both {meaning[_fold(other)]} and {sampler}")
    return meaning


_MEANING = _all_meanings()
