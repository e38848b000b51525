"""Fill in what the documentation takes from elsewhere in the repository, so that the two cannot differ.

MkDocs loads this file (`hooks` in mkdocs.yml). A line `{{ setting sdtpu_model }}` of a page becomes the setting's
heading, default, name in the environment, allowed values and unit, from the table that the code reads. The lines of
`TABLES` become the tables of samplers and of configs. The files of `BORROWED` become pages and images of the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from docs import metric_tables, model_tables, sampler_tables  # noqa: E402  the package need not be installed to build the pages
from sdtpu_worker.settings_table import SETTINGS, Setting  # noqa: E402  as above

PLACEHOLDER = re.compile(r"^\{\{ setting (\w+) \}\}$", re.MULTILINE)
BORROWED = {
    "security.md": "SECURITY.md",
    "reference/shipped-checkpoint.md": "sdtpu_worker/checkpoint/README.md",
    "reference/samples.png": "sdtpu_worker/checkpoint/samples.png",
    "images/serving-constant-speed.png": "benchmarks/results/serving-constant-speed/serving.png",
}
"""Files of the site by their place in docs/, and where in the repository they are."""
TABLES = {
    "{{ sampler names }}": sampler_tables.names,
    "{{ scheduler keys without effect }}": sampler_tables.without_effect,
    "{{ scheduler options }}": sampler_tables.options,
    "{{ model keys }}": model_tables.honoured,
    "{{ model keys without meaning }}": model_tables.without_meaning,
    "{{ metrics of jobs }}": metric_tables.of_jobs,
    "{{ metrics of devices }}": metric_tables.of_devices,
    "{{ metrics of the worker }}": metric_tables.of_the_worker,
    "{{ metrics of queues }}": metric_tables.of_queues,
    "{{ outcomes }}": metric_tables.outcomes,
    "{{ reuses }}": metric_tables.reuses,
}
_UNITS = {"_s": "seconds", "_bytes": "bytes"}
_MORE_UNITS = {"sdtpu_resolutions": "pixels", "sdtpu_preview_every": "denoising steps"}


class _Nothing:
    """A value that no setting allows."""

    def __str__(self) -> str:
        return ""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the borrowed files; MkDocs calls this."""
    for place, path in BORROWED.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the placeholders of a page; MkDocs calls this."""
    return render(markdown, page.file.src_uri)


def render(markdown: str, source: str) -> str:
    """Return a page with its placeholders filled in.

    Raises:
        ValueError: a placeholder names no setting, or a page with placeholders leaves a setting out.
    """
    wanted = PLACEHOLDER.findall(markdown)
    settings = {setting.name: setting for setting in SETTINGS}
    if unknown := set(wanted) - set(settings):
        raise ValueError(
            f"{source} documents {', '.join(sorted(unknown))}, which sdtpu_worker/settings_table.py does not have"
        )
    if wanted and (missing := set(settings) - set(wanted)):
        names = ", ".join(sorted(missing))
        raise ValueError(f"{source} leaves {names} out; add a line {{{{ setting NAME }}}} for each")
    for placeholder, table in TABLES.items():
        if placeholder in markdown:
            markdown = markdown.replace(placeholder, table())
    return PLACEHOLDER.sub(lambda match: describe(settings[match[1]]), markdown)


def describe(setting: Setting) -> str:
    """Return a setting's section: heading, what it does, and a table of its facts."""
    facts = {
        "default": f"`{_written(setting.default)}`" if setting.default is not None else "not set",
        "allowed": allowed_values(setting),
        "unit": unit(setting),
        "environment": f"`{setting.name.upper()}`",
        "Django": f"`CELERY_{setting.name.upper()}`",
    }
    facts = {name: fact for name, fact in facts.items() if fact}
    table = "\n".join(f"| {' | '.join(row)} |" for row in (facts, ["---"] * len(facts), facts.values()))
    doc = setting.doc[0].upper() + setting.doc[1:]
    return f"### {setting.name}\n\n{doc}.\n\n{table}\n"


def allowed_values(setting: Setting) -> str:
    """Return what is allowed, in the words of the error that any other value gets."""
    try:
        setting.parse(_Nothing())
    except ValueError as exc:
        return str(exc)
    raise AssertionError(f"{setting.name} allows everything")


def unit(setting: Setting) -> str:
    """Return the unit that a setting's name says, or an empty text."""
    by_suffix = (unit for suffix, unit in _UNITS.items() if setting.name.endswith(suffix))
    return _MORE_UNITS.get(setting.name) or next(by_suffix, "")


def _written(value: Any) -> str:
    """Return a value as one writes it in the environment."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
