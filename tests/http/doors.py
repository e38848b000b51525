"""How the tests of this room start a door, and what they ask it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from sdtpu_worker.http.keys import hash_key
from sdtpu_worker.testing.processes import running, wait_for_line, worker_env
from tests.support.paths import ROOT

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
def start_door(redis_url: str, folder: Path, **settings: str) -> Iterator[DoorProcess]:
    """Run a door on a free port of loopback."""
    log = folder / "door.log"
    command = [sys.executable, "-c", RUN_SDTPU, "serve", "--address", "127.0.0.1:0"]
    with running(command, log, env=worker_env(redis_url, **settings), cwd=ROOT) as process:
        line = wait_for_line(process, log, "door: http://", 60)
        wait_for_line(process, log, "Application startup complete", 30)
        found = re.search(r"door: (http://\S+),", line)
        assert found is not None, line
        yield DoorProcess(found[1], process, log)


def keys(**names: str) -> str:
    """Return `sdtpu_http_keys` for callers whose key is `sk-NAME`, each with what follows the hash."""
    return ",".join(f"{name}:{hash_key(f'sk-{name}')}{rest}" for name, rest in names.items())
