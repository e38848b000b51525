"""The tables of docs/reference/model-configs.md, from the tables that the code reads; `hooks.py` puts them in."""

from __future__ import annotations

from collections.abc import Sequence

from sdtpu_worker.models import config_tables
from sdtpu_worker.models.config_rules import Rules

TABLES: dict[str, Rules] = {
    "unet": config_tables.UNET,
    "controlnet": config_tables.CONTROLNET,
    "vae": config_tables.AUTOENCODER,
    "text_encoder": config_tables.CLIP_TEXT,
    "safety_checker": config_tables.SAFETY_CHECKER,
}


def honoured() -> str:
    """Return a section for every part: each key that is followed, and the values that are; others are refused."""
    return "\n\n".join(f"### {part}\n\n{_honoured(rules)}" for part, rules in TABLES.items())


def without_meaning() -> str:
    """Return the table of keys that may have any value, with the reason."""
    rows = {
        (f"`{key}`", part, rule.text)
        for part, rules in TABLES.items()
        for key, rule in rules.items()
        if rule.kind == "irrelevant"
    }
    by_key: dict[tuple[str, str], list[str]] = {}
    for key, part, text in sorted(rows):
        by_key.setdefault((key, text), []).append(part)
    return _table(("key", "of", "why"), [(key, ", ".join(parts), text) for (key, text), parts in by_key.items()])


def _honoured(rules: Rules) -> str:
    followed = [(f"`{key}`", rule.text) for key, rule in sorted(rules.items()) if rule.kind != "irrelevant"]
    return _table(("key", "honoured; any other value is refused"), followed)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    escaped = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *escaped))
