"""How the tests of this room start a door, and what they ask it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sdtpu_worker.http.keys import hash_key
from sdtpu_worker.testing.processes import running, wait_for_line, worker_env
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

RUN_SDTPU = "from sdtpu_worker.cli import sdtpu; sdtpu()"


@dataclass(frozen=True)
class DoorProcess:
    """A door that runs.

    Attributes:
        url: its address.
        process: its process.
        log: its log.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, key: str = "") -> httpx.Client:
        """Return a client of the door."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)


@contextlib.contextmanager
def start_door(
    redis_url: str, folder: Path, app: str = "", address: str = "127.0.0.1:0", **settings: str
) -> Iterator[DoorProcess]:
    """Run a door of the ready-made app or of another one, on a free port of loopback where the address has none."""
    log = folder / "door.log"
    command = [sys.executable, "-c", RUN_SDTPU, "serve", *(["-A", app] if app else []), "--address", address]
    with running(command, log, env=worker_env(redis_url, **settings), cwd=ROOT) as process:
        line = wait_for_line(process, log, "door: http://", 120)
        wait_for_line(process, log, "Application startup complete", 60)
        found = re.search(r"door: (http://\S+),", line)
        assert found is not None, line
        yield DoorProcess(found[1], process, log)


def keys(**names: str) -> str:
    """Return `sdtpu_http_keys` for callers whose key is `sk-NAME`, each with what follows the hash."""
    return ",".join(f"{name}:{hash_key(f'sk-{name}')}{rest}" for name, rest in names.items())


@dataclass(frozen=True)
class Event:
    """A server-sent event."""

    name: str
    id: str | None
    data: Any


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of a stream, without its comments."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        elif fields:
            yield Event(fields["event"], fields.get("id"), json.loads(fields["data"]))
            fields = {}


def wait_for_end(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Wait until a job has ended; return it."""

    def ended() -> dict[str, Any] | None:
        job = client.get(f"/v1/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until(ended, f"job {job_id} to end") or {}
