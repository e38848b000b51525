"""Real worker processes on simulated devices, and web apps, as their users start them; one Redis for all of them."""

from __future__ import annotations

from tests.support.clients import app, app_conf, redis_url
from tests.support.engine_fixtures import compile_cache, devices, engine, random_checkpoint, shipped

__all__ = ["app", "app_conf", "compile_cache", "devices", "engine", "random_checkpoint", "redis_url", "shipped"]
