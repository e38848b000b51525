"""The tutorial on tests: its files lie beside those of the other tutorials, and its tests pass without a Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdtpu_worker.testing.processes import free_port
from tests.docs.pages import read_blocks, write_files
from tests.support.paths import ROOT

TUTORIALS = ROOT / "docs" / "tutorial"
FILES = {
    "flask": {"conftest.py", "test_app.py", "test_generate.py", "test_chain.py"},
    "django": {"conftest.py", "pytest.ini", "website/test_views.py", "website/tests.py", "test_chain.py"},
}
COMMANDS = {
    "flask": ["-m", "pytest", "-q", "-p", "no:django"],
    "django": ["-m", "pytest", "-q"],
    "unittest": ["manage.py", "test"],
}


def lay_out(framework: str, folder: Path) -> None:
    """Do what a reader of a framework's tutorial and then of this one has done."""
    if framework == "django":
        command = [sys.executable, "-m", "django", "startproject", "website", "."]
        subprocess.run(command, cwd=folder, check=True, timeout=60)
    write_files(TUTORIALS / f"{framework}.md", folder)
    for block in read_blocks(TUTORIALS / "testing.md"):
        name, _, at_the_end = (block.title or "").partition(" (")
        if name in FILES[framework]:
            file = folder / name
            file.write_text((file.read_text() if at_the_end else "") + block.text)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("framework", "command", "count"), [("flask", "flask", 8), ("django", "django", 6),
                                                             ("django", "unittest", 1)])  # fmt: skip
def test_the_tests_of_the_tutorial_pass_without_redis_and_load_no_jax(framework, command, count, tmp_path):
    lay_out(framework, tmp_path)
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CELERY_BROKER_URL": nobody, "CELERY_RESULT_BACKEND": nobody}
    env.pop("DJANGO_SETTINGS_MODULE", None)
    (tmp_path / "jax.py").write_text("raise RuntimeError('a test has imported JAX')\n")
    done = subprocess.run([sys.executable, *COMMANDS[command]], cwd=tmp_path, env=env, capture_output=True,
                          text=True, timeout=100, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.search(r"(\d+) passed|Ran (\d+) test", done.stdout + done.stderr)
    assert ran is not None
    assert int(ran[1] or ran[2]) == count


def test_every_file_of_the_tutorial_is_used():
    titles = {block.title.partition(" (")[0] for block in read_blocks(TUTORIALS / "testing.md") if block.title}
    assert titles == FILES["flask"] | FILES["django"]
