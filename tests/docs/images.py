"""Builds and runs the images of docker/Dockerfile without a container engine: each stage's steps, in a root of its own.

An image is a folder with what its steps may write: `/etc`, `/home`, `/srv`, `/var/cache` and a virtual environment at
`/venv`. Everything else of its root is this machine's, read-only, put together by bubblewrap. The Python is the one
that runs the tests, with its packages: so `pip install` finds what it needs there, downloads nothing, and builds and
installs this project from what the build context lets through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import re
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from sdtpu_worker.testing.processes import running
from tests.support.paths import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
_WRITTEN_BY_STEPS = ("etc", "home", "srv", "var/cache", "venv")
_ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "shadow": "root:*:20000:0:99999:7:::\n",
    "gshadow": "root:*::\n",
}
_ETC = ("login.defs", "default", "skel", "nsswitch.conf", "hosts", "localtime")


def find_bubblewrap() -> str:
    """Return the path of bwrap; where there is none, or the machine does not let it work, the test is skipped."""
    found = shutil.which("bwrap")
    if not found:
        pytest.skip("no bwrap on the PATH: Debian's package bubblewrap brings it")
    if os.geteuid() != 0:
        pytest.skip("building needs root")
    command = [found, "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    tried = subprocess.run(command, capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"this machine does not let bwrap work: {tried.stderr.decode(errors='replace').strip()}")
    return found


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """Return each stage's instructions as (name, arguments), those of the stages it builds on first."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", "")
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            base, _, stage = arguments.split()
            stages[stage] = list(stages.get(base, []))
        stages[stage].append((name, arguments))
    return stages


def copy_context(target: Path) -> None:
    """Copy what `Dockerfile.dockerignore` lets through of the repository."""
    lines = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    ignored = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    target.mkdir()
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=lambda _, names: [
                each for each in names if any(fnmatch.fnmatch(each, pattern) for pattern in ignored)
            ])  # fmt: skip
        else:
            shutil.copy(source, target / name)


@dataclass
class Image:
    """An image of one stage, built in a folder.

    Attributes:
        folder: what its steps have written, by its path in the image.
        context: the build context.
        env: what ENV has set.
        user: user and group of its process, as USER has them.
        workdir, command, healthcheck, stop_signal, volume: likewise.
    """

    folder: Path
    context: Path
    env: dict[str, str] = field(default_factory=dict)
    user: tuple[int, int] = (0, 0)
    workdir: str = "/"
    command: Sequence[str] = ()
    healthcheck: Sequence[str] = ()
    stop_signal: str = ""
    volume: str = ""

    def build(self, stage: str, base: str = "") -> Image:
        """Do every step of a stage, and return the image.

        Args:
            stage: its name.
            base: the stage that this image is already, whose steps are not done again.

        Raises:
            AssertionError: a step has failed; the text has its output.
        """
        steps = read_stages()[stage]
        if base:
            done_already = len(read_stages()[base])
            assert steps[:done_already] == read_stages()[base]
            steps = steps[done_already:]
        else:
            self._make_root()
        for name, arguments in steps:
            match name:
                case "FROM":
                    pass
                case "RUN":
                    command = re.sub(r"--mount=\S+\s+", "", arguments)
                    done = subprocess.run(
                        self.sandbox(["sh", "-c", command], is_build=True),
                        capture_output=True, text=True, timeout=300, check=False,
                    )  # fmt: skip
                    assert done.returncode == 0, f"RUN {command}\n{done.stdout}{done.stderr}"
                case "ENV":
                    self.env |= dict(pair.split("=", 1) for pair in arguments.split())
                case "USER":
                    uid, _, gid = arguments.partition(":")
                    self.user = (int(uid), int(gid))
                case "WORKDIR":
                    self.workdir = arguments
                    (self.folder / arguments.lstrip("/")).mkdir(exist_ok=True)
                case "CMD":
                    self.command = yaml.safe_load(arguments)
                case "HEALTHCHECK":
                    self.healthcheck = yaml.safe_load(arguments.partition("CMD")[2])
                case "STOPSIGNAL":
                    self.stop_signal = arguments
                case "VOLUME":
                    self.volume = arguments
                case _:
                    raise AssertionError(f"the tests know no {name}: teach {__name__} what it does")
        return self

    def copy(self, folder: Path) -> Image:
        """Return the same image in another folder, to build on."""
        subprocess.run(["cp", "-a", str(self.folder), str(folder)], check=True)
        return dataclasses.replace(self, folder=folder, env=dict(self.env))

    def sandbox(
        self, command: Sequence[str], is_build: bool = False, env: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return the command line that runs a command in the image.

        A step of the build may write to the image and sees the context. A container has a read-only root, no
        capability and no way to new privileges, as docker/compose.yaml says; it writes to `/tmp` and its volume only.
        """
        shared = [sys.base_prefix, *self._packages(), str(Path(sys.base_prefix).resolve())]
        line = [find_bubblewrap(), "--die-with-parent", "--clearenv", "--proc", "/proc", "--dev", "/dev"]
        line += ["--perms", "1777", "--tmpfs", "/tmp", "--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if (link := Path("/", name)).is_symlink():
                line += ["--symlink", os.readlink(link), str(link)]
            elif link.is_dir():
                line += ["--ro-bind", str(link), str(link)]
        for path in dict.fromkeys(shared):
            for parent in reversed(Path(path).parents[:-1]):  # which bubblewrap would make for root alone
                line += ["--perms", "0755", "--dir", str(parent)]
            line += ["--ro-bind", path, path]
        line += ["--perms", "0755", "--dir", "/var"]
        for name in _WRITTEN_BY_STEPS:
            line += ["--bind" if is_build else "--ro-bind", str(self.folder / name), f"/{name}"]
        if is_build:
            line += ["--bind", str(self.context), "/context", "--cap-add", "ALL"]
        elif self.volume:
            line += ["--bind", str(self.folder / self.volume.lstrip("/")), self.volume]
        line += ["--remount-ro", "/", "--chdir", self.workdir]
        own = {"PATH": "/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/home/sdtpu", **self.env}
        if is_build:  # the packages of the tests stand in for the index
            own |= {"PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1", "PIP_NO_COMPILE": "1", "HOME": "/tmp"}
        for name, value in {**own, **(env or {})}.items():
            line += ["--setenv", name, value]
        if not is_build:
            uid, gid = self.user
            line += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
                     "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs",
                     "--inh-caps=-all", "--bounding-set=-all"]  # fmt: skip
        return [*line, *command]

    @contextlib.contextmanager
    def running(
        self, log: Path, env: Mapping[str, str], command: Sequence[str] = ()
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a container of the image."""
        with running(self.sandbox(command or self.command, env=env), log) as process:
            yield process

    @staticmethod
    def stop(process: subprocess.Popen[bytes], timeout_s: float) -> int:
        """Send a container's process SIGTERM, as Docker does; return its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        return process.wait(timeout_s)

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in a container of the image to its end."""
        line = self.sandbox(command, env=env)
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    def _packages(self) -> list[str]:
        """Return the folders of the tests' packages; Debian's Python also names some that are not there."""
        named = [*site.getsitepackages(), *(path for path in sys.path if Path(path).name == "site-packages")]
        return [path for path in dict.fromkeys(named) if Path(path).is_dir()]

    def _make_root(self) -> None:
        """Lay out what the base image brings: accounts, and a Python with pip."""
        for name in _WRITTEN_BY_STEPS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in _ETC:
            source, target = Path("/etc", name), self.folder / "etc" / name
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copy(source, target)
        for name, text in _ACCOUNTS.items():
            (self.folder / "etc" / name).write_text(text)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder / "venv")], check=True)
        packages = self.folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        (packages / "of_the_tests.pth").write_text("".join(f"{path}\n" for path in self._packages()))
        for name in ("pip", "celery"):  # the first comes with the base image, the second with a package that is there
            script = self.folder / "venv" / "bin" / name
            script.write_text(f'#!/bin/sh\nexec /venv/bin/python -m {name} "$@"\n')
            script.chmod(0o755)
