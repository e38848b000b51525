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
        "celery -A website worker --hostname web@%h",
        "python manage.py migrate",
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
        return self._open(urllib.request.Request(path if "://" in path else self._root + path))

    def send_json(self, path: str, value: Any) -> tuple[int, bytes]:
        """Send what the page's script sends; return its status and body."""
        body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        return self._open(urllib.request.Request(self._root + path, body, headers))

    def send_form(self, prompt: str) -> tuple[int, bytes]:
        """Open the front page, fill its form in and send it; follow to the page that comes then."""
        _, page = self.get("/")
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]+)"', page.decode()))
        body = urllib.parse.urlencode({**hidden, "prompt": prompt}).encode()
        return self._open(urllib.request.Request(self._root + "/", body))

    def _open(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with self._opener.open(request, timeout=30) as answer:
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


def wait_until_done(visitor: Visitor, place: str) -> dict[str, Any]:
    """Ask for a job as the page's script does, until it has ended."""
    deadline = time.monotonic() + 60
    while True:
        status, body = visitor.get(place)
        assert status == 200, body
        job = json.loads(body)
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)


def check_is_on_blue(png: bytes) -> None:
    """Check that a picture's background, in a corner, is blue."""
    assert png.startswith(b"\x89PNG")
    image = Image.open(io.BytesIO(png)).convert("RGB")
    red, _, blue = image.resize((1, 1), box=(0, 0, 4, 4)).tobytes()
    assert blue > 150 > red


def test_a_visitor_of_the_flask_app_gets_an_image_on_the_page(stage: Stage, tmp_path: Path) -> None:
    with served("flask", stage, tmp_path / "server.log") as visitor:
        assert b'"/v1/jobs"' in visitor.get("/")[1]
        status, body = visitor.send_json("/v1/jobs", {"prompt": "a red circle on a blue background"})
        assert status == 202, body
        job = wait_until_done(visitor, json.loads(body)["links"]["self"])
        assert job["status"] == "succeeded"
        check_is_on_blue(visitor.get(job["links"]["image"])[1])
        status, body = visitor.send_json("/v1/jobs", {"prompt": " "})
        assert status == 400
        assert "prompt must not be empty" in json.loads(body)["detail"]


def test_a_visitor_of_the_django_project_gets_an_image_that_stays(stage: Stage, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "celery", "-A", "website", "worker", "--hostname", "web@%h", "--pool", "solo"]
    log = tmp_path / "worker.log"
    with (
        served("django", stage, tmp_path / "server.log") as visitor,
        running(command, log, env=stage.env, cwd=stage.folders["django"]),
    ):
        status, body = visitor.send_form("a red circle on a blue background")
        place = re.search(r'data-sdtpu-job="([^"]+)"', body.decode())
        assert status == 200
        assert place is not None, body
        job = wait_until_done(visitor, place[1])
        check_is_on_blue(visitor.get(job["links"]["image"])[1])
        deadline = time.monotonic() + 60
        while (kept := re.search(r'<img src="(/media/[^"]+)"', visitor.get("/")[1].decode())) is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        check_is_on_blue(visitor.get(kept[1])[1])
        status, body = visitor.send_form(" ")
        assert status == 400
        assert b"prompt must not be empty" in body


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
