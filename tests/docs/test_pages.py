"""What the pages say of the code: commands, settings, names, files, keys, threads and errors exist."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import griffe
import pytest
import yaml
from celery.app.defaults import NAMESPACES, flatten

from sdtpu_worker.operations.metric_table import METRICS, OUTCOMES
from sdtpu_worker.settings_table import SETTINGS
from tests.docs.commands import (
    OTHER_VARIABLES,
    NoSuchCommand,
    check_command,
    check_variable,
    commands_in,
    split_commands,
)
from tests.docs.pages import PAGES, Block, all_blocks, prose, read_blocks
from tests.support.paths import ROOT

PACKAGE = ROOT / "sdtpu_worker"
SHELL = ("bash", "console")
LANGUAGES = {"python", "json", "ini", "toml", "yaml", "html", "text", "dockerfile", *SHELL}
MOST_NOT_RUN = 3
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
CELERY_SETTINGS = {name for name, _ in flatten(NAMESPACES)}
# The package; a header of the task's messages; template tags.
OTHER_WORDS = {"sdtpu_worker", "sdtpu_sent_at", "sdtpu_media", "sdtpu_card"}

pytestmark = pytest.mark.timeout(60)
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def inline_code(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


@functools.cache
def read_package() -> griffe.Object | griffe.Alias:
    return griffe.load("sdtpu_worker", search_paths=[str(ROOT)])


def is_in_package(name: str) -> bool:
    """Whether a module, class or attribute exists, without importing it."""
    try:
        return read_package()[name] is not None
    except KeyError:
        return False


def source_text() -> str:
    return "\n".join(path.read_text() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".lua"))


TWO_COMMANDS = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[demo]' && .venv/bin/sdtpu demo",
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest",
)


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert (
        tuple(block.text.strip() for block in read_blocks(ROOT / "README.md") if "venv" in block.text) == TWO_COMMANDS
    )


# Blocks


def test_every_block_says_its_language() -> None:
    assert [str(block) for block in all_blocks() if block.language not in LANGUAGES] == []


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    not_run = {str(block): block.not_run for block in all_blocks() if block.not_run is not None}
    assert len(not_run) <= MOST_NOT_RUN, not_run
    assert [place for place, reason in not_run.items() if len(reason or "") < 10] == []


@pytest.mark.parametrize("block", all_blocks(*SHELL), ids=str)
def test_commands_and_their_options_exist(block: Block) -> None:
    for words in commands_in(block):
        check_command(words)


@every_page
def test_commands_in_the_text_exist(path: Path) -> None:
    for text in inline_code(path):
        if re.match(r"(sdtpu|celery|mkdocs|python) [^=]", text) and not text.startswith("celery sdtpu"):
            for words in split_commands(text.replace("…", "x")):
                check_command(words)


def test_a_wrong_option_is_found() -> None:
    wrong = [["sdtpu", "demo", "--stops", "3"], ["celery", "-A", "x", "wroker"], ["SDTPU_TYPO=1", "sdtpu", "demo"],
             ["python", "benchmarks/no.py"], ["pip", "install", "sdtpu_worker[typo]"], ["frobnicate"]]  # fmt: skip
    for words in wrong:
        with pytest.raises(NoSuchCommand):
            check_command(words)


def test_the_systemd_unit_runs_a_command_that_exists_and_waits_for_the_grace_period() -> None:
    (unit,) = [block for block in all_blocks("ini") if (block.title or "").endswith(".service")]
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(unit.text)
    service = parser["Service"]
    for words in split_commands(service["ExecStart"]):
        check_command(words)
    grace_s = next(setting.default for setting in SETTINGS if setting.name == "sdtpu_grace_s")
    assert int(service["TimeoutStopSec"]) >= grace_s + 30


@pytest.mark.parametrize("block", all_blocks("json", "ini", "toml", "yaml"), ids=str)
def test_data_can_be_read(block: Block) -> None:
    match block.language:
        case "json":
            json.loads(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case "ini":
            text = block.text if block.text.startswith("[") else "[environment]\n" + block.text
            parser = configparser.ConfigParser(strict=False, interpolation=None)
            parser.optionxform = str  # type: ignore[assignment, method-assign]  # names keep their capitals
            parser.read_string(text)
            for name in parser["environment"] if parser.has_section("environment") else ():
                check_variable(name)


# Settings


@every_page
def test_every_word_that_looks_like_a_setting_is_one(path: Path) -> None:
    words = set(re.findall(r"\bsdtpu_[a-z_]*[a-z]\b", path.read_text()))
    variables = set(re.findall(r"\b(?:CELERY_)?(SDTPU_[A-Z_]*[A-Z])\b", path.read_text()))
    known = {setting.name for setting in SETTINGS}
    words = {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", word) for word in words}
    assert words - known - set(METRICS) - OTHER_WORDS == set()
    assert {name.lower() for name in variables - OTHER_VARIABLES} - known == set()


@every_page
def test_celerys_settings_exist(path: Path) -> None:
    words = {word for text in inline_code(path) for word in re.findall(r"^[a-z_]+$", text)}
    named = {word for word in words if re.match(r"(task|worker|result|broker|redis|accept)_", word)}
    assert named - CELERY_SETTINGS - {"task_id", "worker_env", "worker_command", "worker_process_init"} == set()


def test_the_settings_page_has_every_setting_with_its_facts() -> None:
    hooks = load_hooks()
    page = hooks.render((ROOT / "docs" / "reference" / "settings.md").read_text(), "settings.md")
    sections = dict(re.findall(r"^### (sdtpu_\w+)\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert list(dict.fromkeys(sections)) == list(sections)
    assert set(sections) == {setting.name for setting in SETTINGS}
    for setting in SETTINGS:
        assert f"`{setting.name.upper()}`" in sections[setting.name]
        assert hooks.allowed_values(setting) in sections[setting.name]
    assert "| `0.1` | seconds from 0.001 to 60 | seconds |" in sections["sdtpu_tick_s"]
    assert "not set" in sections["sdtpu_trace"]


def test_a_settings_page_that_leaves_one_out_or_names_another_is_refused() -> None:
    hooks = load_hooks()
    with pytest.raises(ValueError, match=r"leaves .*sdtpu_revision.* out"):
        hooks.render("{{ setting sdtpu_model }}\n", "page.md")
    with pytest.raises(ValueError, match="sdtpu_typo"):
        hooks.render("{{ setting sdtpu_typo }}\n", "page.md")


def test_the_metrics_page_has_every_figure_once_with_its_facts() -> None:
    hooks = load_hooks()
    page = hooks.render((ROOT / "docs" / "reference" / "metrics.md").read_text(), "metrics.md")
    for metric in METRICS.values():
        (row,) = re.findall(rf"^\| `{metric.name}` \|.*$", page, flags=re.MULTILINE)
        assert f"| {metric.kind.value} |" in row
        assert metric.help in row
        assert [label for label in metric.labels if f"`{label}`" not in row] == []
    assert [name for name in OUTCOMES if f"| `{name}` |" not in page] == []
    assert "{{" not in page


def test_every_command_is_documented() -> None:
    from sdtpu_worker.cli import sdtpu

    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    for name, command in sdtpu.commands.items():
        assert f"## sdtpu {name}\n" in page
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        missing = [name for option in options for name in option.opts if name not in page]
        assert missing == [], name


# Names, files, keys, threads


@every_page
def test_modules_and_names_exist(path: Path) -> None:
    named = re.findall(r"\bsdtpu_worker((?:\.[A-Za-z_]\w*)+)(?::(\w+))?", path.read_text())
    for dotted, attribute in named:
        name = f"{dotted[1:]}.{attribute}" if attribute else dotted[1:]
        assert is_in_package(name), f"sdtpu_worker.{name}"


@every_page
def test_files_exist(path: Path) -> None:
    shown = {block.title.partition(" (")[0] for block in all_blocks() if block.title}
    tops = {entry.name for entry in ROOT.iterdir() if entry.is_dir()}
    for text in inline_code(path):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", text) and text.partition("/")[0] in tops and text not in shown:
            assert (ROOT / text).exists(), text
        elif re.fullmatch(r"\w+\.(py|lua)", text) and text not in shown and text != "celeryconfig.py":
            assert [*ROOT.glob(f"*/**/{text}")], text


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "docker/README.md", "sdtpu_worker/checkpoint/README.md"])
def test_links_of_pages_outside_the_site_lead_somewhere(name: str) -> None:
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def test_the_architecture_page_has_every_key_of_redis_and_no_other() -> None:
    used = set(re.findall(r"""["'}](sdtpu:[a-z_:]*[a-z_])""", source_text())) - {"sdtpu:page_file"}  # a URL of Django's
    for key in used - {"sdtpu:unacked_mutex"}:  # kombu's name for a lock that is never taken
        assert f"`{key}" in ARCHITECTURE, key
    stems_of_others = {"sdtpu:image", "sdtpu:image:_picture", "sdtpu:load", "sdtpu:starts", "sdtpu:snap", "sdtpu:http"}
    stems_of_others.add("sdtpu:page")  # the name of a URL in Django
    for path in PAGES:
        named = {key.rstrip(":") for key in re.findall(r"\bsdtpu:[a-z_:]*[a-z_]", path.read_text())}
        stems = {key.removesuffix(":sdtpu") for key in named if "sdtpu_worker:" not in key}
        assert stems - used - stems_of_others == set(), path


def test_the_architecture_page_has_every_thread_and_no_other() -> None:
    started = set(re.findall(r"""(?:name|thread_name_prefix)=["'](sdtpu-[a-z-]+)["']""", source_text()))
    assert set(re.findall(r"`(sdtpu-[a-z-]+)`", ARCHITECTURE)) == started


def test_the_architecture_page_says_where_each_lock_is() -> None:
    section = ARCHITECTURE.partition("\n## Locks\n")[2].partition("\n## ")[0]
    holders = [path for path in PACKAGE.rglob("*.py") if re.search(r"\b(Lock|RLock|Condition)\(\)", path.read_text())]
    assert len(holders) > 5
    for path in holders:
        file, folder = path.relative_to(ROOT), path.parent.relative_to(ROOT)
        assert f"`{file}`" in section or f"`{folder}/`" in section, file


# Errors


def strings_of_the_code() -> Iterator[str]:
    """Yield every text in the package, with `…` for what is filled in."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(\.\d+)?[sdrfg]", "…", node.value)
            elif isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_texts_under_troubleshooting_are_those_of_the_code() -> None:
    texts = list(strings_of_the_code())
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [text for line in re.findall(r"^### (.*`.*)$", page, flags=re.MULTILINE)
              for text in re.findall(r"`([^`]+)`", line)]  # fmt: skip
    assert len(quoted) > 25
    parts = {part for text in quoted for part in map(str.strip, text.split("…")) if len(part) > 12}
    assert [part for part in sorted(parts) if not any(part in text for text in texts)] == []


def test_every_error_is_explained() -> None:
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("troubleshooting.md", "guarantees.md", "faq.md"))
    from sdtpu_worker import errors

    inner = {"SdtpuError", "Overloaded", "SnapshotMismatch", "EngineUnavailable", "InvalidCheckpoint"}
    public = {name for name, value in vars(errors).items() if isinstance(value, type)} - inner
    assert [name for name in sorted(public) if name not in pages] == []


# The site


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stderr
    for setting in SETTINGS:
        assert f'id="{setting.name}"' in (tmp_path / "reference" / "settings" / "index.html").read_text()
    loads = r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"' >]+"""
    assert [found for page in tmp_path.rglob("*.html") for found in re.findall(loads, page.read_text())] == []
    assert not (tmp_path / "hooks.py").exists()
