"""What `install` does to an app and to its workers; refusals happen before anything heavy is loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery

from sdtpu_worker import install
from sdtpu_worker.config import read_config, read_setting
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.testing.processes import free_port, worker_command, worker_env

ROOT = Path(__file__).parent.parent.parent


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


def test_install_sets_defaults_that_the_apps_own_configuration_overrides():
    app = install(Celery("own", set_as_current=False))
    assert app.conf.worker_pool == "sdtpu_worker.pool:DevicePool"
    assert app.conf.accept_content == ["json"]
    own = Celery("own", set_as_current=False)
    own.conf.worker_pool = "solo"
    assert install(own).conf.worker_pool == "solo"
    for install_first in (True, False):
        own = Celery("own", set_as_current=False)
        if install_first:
            install(own)
        own.config_from_object({"worker_pool": "threads", "task_default_queue": "mine"})
        assert install(own).conf.worker_pool == "threads"
        assert own.conf.worker_prefetch_multiplier == 1
    assert "sdtpu.generate" in own.tasks


def test_settings_come_from_the_environment_first_then_the_app_then_the_default(monkeypatch):
    app = Celery("settings", set_as_current=False)
    assert read_setting("sdtpu_slots_per_device", app.conf) == 1
    app.conf.sdtpu_slots_per_device = 4
    assert read_setting("sdtpu_slots_per_device", app.conf) == 4
    monkeypatch.setenv("SDTPU_SLOTS_PER_DEVICE", "2")
    assert read_setting("sdtpu_slots_per_device", app.conf) == 2
    monkeypatch.setenv("SDTPU_RESOLUTIONS", "512x512, 768x512")
    assert read_config(app.conf).resolutions == ((512, 512), (768, 512))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sdtpu_slots_per_device", 0),
        ("sdtpu_slots_per_device", True),
        ("sdtpu_platform", "quantum"),
        ("sdtpu_resolutions", "512"),
        ("sdtpu_resolutions", "511x512"),
        ("sdtpu_tick_s", "fast"),
        ("sdtpu_model", ""),
        ("sdtpu_dtype", "float16"),
        ("sdtpu_dtype", 10**5000),
        ("sdtpu_model", 10**5000),
        ("sdtpu_tick_s", 10**400),
        ("sdtpu_tick_s", 10**5000),
        ("sdtpu_tick_s", "nan"),
        ("sdtpu_max_queue", 10**5000),
        ("sdtpu_max_queue", "9" * 5000),
        ("sdtpu_max_queue", "²"),
        ("sdtpu_max_queue", "--5"),
        ("sdtpu_max_queue", 3.0),
        ("sdtpu_preemption", 10**5000),
        ("sdtpu_preemption", 2),
        ("sdtpu_resolutions", [(math.inf, 512)]),
        ("sdtpu_resolutions", [(10**5000, 512)]),
        ("sdtpu_resolutions", "9" * 5000 + "x512"),
        ("sdtpu_health_address", 10**5000),
        ("sdtpu_health_address", ":" + "9" * 5000),
        ("sdtpu_health_address", ":²"),
        ("sdtpu_slots_per_device", [10**5000]),
    ],
    ids=lambda value: "",
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be .*, got") as caught:
        read_config({name: value})
    assert "Exceeds" not in str(caught.value)
    assert "literal" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_misspelt_setting_is_found_also_in_upper_case_and_under_a_namespace():
    with pytest.raises(ConfigurationError, match=r"unknown setting sdtpu_modle .*the settings are sdtpu_model"):
        read_config({"sdtpu_modle": "x"})
    with pytest.raises(ConfigurationError, match=r"unknown setting SDTPU_MODEL .*write sdtpu_model"):
        read_config({"SDTPU_MODEL": "x"})
    app = Celery("namespaced", set_as_current=False)
    app.config_from_object({"CELERY_SDTPU_TICK_S": 0.5, "CELERY_SDTPU_TYPO": 1}, namespace="CELERY")
    assert read_setting("sdtpu_tick_s", app.conf) == 0.5
    with pytest.raises(ConfigurationError, match="unknown setting CELERY_SDTPU_TYPO"):
        read_config(app.conf)


def test_celerys_own_command_line_has_our_commands():
    done = subprocess.run(
        [sys.executable, "-m", "celery", "sdtpu", "settings"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "sdtpu_platform  (default: auto; environment: SDTPU_PLATFORM)" in done.stdout, done.stderr


def test_celeryconfig_holds_values_only():
    import ast

    tree = ast.parse((ROOT / "celeryconfig.py").read_text())
    assert all(isinstance(node, ast.Assign | ast.Expr) for node in tree.body)
