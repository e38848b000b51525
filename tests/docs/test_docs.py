"""The pages at work: what the tutorials show is served and visited, Python blocks are run, beside a real worker."""

from __future__ import annotations

import http.cookiejar
import io
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtpu_worker.testing.processes import free_port, running
from tests.docs.conftest import Stage
from tests.docs.pages import Block, all_blocks
from tests.support.paths import ROOT

SERVERS: dict[str, Callable[[int], list[str]]] = {
    "flask": lambda port: ["-m", "flask", "--app", "app", "run", "--port", str(port)],
    "django": lambda port: ["manage.py", "runserver", "--noreload", str(port)],
}
COMMANDS = {
    "flask": ["celery -A app.celery_app worker --queues sdtpu", "flask --app app run"],
    "django": [
        "django-admin startproject website .",
        "celery -A website worker --queues sdtpu",
        "python manage.py runserver",
    ],
}

RUN_BLOCKS = """
import json, sys

names = {"__name__": "shop"}
for block in json.load(sys.stdin):
    exec(compile("\\n" * (block["line"] - 1) + block["text"], block["page"], "exec"), names)
"""

pytestmark = pytest.mark.timeout(240)
each_framework = pytest.mark.parametrize("framework", list(SERVERS))


def runnable_blocks() -> dict[str, list[Block]]:
    """Return the Python blocks of each page that are run, in order; the tutorials' files are served instead."""
    pages: dict[str, list[Block]] = {}
    for block in all_blocks("python"):
        if block.not_run is None and not block.page.startswith("docs/tutorial/"):
            pages.setdefault(block.page, []).append(block)
    return pages


class Visitor:
    """A browser without scripts: keeps cookies, and sends a form as the page's script does."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), jar)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask for a page; return its status and body."""
        return self._open(self._root + path)

    def send_form(self, prompt: str) -> tuple[int, bytes]:
        """Open the front page, fill its form in and send it."""
        _, page = self.get("/")
        action = re.search(r'<form action="([^"]+)"', page.decode())
        assert action is not None, page
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]+)"', page.decode()))
        return self._open(self._root + action[1], urllib.parse.urlencode({**hidden, "prompt": prompt}).encode())

    def _open(self, url: str, body: bytes | None = None) -> tuple[int, bytes]:
        try:
            with self._opener.open(url, body, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read()


@contextmanager
def served(framework: str, stage: Stage, log: Path) -> Iterator[Visitor]:
    """Run the tutorial's web server."""
    port = free_port()
    command = [sys.executable, *SERVERS[framework](port)]
    with running(command, log, env=stage.env, cwd=stage.folders[framework]) as process:
        visitor = Visitor(port)
        deadline = time.monotonic() + 60
        while True:
            try:
                visitor.get("/")
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield visitor


def wait_until_done(visitor: Visitor, task_id: str) -> dict[str, Any]:
    """Ask for the state as the page's script does, until the job has ended."""
    deadline = time.monotonic() + 60
    while True:
        status, body = visitor.get(f"/images/{task_id}")
        assert status == 200, body
        state = json.loads(body)
        if state["state"] in ("SUCCESS", "FAILURE"):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.1)


@each_framework
def test_a_visitor_gets_an_image_on_the_page(framework: str, stage: Stage, tmp_path: Path) -> None:
    with served(framework, stage, tmp_path / "server.log") as visitor:
        status, body = visitor.send_form("a red circle on a blue background")
        assert status == 202, body
        task_id = json.loads(body)["task_id"]
        assert wait_until_done(visitor, task_id) == {"state": "SUCCESS"}
        status, png = visitor.get(f"/images/{task_id}/image")
        assert status == 200
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert png.startswith(b"\x89PNG")
        red, _, blue = image.resize((1, 1), box=(0, 0, 4, 4)).tobytes()  # a corner: the background
        assert blue > 150 > red

        status, body = visitor.send_form(" ")
        assert status == 400
        assert "prompt must not be empty" in json.loads(body)["error"]


@each_framework
def test_the_page_has_the_commands_that_this_test_runs(framework: str) -> None:
    text = (ROOT / "docs" / "tutorial" / f"{framework}.md").read_text()
    assert [command for command in COMMANDS[framework] if command not in text] == []


@pytest.mark.parametrize("page", list(runnable_blocks()))
def test_the_python_blocks_of_a_page_run(page: str, stage: Stage, tmp_path: Path) -> None:
    """In the order of the page, with what earlier blocks defined, in a process of their own."""
    blocks = [{"page": block.page, "line": block.line, "text": block.text} for block in runnable_blocks()[page]]
    env = stage.env
    if any("memory://" in block.text for block in runnable_blocks()[page]):  # these variables win over what a page says
        env = {name: value for name, value in env.items() if not name.startswith("CELERY_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN_BLOCKS], input=json.dumps(blocks), env=env, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
