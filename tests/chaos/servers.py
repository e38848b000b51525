"""A real Redis for fault tests: it dies, freezes and comes back with its data. Loopback only."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis

from sdtpu_worker.testing.processes import StartFailed, find_redis_server, free_port, running
from tests.support.waiting import wait_until

Options = Mapping[str, str | list[str]]


class RedisServer:
    """A Redis that keeps its jobs in an append-only file, its port and its folder through every death.

    Args:
        options: directives of redis.conf over our own; a list for one that stands several times, like `user`.
        login: "user:password" or ":password" for `url` and `client()`; the default is that of `requirepass`.
        mode: further arguments of the program.
    """

    def __init__(self, options: Options | None = None, login: str = "", mode: tuple[str, ...] = ()) -> None:
        self.port = free_port()
        self.options: dict[str, str | list[str]] = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec",
            **(options or {}),
        }
        password = self.options.get("requirepass", "")
        self.login = login or (f":{password}" if password else "")
        self._mode = mode
        self._folder = contextlib.ExitStack()
        self._running = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._wake_up: threading.Timer | None = None

    @property
    def url(self) -> str:
        """The URL with its login."""
        return f"redis://{self.login}{'@' if self.login else ''}127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """Whether the process is there, suspended or not."""
        return self._process is not None and self._process.poll() is None

    def client(self, **options: Any) -> redis.Redis:
        """Return a client that gives up after ten seconds and does not try again; close it."""
        return redis.Redis.from_url(self.url, **{"socket_timeout": 10, "retry": None, **options})

    def __enter__(self) -> RedisServer:
        self.folder = Path(self._folder.enter_context(tempfile.TemporaryDirectory(prefix="sdtpu-chaos-")))
        lines = [f"dir {self.folder}"]
        for name, values in self.options.items():
            lines += [f"{name} {value}" for value in ([values] if isinstance(values, str) else values)]
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._folder.close()

    def start(self) -> None:
        """Start the process on its port and folder; returns when it has loaded its file and answers.

        Raises:
            StartFailed: it ended, or does not answer in time.
        """
        assert not self.is_running
        log = self.folder / "redis.log"
        command = [find_redis_server(), str(self.folder / "redis.conf"), *self._mode]
        self._process = self._running.enter_context(running(command, log))
        try:
            with contextlib.closing(self.client()) as client:
                wait_until(lambda: not self.is_running or client.ping(), "redis-server to answer")
            if not self.is_running:
                raise StartFailed(f"redis-server ended: {log.read_text()[-500:]}")
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """End it with SIGKILL; what was written in the last second may be lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.stop()

    def stop(self) -> None:
        """End it in good order, unless it has ended."""
        self.resume()
        self._running.close()
        self._process = None

    def restart(self) -> None:
        """Stop it if it runs, and start it again with what its file holds."""
        self.stop()
        self.start()

    def pause(self, seconds: float | None = None) -> None:
        """Freeze it (SIGSTOP), connections stay open; for a number of seconds from now, or until `resume()`."""
        self.resume()
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        if seconds is not None:
            self._wake_up = threading.Timer(seconds, self._process.send_signal, [signal.SIGCONT])
            self._wake_up.start()

    def resume(self) -> None:
        """Let it go on."""
        if self._wake_up is not None:
            self._wake_up.cancel()
            self._wake_up.join()
            self._wake_up = None
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
