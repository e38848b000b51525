"""The three fronts as one client sees them: the door over HTTP, Flask's and Django's test clients."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from flask import Blueprint, Flask

from tests.support.waiting import wait_until

USERS = ("ann", "bob")


@dataclass(frozen=True)
class Reply:
    """An answer of any front."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body's value."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Front:
    """A front with the jobs API at `/v1/jobs`, asked by one user.

    Attributes:
        ask: sends method, path, headers and body; returns the reply.
        stream: sends a GET and yields the parts of its body.
    """

    ask: Callable[[str, str, dict[str, str], bytes], Reply]
    stream: Callable[[str, dict[str, str]], contextlib.AbstractContextManager[Iterator[bytes]]]

    def get(self, path: str, **headers: str) -> Reply:
        """Send a GET."""
        return self.ask("GET", path, _names(headers), b"")

    def delete(self, path: str) -> Reply:
        """Send a DELETE."""
        return self.ask("DELETE", path, {}, b"")

    def post(self, value: Any, content_type: str = "application/json", **headers: str) -> Reply:
        """Send a POST to the jobs, with a value as JSON or with bytes."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask("POST", "/v1/jobs", {"Content-Type": content_type, **_names(headers)}, body)

    def end(self, job_id: str) -> dict[str, Any]:
        """Wait until a job has ended; return it."""

        def ended() -> dict[str, Any] | None:
            job = self.get(f"/v1/jobs/{job_id}").json()
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        return wait_until(ended, f"job {job_id} to end") or {}


def _names(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def door_front(url: str, user: str) -> Front:
    """Return the door, asked with a user's key."""
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer sk-{user}"}, timeout=30, trust_env=False)

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        answer = client.request(method, path, headers=headers, content=body or None)
        return Reply(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.content)

    @contextlib.contextmanager
    def stream(path: str, headers: dict[str, str]) -> Iterator[Iterator[bytes]]:
        with client.stream("GET", path, headers=headers) as answer:
            yield answer.iter_bytes()

    return Front(ask, stream)


def make_flask_app(blueprint: Blueprint) -> Flask:
    """Return a Flask app with a blueprint."""
    site = Flask(__name__)
    site.secret_key = "for tests only"
    site.register_blueprint(blueprint)
    return site


def flask_front(site: Flask, user: str) -> Front:
    """Return a Flask app, asked by a user."""
    client = site.test_client()

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        with client.open(path, method=method, headers={"X-User": user, **headers}, data=body) as answer:
            return Reply(answer.status_code, {k.lower(): v for k, v in answer.headers}, answer.get_data())

    @contextlib.contextmanager
    def stream(path: str, headers: dict[str, str]) -> Iterator[Iterator[bytes]]:
        with client.get(path, headers={"X-User": user, **headers}, buffered=False) as answer:
            yield answer.iter_encoded()

    return Front(ask, stream)


def django_front(user: str) -> Front:
    """Return the Django project, asked by a user."""
    from django.test import Client

    client = Client()

    def ask(method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        rest = {name: value for name, value in headers.items() if name != "Content-Type"}
        answer = client.generic(
            method, path, body, headers.get("Content-Type", ""), headers={"X-User": user, **rest}
        )  # fmt: skip
        return Reply(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.getvalue())

    @contextlib.contextmanager
    def stream(path: str, headers: dict[str, str]) -> Iterator[Iterator[bytes]]:
        answer = client.get(path, headers={"X-User": user, **headers})
        try:
            yield iter(answer.streaming_content)
        finally:
            answer.close()

    return Front(ask, stream)
