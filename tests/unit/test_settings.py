"""Where settings come from, which values they may have, and what `install` sets in an app."""

from __future__ import annotations

import ast
import math

import pytest
from celery import Celery

from sdtpu_worker import install
from sdtpu_worker.config import read_config, read_setting, source_of
from sdtpu_worker.errors import ConfigurationError
from tests.support.paths import ROOT


def test_install_sets_defaults_that_the_apps_own_configuration_overrides():
    app = install(Celery("own", set_as_current=False))
    assert app.conf.worker_pool == "prefork"
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
        assert own.conf.worker_prefetch_multiplier == 4
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
    monkeypatch.setenv("SDTPU_RESOLUTIONS", "512x512,SDXL,1024x1024")
    sizes = read_config(app.conf).resolutions
    assert len(sizes) == len(set(sizes)) == 10
    assert sizes[:2] == ((512, 512), (1024, 1024))
    assert all(0.9 < height * width / 1024**2 < 1.01 for height, width in sizes[1:])
    monkeypatch.delenv("SDTPU_RESOLUTIONS")
    app.conf.sdtpu_resolutions = ["sdxl", (512, 768)]
    assert read_config(app.conf).resolutions[-1] == (512, 768)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sdtpu_reuse", "always"),
        ("sdtpu_reuse", ["on"]),
        ("sdtpu_slots_per_device", 0),
        ("sdtpu_slots_per_device", True),
        ("sdtpu_platform", "quantum"),
        ("sdtpu_resolutions", "512"),
        ("sdtpu_resolutions", "511x512"),
        ("sdtpu_resolutions", "sd3"),
        ("sdtpu_resolutions", [None]),
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


def test_celeryconfig_holds_values_only():
    tree = ast.parse((ROOT / "celeryconfig.py").read_text())
    assert all(isinstance(node, ast.Assign | ast.Expr) for node in tree.body)


def test_loras_are_a_folder_or_names_with_sources(monkeypatch):
    app = Celery("settings", set_as_current=False)
    assert read_config(app.conf).loras is None
    for written, read in (
        ("", None),
        ("/models/loras", "/models/loras"),
        ("pixel=/a.safetensors, toy=owner/toy", {"pixel": "/a.safetensors", "toy": "owner/toy"}),
    ):
        monkeypatch.setenv("SDTPU_LORAS", written)
        assert read_config(app.conf).loras == read
    monkeypatch.delenv("SDTPU_LORAS")
    app.conf.sdtpu_loras = {"pixel": "/a.safetensors"}
    assert read_config(app.conf).loras == {"pixel": "/a.safetensors"}
    for wrong in ("pixel=", "a=x,a=y", ["a"], {"a": 1}):
        app.conf.sdtpu_loras = wrong
        with pytest.raises(ConfigurationError, match="sdtpu_loras must be a folder, or names with sources"):
            read_config(app.conf)


@pytest.mark.parametrize(
    ("value", "meaning"), [("on", "on"), ("off", "off"), (True, "on"), ("false", "off"), ("across_tenants",) * 2]
)
def test_reuse_is_a_switch_with_a_third_position(value, meaning):
    assert read_setting("sdtpu_reuse", {}) == "off"
    assert read_setting("sdtpu_reuse", {"sdtpu_reuse": value}) == meaning


def test_a_secret_is_not_shown(monkeypatch):
    assert source_of("sdtpu_http_webhook_secret", {"sdtpu_http_webhook_secret": "s3cret"})[0] == "**"
    assert source_of("sdtpu_http_webhook_secret", {}) == (None, "")
    monkeypatch.setenv("SDTPU_HTTP_WEBHOOK_SECRET", "s3cret")
    assert source_of("sdtpu_http_webhook_secret", {}) == ("**", "SDTPU_HTTP_WEBHOOK_SECRET")
    assert "s3cret" not in repr(read_config({}))
