"""The tables of docs/reference/samplers.md, from the tables that the code reads; `hooks.py` puts them in."""

from __future__ import annotations

from typing import Any

from sdtpu_worker.contract.samplers import DIFFUSERS_CLASSES, OTHER_NAMES
from sdtpu_worker.diffusion.samplers.options import OPTIONS, WITHOUT_EFFECT, Option
from sdtpu_worker.diffusion.samplers.read import KNOWN_KEYS, OLD_KEYS


def names() -> str:
    """Return the table of samplers, diffusers' classes and other programs' names."""
    rows = []
    for sampler, classes in DIFFUSERS_CLASSES.items():
        of_class = ", ".join(f"`{name}`" for name in classes)
        if not classes:
            of_class = f"`DPMSolverMultistepScheduler` with `algorithm_type` `{sampler}`"
        others = ", ".join(f"`{name}`" for name in OTHER_NAMES.get(sampler, ()))
        rows.append((f"`{sampler}`", of_class, others or "–"))
    return _table(("`sampler`", "diffusers' class", "also understood"), rows)


def options() -> str:
    """Return a section for every scheduler class: each option, its default, what is served and what is refused."""
    return "\n\n".join(f"### {name}\n\n{_options(name)}" for name in OPTIONS)


def without_effect() -> str:
    """Return the table of keys that are accepted and change nothing, for any class."""
    rows = [(f"`{key}`", reason) for key, reason in sorted(WITHOUT_EFFECT.items())]
    rows += [(f"`{key}`", f"{reason}; only {_written(value)}") for key, (value, reason) in OLD_KEYS.items()]
    return _table(("key", "why"), rows)


def _options(name: str) -> str:
    rows = [
        (f"`{key}`", _written(option.default), option.allowed + _also(option), option.reason or "any other value")
        for key, option in sorted(OPTIONS[name].items())
    ]
    others = ", ".join(f"`{key}`" for key in sorted(KNOWN_KEYS - set(OPTIONS[name]) - set(WITHOUT_EFFECT)))
    unread = f"Not read, as in PyTorch: {others}." if others else ""
    return f"{_table(('key', 'default', 'honoured', 'refused'), rows)}\n\n{unread}"


def _also(option: Option) -> str:
    if not option.means:
        return ""
    target = next(iter(option.means.values()))
    return f"; {', '.join(option.means)} mean {target}, as in PyTorch"


def _written(value: Any) -> str:
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
