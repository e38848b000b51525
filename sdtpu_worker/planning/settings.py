"""What a plan is for: the worker's own settings, from the environment and the app, and options that go before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.config import read_setting, source_of
from sdtpu_worker.config_values import parse_integer, parse_named
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning.compile_ahead import Wanted
from sdtpu_worker.planning.estimates import SLOT_COUNTS

USUAL = "usual"
_DEFAULT_SLOTS = (4,)
_MOST_CONTROLNETS = 8


@dataclass(frozen=True)
class Planned:
    """What to plan.

    Attributes:
        wanted: what to compile, with the first of the slot counts.
        slots: the slot counts to compile.
        sources: who said it, by field of `wanted`: an option, a variable, the app's configuration, or `default`.
        other_resolutions: those of `sdtpu_resolutions` that are not planned.
    """

    wanted: Wanted
    slots: tuple[int, ...]
    sources: Mapping[str, str]
    other_resolutions: tuple[tuple[int, int], ...] = ()


def read_planned(options: Mapping[str, Any], conf: Mapping[str, Any]) -> Planned:
    """Return what to plan.

    Args:
        options: by field of `Wanted` besides `slots`, what the command line says; None where it says nothing. `slots`
            has the slot counts.
        conf: a Celery app's configuration; the environment goes before it.

    Raises:
        ConfigurationError: a setting or an option is wrong, or nobody says which model.
    """
    found, sources, others = dict[str, Any](), dict[str, str](), ()
    for name, setting, convert in _FIELDS:
        if options.get(name) is not None:
            no = "no-" if options[name] is False else ""
            found[name], sources[name] = options[name], f"--{no}{name.replace('_', '-')}"
            continue
        found[name] = convert(read_setting(setting, conf))
        sources[name] = source_of(setting, conf)[1] or "default"
    if options.get("lora_rank") is None:
        sources["lora_rank"] = source_of("sdtpu_loras", conf)[1] or "default"
        found["lora_rank"] *= read_setting("sdtpu_loras", conf) is not None
    if sources["model"] == "default" or not found["model"].strip():
        raise ConfigurationError(
            "--model must name a model, as in --model sd15, or sdtpu_model must be set in the environment or in the app"
            " that --app names"
        )
    if options.get("resolution") is None and found["resolution"]:
        sizes = sorted(found["resolution"], key=lambda size: size[0] * size[1], reverse=True)
        found["resolution"], others = sizes[0], tuple(sizes[1:])
    slots = options.get("slots")
    if slots is None:
        set_slots = source_of("sdtpu_slots_per_device", conf)[1]
        in_settings = read_setting("sdtpu_slots_per_device", conf)
        slots = _DEFAULT_SLOTS if not set_slots else SLOT_COUNTS if in_settings == "auto" else (in_settings,)
        sources["slots_per_device"] = set_slots or "default"
    else:
        sources["slots_per_device"] = "--slots-per-device"
    wanted = Wanted(topology=options["topology"], slots=slots[0], **found)
    return Planned(wanted, tuple(slots), sources, others)


def parse_controlnets(text: str) -> tuple[tuple[str, str], ...]:
    """Return names and folders of what `--controlnets` says: a number, or as `sdtpu_controlnets`.

    Raises:
        ValueError: the words for what is allowed.
    """
    if text.strip().isdigit():
        count = parse_integer(0, _MOST_CONTROLNETS)(text)
        return tuple((f"{USUAL} {number}", "") for number in range(1, count + 1))
    return _controlnets(parse_named(text))


def _controlnets(sources: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return names and folders, of a hub name an empty text: plans read nothing from a hub.

    Raises:
        ConfigurationError: a folder is not there.
    """
    found = []
    for name, source in sorted(sources.items()):
        is_folder = Path(source).expanduser().is_dir()
        if not is_folder and (source.startswith(("/", ".", "~")) or source.count("/") != 1):
            raise ConfigurationError(
                f"sdtpu_controlnets (--controlnets): {name} must be a folder with a ControlNet's config.json that is on"
                f" this machine, or a hub name like 'owner/name', got {source!r}"
            )
        found.append((name, source if is_folder else ""))
    return tuple(found)


def _dtype(name: str) -> str:
    return "bfloat16" if name == "auto" else name


def _as_it_is(value: Any) -> Any:
    return value


_FIELDS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("model", "sdtpu_model", _as_it_is),
    ("resolution", "sdtpu_resolutions", _as_it_is),
    ("guidance", "sdtpu_guidance", _as_it_is),
    ("lora_rank", "sdtpu_lora_rank", _as_it_is),
    ("image_inputs", "sdtpu_image_inputs", _as_it_is),
    ("prompt_windows", "sdtpu_prompt_windows", _as_it_is),
    ("controlnets", "sdtpu_controlnets", _controlnets),
    ("previews", "sdtpu_preview_every", bool),
    ("attention", "sdtpu_attention", _as_it_is),
    ("vae_tiling", "sdtpu_vae_tiling", _as_it_is),
    ("dtype", "sdtpu_dtype", _dtype),
)
"""By field of `Wanted`, the setting, and what makes its value of the setting's."""
