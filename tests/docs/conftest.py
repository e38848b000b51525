"""Private processes for the pages: one Redis, and one worker with the shipped checkpoint, for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from sdtpu_worker.testing.processes import private_redis, running, wait_for_line, worker_env
from tests.docs.pages import write_files
from tests.http.doors import start_door
from tests.support.paths import ROOT, XLA_CACHE


@dataclass(frozen=True)
class Stage:
    """What a reader of the pages has around them: a Redis, a worker that is ready, the tutorials' folders.

    Attributes:
        env: an environment in which any Celery app uses this Redis, and OpenAI's client the door.
        folders: the tutorials' files, by the name of the page.
    """

    env: Mapping[str, str]
    folders: Mapping[str, Path]


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Follow both tutorials up to their worker; the Django project's worker serves all pages."""
    import subprocess

    folder = tmp_path_factory.mktemp("tutorials")
    folders = {"flask": folder / "flask", "django": folder / "django"}
    for place in folders.values():
        place.mkdir()
    subprocess.run(
        [sys.executable, "-m", "django", "startproject", "website", "."], cwd=folders["django"], check=True, timeout=60
    )
    for name, place in folders.items():
        write_files(ROOT / "docs" / "tutorial" / f"{name}.md", place)
    with private_redis() as url:
        env = worker_env(url, SDTPU_PLATFORM="cpu", SDTPU_CPU_DEVICES="2", SDTPU_COMPILE_CACHE=XLA_CACHE)
        migrate = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
        subprocess.run(migrate, cwd=folders["django"], env=env, check=True, timeout=60)
        log = folder / "worker.log"
        command = [sys.executable, "-m", "celery", "-A", "website", "worker", "--queues", "sdtpu", "--loglevel", "INFO"]
        with running(command, log, env=env, cwd=folders["django"]) as process:
            wait_for_line(process, log, " ready.", 180)
            with start_door(url, folder) as door:
                yield Stage({**env, "OPENAI_BASE_URL": f"{door.url}/v1", "OPENAI_API_KEY": "none"}, folders)
