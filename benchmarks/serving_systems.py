"""The systems that `serving.py` compares: how each is started, fed and read, on a Redis of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import redis
from celery import Celery

import sdtpu_worker
from benchmarks.serving_load import MIXES, Arrival, Message
from sdtpu_worker.testing.processes import StartFailed, private_redis, running, worker_env

DEVICES = 8
INSERT_STEPS, DECODE_STEPS = 0.1, 1.6
"""What an insert and a decode cost on devices of constant speed: as in Stable Diffusion 1.x at 512 x 512."""
START_TIMEOUT_S = 300.0
ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
CHECKPOINT = Path(sdtpu_worker.__file__).parent / "checkpoint"
SAME_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "pillow", "redis")
"""What the peers' environment has in the versions of this one."""

_HELD = "benchmarks.serving_constant_speed"

TaskCall = Callable[[Arrival], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        app: for `celery -A`.
        held_app: the same on devices of constant speed, where that is another one.
        options: further options of `celery worker`.
        call: the task's name and keyword arguments for a job.
        is_peer: it runs in the peers' virtual environment and reports its batches in its results; ours reports
            through `inspect stats`.
        mixes: those in which it differs from the others.
        limit_share: of the jobs that the others get all at once.
    """

    name: str
    label: str
    app: str
    queue: str
    call: TaskCall
    held_app: str = ""
    options: tuple[str, ...] = ()
    is_peer: bool = False
    mixes: tuple[str, ...] = tuple(MIXES)
    limit_share: float = 1.0

    def message(self, arrival: Arrival) -> Message:
        """Return what is sent for a job."""
        name, kwargs = self.call(arrival)
        return Message(arrival.at_s, arrival.task_id, name, kwargs)


def _call_ours(arrival: Arrival) -> tuple[str, dict[str, Any]]:
    return "sdtpu.generate", {**_call_plain(arrival)[1], "sampler": "ddim", "guidance_scale": 7.5}


def _call_batches(arrival: Arrival) -> tuple[str, dict[str, Any]]:
    return f"peers.generate_{arrival.num_inference_steps}", {"prompt": arrival.prompt, "seed": arrival.seed}


def _call_plain(arrival: Arrival) -> tuple[str, dict[str, Any]]:
    return "peers.generate", {
        "prompt": arrival.prompt,
        "seed": arrival.seed,
        "num_inference_steps": arrival.num_inference_steps,
    }


SYSTEMS = {
    system.name: system
    for system in (
        System("ours", "sdtpu_worker", "sdtpu_worker.app", "sdtpu", _call_ours, f"{_HELD}:ours"),
        System(
            "fixed-bucketed", "fixed batches, bucketed", "benchmarks.fixed_batches:bucketed", "sdtpu", _call_ours,
            f"{_HELD}:bucketed",
        ),
        System(
            "fixed-mixed", "fixed batches, mixed", "benchmarks.fixed_batches:mixed", "sdtpu", _call_ours,
            f"{_HELD}:mixed", mixes=("mixed",),
        ),
        System(
            "celery-batches", "celery-batches", "benchmarks.peers.batches", "peers", _call_batches,
            options=("--pool", "solo"), is_peer=True,
        ),
        System(
            "plain", "plain Celery task", "benchmarks.peers.plain", "peers", _call_plain,
            options=("--pool", "solo"), is_peer=True, limit_share=0.25,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Where the workers run.

    Attributes:
        logs: folder of their logs.
        compile_cache: folder of JAX's persistent compilation cache.
        peers_python: the Python of the peers' virtual environment.
        flush_interval_s: of celery-batches.
        step_s: seconds of a step on every device, whatever the others do; 0 for as fast as the CPU allows.
    """

    logs: Path
    compile_cache: Path
    peers_python: Path
    flush_interval_s: float
    step_s: float = 0.0


@dataclass
class Worker:
    """A system's worker with its private Redis, up until `stop`."""

    system: System
    environment: Environment
    redis_url: str = ""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self) -> None:
        """Start a Redis and a worker; return when it consumes, with every program compiled and run.

        Raises:
            StartFailed: it ended, or does not answer in time; the text has the end of its log.
        """
        self.redis_url = self._stack.enter_context(private_redis())
        log = self.environment.logs / f"{self.system.name}.log"
        log.unlink(missing_ok=True)
        env = worker_env(self.redis_url, **self._settings())
        process = self._stack.enter_context(running(self._command(), log, env, ROOT))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._inspect("ping", timeout_s=1.0):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise StartFailed(f"{self.system.name}: the worker does not answer; the end of {log}:\n{tail}")

    def stop(self) -> None:
        """End the worker and its Redis."""
        self._stack.close()

    def client(self) -> redis.Redis:
        """Return a connection to the worker's Redis."""
        return redis.Redis.from_url(self.redis_url)

    def loop_stats(self) -> dict[str, Any]:
        """Return the counters of our own worker's device loop; none for a peer."""
        if self.system.is_peer:
            return {}
        return self._inspect("stats", timeout_s=20.0)["pool"]["sdtpu"]["loop"]

    def _inspect(self, what: str, timeout_s: float) -> dict[str, Any]:
        with Celery(broker=self.redis_url, set_as_current=False) as app:
            reply = getattr(app.control.inspect(destination=[self._node], timeout=timeout_s), what)()
        return (reply or {}).get(self._node, {})

    @property
    def _node(self) -> str:
        return f"{self.system.name}@localhost"

    def _command(self) -> list[str]:
        system, environment = self.system, self.environment
        python = str(environment.peers_python) if system.is_peer else sys.executable
        app = system.held_app if environment.step_s and system.held_app else system.app
        return [
            python, "-m", "celery", "-A", app, "worker", "-Q", system.queue, "-n", self._node,
            "--loglevel", "WARNING", "--without-gossip", "--without-mingle", *system.options,
        ]  # fmt: skip

    def _settings(self) -> dict[str, str]:
        cache, step_s = self.environment.compile_cache, str(self.environment.step_s)
        if not self.system.is_peer:
            return {
                "SDTPU_PLATFORM": "cpu",
                "SDTPU_CPU_DEVICES": str(DEVICES),
                "SDTPU_COMPILE_CACHE": str(cache / "ours"),
                "BENCHMARK_STEP_S": step_s,
            }
        return {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "peers"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "PEERS_CHECKPOINT": str(self._flax_checkpoint()),
            "PEERS_FLUSH_INTERVAL_S": str(self.environment.flush_interval_s),
            "PEERS_STEP_S": step_s,
            "PEERS_EXTRA_STEPS": str(INSERT_STEPS + DECODE_STEPS),
        }

    def _flax_checkpoint(self) -> Path:
        """Return the folder of the shipped checkpoint as the peers read it, which is made once."""
        folder = self.environment.compile_cache / "flax-checkpoint"
        if not folder.exists():
            from benchmarks.peers.flax_checkpoint import write_flax_copy

            write_flax_copy(CHECKPOINT, folder)
        return folder


def make_peers_python(folder: Path) -> Path:
    """Make or complete the peers' virtual environment; return its Python.

    celery-batches wants an older Celery than ours, and the Flax pipeline older diffusers and transformers; JAX and the
    like come in the versions of this one.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making the peers' virtual environment in {folder} …", flush=True)
        venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in SAME_VERSIONS))
    requirements = PEERS / "requirements.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements, "-c", constraints], check=True)
    return python.absolute()
