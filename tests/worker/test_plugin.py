"""What `install` does to an app and to its workers; refusals happen before anything heavy is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdtpu_worker.testing.processes import free_port, worker_command, worker_env


def run_worker(tmp_path: Path, *options: str, app: str = "sdtpu_worker.app", **settings: str) -> tuple[int, str]:
    """Run a worker that is expected to give up; return its exit code and output."""
    env = worker_env(f"redis://127.0.0.1:{free_port()}/0", SDTPU_PLATFORM="cpu", SDTPU_CPU_DEVICES="1")
    env = {**env, **settings, "PYTHONPATH": f"{tmp_path}:{env['PYTHONPATH']}"}
    done = subprocess.run(
        worker_command(app, *options), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_another_pool_on_our_queue_is_refused_with_the_remedy(tmp_path):
    code, output = run_worker(tmp_path, "-P", "threads")
    assert code != 0
    assert "ConfigurationError" in output
    assert "set worker_pool = 'sdtpu_worker.pool:DevicePool'" in output
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
    ],
)
def test_a_wrong_setting_ends_the_worker_with_one_clear_line(tmp_path, settings, message):
    code, output = run_worker(tmp_path, **settings)
    assert code != 0
    assert message in output


def test_a_worker_of_other_queues_stays_an_ordinary_one(tmp_path):
    (tmp_path / "project.py").write_text(
        "from celery import Celery, signals\n"
        "from sdtpu_worker import install\n"
        "app = install(Celery('project', broker='memory://'))\n"
        "@signals.worker_ready.connect\n"
        "def ready(sender, **_):\n"
        "    import sys\n"
        "    print(f'POOL {type(sender.pool).__module__} {\"jax\" in sys.modules}', flush=True)\n"
        "    raise SystemExit(0)\n"
    )
    code, output = run_worker(tmp_path, "-Q", "mail", "-c", "1", app="project", CELERY_BROKER_URL="memory://")
    assert "POOL celery.concurrency.prefork False" in output, output
    assert code == 0


def test_celerys_own_command_line_has_our_commands():
    done = subprocess.run(
        [sys.executable, "-m", "celery", "sdtpu", "settings"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "sdtpu_platform  (default: auto; environment: SDTPU_PLATFORM)" in done.stdout, done.stderr
