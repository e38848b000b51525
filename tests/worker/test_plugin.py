"""What `install` does to an app and to its workers; refusals happen before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdtpu_worker.testing.processes import free_port, private_redis, worker_command, worker_env


def run_worker(tmp_path: Path, *options: str, app: str = "sdtpu_worker.app", **settings: str) -> tuple[int, str]:
    """Run a worker that is expected to give up; return its exit code and output."""
    env = worker_env(f"redis://127.0.0.1:{free_port()}/0", SDTPU_PLATFORM="cpu", SDTPU_CPU_DEVICES="1")
    env = {**env, **settings, "PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}
    done = subprocess.run(
        worker_command(app, *options), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_another_pool_on_our_queue_is_refused_with_the_remedy(tmp_path):
    code, output = run_worker(tmp_path, "-P", "threads")
    assert code != 0
    assert "ConfigurationError" in output
    assert "the queue 'sdtpu' needs the pool sdtpu_worker.pool:DevicePool" in output
    assert "leave out -P" in output
    assert "Traceback" not in output


def test_autoscale_is_refused(tmp_path):
    code, output = run_worker(tmp_path, "--autoscale", "8,2")
    assert code != 0
    assert "--autoscale cannot change how many jobs a device holds" in output


def test_pickle_is_refused(tmp_path):
    (tmp_path / "celeryconfig.py").write_text("accept_content = ['json', 'pickle']\n")
    code, output = run_worker(tmp_path, C_FORCE_ROOT="1")
    assert code != 0
    assert "accept_content must be ['json']" in output


def test_a_tpu_that_is_not_there_is_refused_with_the_found_and_the_wanted_kind(tmp_path):
    code, output = run_worker(tmp_path, SDTPU_PLATFORM="tpu", JAX_PLATFORMS="cpu")
    assert code != 0
    assert "sdtpu_platform is 'tpu', but the devices found are 1 of kind 'cpu'" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SDTPU_MODEL": "/no/such/folder"}, "there is no folder '/no/such/folder'"),
        (
            {"SDTPU_SLOTS_PER_DEVICE": "zero"},
            "SDTPU_SLOTS_PER_DEVICE must be auto, or an integer from 1 to 64, got 'zero'",
        ),
        ({"SDTPU_IMAGE_STORE": "nonsense://x"}, "sdtpu_image_store must be redis, a redis:// URL or a writable fsspec"),
        (
            {"CELERY_RESULT_BACKEND": "nonesuch://x"},
            "the result backend cannot be made (ModuleNotFoundError: No module",
        ),
    ],
)
def test_a_wrong_setting_ends_the_worker_with_one_clear_line(tmp_path, settings, message):
    code, output = run_worker(tmp_path, **settings)
    assert code != 0
    assert message in output
    assert "Traceback" not in output


PROJECT = """
from celery import Celery, signals
from sdtpu_worker import install
app = install(Celery("project", broker="memory://"))
app.conf.update({conf})
signals.worker_process_init.connect(lambda **_: print("SET UP", flush=True), weak=False)
@signals.worker_ready.connect
def ready(sender, **_):
    import sys
    queues = ",".join(sorted(sender.app.amqp.queues.consume_from))
    print(f"POOL {type(sender.pool).__module__} {'jax' in sys.modules} QUEUES {queues}", flush=True)
    raise SystemExit(0)
"""
NO_JAX = "raise ModuleNotFoundError(\"No module named 'jax'\", name='jax')\n"


def run_project(folder: Path, *options: str, conf: str = "{}", with_jax: bool = False) -> tuple[int, str]:
    """Run a worker of an existing project that now calls `install`, on a machine without JAX."""
    (folder / "project.py").write_text(PROJECT.replace("{conf}", conf))
    if not with_jax:
        (folder / "jax.py").write_text(NO_JAX)
    return run_worker(folder, *options, app="project", CELERY_BROKER_URL="memory://")


def test_a_worker_of_other_queues_stays_an_ordinary_one(tmp_path):
    code, output = run_project(tmp_path, "-Q", "mail", "-c", "1")
    assert "POOL celery.concurrency.prefork False QUEUES mail\n" in output, output
    assert code == 0


@pytest.mark.parametrize(
    "conf", ["{}", "{'task_queues': [__import__('kombu').Queue(name) for name in ('celery', 'sdtpu')]}"]
)
def test_a_worker_without_queues_stays_an_ordinary_one_and_says_how_a_device_worker_is_started(tmp_path, conf):
    """It died with a ModuleNotFoundError without a text; with JAX it loaded the model and took the web tier's tasks."""
    code, output = run_project(tmp_path, "-c", "1", conf=conf)
    assert "POOL celery.concurrency.prefork False QUEUES celery\n" in output, output
    assert "WARNING/MainProcess] this is an ordinary worker" in output
    assert "A device worker is started with -Q sdtpu" in output
    assert code == 0


@pytest.mark.parametrize("queue", ["sdtpu", "sdtpu.t3", "gpu"])
def test_a_worker_of_any_queue_of_the_task_is_a_device_worker_and_says_what_it_lacks(tmp_path, queue):
    """`-Q sdtpu.t3`, or a queue of the app's own routes, made a prefork worker that took jobs and failed them."""
    conf = "{'task_routes': {'sdtpu.*': 'gpu'}, 'worker_pool': 'solo'}"
    code, output = run_project(tmp_path, "-Q", queue, "-c", "2", "-P", "prefork", "--max-tasks-per-child", "5",
                               conf=conf)  # fmt: skip
    assert code != 0
    assert "a device worker needs what is not installed (No module named 'jax'): pip install" in output, output
    assert "Traceback" not in output
    assert "SET UP" in output, "worker_process_init, where OpenTelemetry and others are set up, was never sent"
    for option in ("concurrency", "pool", "max-tasks-per-child"):
        assert f"--{option} is ignored by a device worker" in output
    assert "--prefetch-multiplier" not in output


def test_a_redis_that_grants_too_few_connections_is_refused_at_the_start(tmp_path):
    """The worker consumed, results could not be stored, and jobs came back."""
    with private_redis("--maxclients", "19") as url:
        code, output = run_worker(tmp_path, app="tests.chaos.fake_worker", CELERY_BROKER_URL=url,
                                  CELERY_RESULT_BACKEND=url, SDTPU_CPU_DEVICES="2")  # fmt: skip
    assert code == 1
    assert "Redis grants 19 connections (maxclients), but a worker with 2 slots needs 22" in output, output
    assert "Traceback" not in output


def test_celerys_own_command_line_has_our_commands():
    done = subprocess.run(
        [sys.executable, "-m", "celery", "sdtpu", "settings"], capture_output=True, text=True, timeout=120, check=False
    )
    assert "sdtpu_platform  (default: auto; environment: SDTPU_PLATFORM)" in done.stdout, done.stderr
