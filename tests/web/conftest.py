"""A real Redis, a real worker on a fake engine, the door, and a Flask and a Django app in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from flask import request

from sdtpu_worker.contrib.flask import create_blueprint
from tests.http.conftest import worker
from tests.http.doors import DoorProcess, keys, start_door
from tests.support.clients import app, redis_url
from tests.web import django_site
from tests.web.fronts import USERS, Front, django_front, door_front, flask_front, make_flask_app

__all__ = ["app", "redis_url", "worker"]

KINDS = ("door", "flask", "django")
BASES = {"door": "", "flask": "http://localhost", "django": "http://testserver"}


@pytest.fixture
def app_conf() -> dict[str, Any]:
    """Let a header say whose request it is, and users ask for any priority, as the door's keys do."""
    return {
        "sdtpu_web_owner": "tests.web.django_site.find_owner",
        "sdtpu_web_priorities": "0-9",
        "result_backend_transport_options": {"retry_policy": {"max_retries": 1}},
    }


@pytest.fixture(scope="session")
def locked_door(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """Run a door with a key for each user."""
    with start_door(
        redis_url, tmp_path_factory.mktemp("door"), SDTPU_HTTP_KEYS=keys(**dict.fromkeys(USERS, ""))
    ) as door:
        yield door


@pytest.fixture(scope="session")
def django_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the Django project up; give its folder."""
    folder = tmp_path_factory.mktemp("site")
    django_site.configure(folder)
    return folder


@pytest.fixture
def site(app: Celery, django_project: Path) -> Iterator[None]:
    """Serve the Django project for the room's Celery app."""
    yield
    django_site.forget_connections()


@pytest.fixture
def make_front(app: Celery, site: None, locked_door: DoorProcess) -> Iterator[Callable[[str, str], Front]]:
    """Give a function that returns a front, by its kind, for a user."""
    blueprint = create_blueprint(app, owner=lambda: request.headers.get("X-User") or None)
    flask_app = make_flask_app(blueprint)

    def make(kind: str, user: str = "ann") -> Front:
        if kind == "door":
            return door_front(locked_door.url, user)
        return flask_front(flask_app, user) if kind == "flask" else django_front(user)

    yield make
    blueprint.close()


@pytest.fixture(params=KINDS)
def front(request: pytest.FixtureRequest, make_front: Callable[[str, str], Front]) -> Front:
    """Give each front, asked by ann."""
    return make_front(request.param, "ann")
