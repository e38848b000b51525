"""What contributors run, CI runs and the documentation says is one and the same."""

from __future__ import annotations

import re
import subprocess
import tomllib
from itertools import pairwise

import yaml

from tests.support.paths import ROOT

KINDS_OF_CHANGE = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "check", *arguments], capture_output=True, text=True, timeout=120)


def names_of_checks() -> list[str]:
    return check("--list").stdout.split()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_ci_runs_the_test_command_of_the_readme_word_for_word():
    (command,) = re.findall(r'^TEST_COMMAND="(.+)"$', read(".ci/run"), flags=re.MULTILINE)
    assert command in read("README.md").splitlines()


def test_an_unknown_check_is_refused_with_the_names_of_all_checks():
    run = check("lint", "tpyes")
    assert run.returncode == 2
    assert run.stderr == f"scripts/check: NAME must be one of {' '.join(names_of_checks())}, got tpyes\n"
    assert run.stdout == ""


def test_the_hooks_run_checks_of_ci_and_download_nothing():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"] for hook in hooks} <= {f"scripts/check {name}" for name in names_of_checks()}


def test_the_oldest_python_that_is_required_is_one_that_the_classifiers_name():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    named = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    assert project["requires-python"] == f">={named[0]}"
    assert [int(version.removeprefix("3.")) for version in named] == list(range(11, 11 + len(named)))


def test_the_changelog_has_each_kind_of_change_once_in_a_version_and_no_entry_twice():
    versions = re.split(r"^## \[", read("CHANGELOG.md"), flags=re.MULTILINE)[1:]
    assert versions[0].startswith("Unreleased]\n")
    for version in versions:
        kinds = [KINDS_OF_CHANGE.index(kind) for kind in re.findall(r"^### (.+)$", version, flags=re.MULTILINE)]
        assert kinds
        assert all(before < after for before, after in pairwise(kinds))
        entries = re.findall(r"^- (.+?)(?=\n-|\n\n|\Z)", version, flags=re.MULTILINE | re.DOTALL)
        assert len(entries) == len(set(entries))
