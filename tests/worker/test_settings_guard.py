"""Passwords stay out of what Celery shows of an app's settings: a real worker that is asked, a real command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from sdtpu_worker import install
from sdtpu_worker.config import read_config
from tests.support.logs import logging_kept
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("namespace", ["", "CELERY"])
def test_no_password_of_an_url_is_where_celery_shows_settings(tmp_path, namespace):
    """`celery inspect conf` of a real worker and `celery report` of a real command."""
    prefix = f"{namespace}_" if namespace else ""
    settings = {
        "broker_url": "filesystem://me:hunter2-a@h/",
        "result_backend": "redis://me:hunter2-b@h/0",
        "broker_failover_urls": ["redis://me:hunter2-c@h/0", "redis://me:hunter2-d@h/0"],
        "sdtpu_image_store": "rediss://me:hunter2-e@h/0",
        "sdtpu_read_image_stores": ("redis://:hunter2-f@h/0", "s3://bucket/x?token=hunter2-g"),
        "sdtpu_model": "embedded",
    }
    names = {f"{prefix}{name}".upper() if prefix else name: value for name, value in settings.items()}
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\nfrom sdtpu_worker import install\n"
        f"app = install(Celery('shop', config_source={names!r}, namespace={namespace!r}))\n"
    )
    report = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", "report"],
        capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        text=True, timeout=120,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    app = install(Celery("shop", set_as_current=False))
    app.config_from_object({**names, f"{prefix}broker_url".upper() if prefix else "broker_url": "memory://"},
                           namespace=namespace)  # fmt: skip
    app.conf.update(result_backend="cache+memory://", task_default_queue="q", worker_hijack_root_logger=False)
    with logging_kept(), start_worker(app, pool="solo", perform_ping_check=False, queues=["q"], shutdown_timeout=60):
        (conf,) = app.control.inspect(timeout=30, limit=1).conf().values()
    for shown in (report.stdout, repr(conf), app.conf.humanize(), repr(app.conf.copy().table())):
        assert "hunter2" not in shown
        assert "rediss://me:**@h/0" in shown
        assert "embedded" in shown
    assert "hunter2-e" in repr(app.conf.table(censored=False))
    assert app.conf.sdtpu_image_store == settings["sdtpu_image_store"]
    assert "hunter2" not in repr(read_config(app.conf))


def test_settings_are_guarded_before_and_after_they_are_loaded():
    app = install(Celery("shop", set_as_current=False))
    app.conf.sdtpu_image_store = "redis://:hunter2@h/0"
    assert "hunter2" not in repr(app.conf.table())
    app.config_from_object({"sdtpu_read_image_stores": "redis://:hunter2@other/0"}, force=True)
    assert app.conf.table()["sdtpu_read_image_stores"] == "redis://:**@other/0"


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_the_environments_values_are_shown_in_place_of_those_that_they_override(monkeypatch, namespace):
    """`inspect conf` and `report` showed the configuration, while the worker followed the environment."""
    monkeypatch.setenv("SDTPU_SLOTS_PER_DEVICE", "4")
    monkeypatch.setenv("SDTPU_TICK_S", "0.5")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:hunter2@other/0")
    app = install(Celery("shop", set_as_current=False, namespace=namespace))
    before = {"sdtpu_slots_per_device": 1, "broker_url": "redis://here/0"}
    app.config_from_object({f"CELERY_{n}".upper() if namespace else n: v for n, v in before.items()}, force=True)
    shown = {name.lower().removeprefix("celery_"): value for name, value in app.conf.table().items()}
    assert shown["sdtpu_slots_per_device"] == "4"
    assert shown["sdtpu_tick_s"] == "0.5"
    assert shown["broker_url"] == "redis://:**@other/0"
