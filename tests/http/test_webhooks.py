"""Jobs are posted when they have ended: signed, again after a failure, and by another door if theirs has died."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.http import create_app
from sdtpu_worker.web import webhooks
from tests.http.doors import start_door
from tests.support.waiting import wait_until

SECRET = "a shared secret"


class Receiver(ThreadingHTTPServer):
    """Notes what is posted to it; the first answers may be failures."""

    def __init__(self, *failures: int) -> None:
        super().__init__(("127.0.0.1", 0), ReceiverHandler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.failures, self.received = list(failures), []
        self.settings = {"SDTPU_HTTP_WEBHOOK_ORIGINS": self.origin, "SDTPU_HTTP_WEBHOOK_SECRET": SECRET}


class ReceiverHandler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, dict(self.headers), body))
        self.send_response(self.server.failures.pop(0) if self.server.failures else 204)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def receiving(*failures: int) -> Iterator[Receiver]:
    with Receiver(*failures) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


def check_signature(headers: dict[str, str], body: bytes) -> None:
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.digest(SECRET.encode(), signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{digest}"


@pytest.mark.usefixtures("worker")
def test_a_job_is_posted_when_it_has_ended_and_again_until_it_is_taken(redis_url, tmp_path):
    with receiving(500, 302) as receiver, start_door(redis_url, tmp_path, **receiver.settings) as door:
        with door.client() as client:
            body = {"prompt": "a fox", "num_inference_steps": 2, "webhook": f"{receiver.origin}/done?order=17"}
            job = client.post("/v1/jobs", json=body).json()
        wait_until(lambda: len(receiver.received) == 3, "three attempts")
        for path, headers, body in receiver.received:
            assert path == "/done?order=17"
            assert headers["webhook-id"] == job["id"]
            check_signature(headers, body)
            assert json.loads(body)["status"] == "succeeded"
        with Redis.from_url(redis_url) as redis:
            wait_until(lambda: not redis.zcard(webhooks.HOOKS), "the webhook to be forgotten")


def test_another_door_takes_over_from_one_that_has_died(redis_url, tmp_path, app):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with receiving() as receiver, Redis.from_url(redis_url) as redis:
        settings = {"SDTPU_QUEUE": "nobody", **receiver.settings}
        with start_door(redis_url, tmp_path / "first", **settings) as door, door.client() as client:
            body = {"prompt": "a fox", "webhook": f"{receiver.origin}/done"}
            job = client.post("/v1/jobs", json=body).json()
            door.process.kill()
            door.process.wait(60)
        redis.zadd(webhooks.HOOKS, {job["id"]: 0})  # as if the lease had expired
        app.backend.store_result(job["id"], RuntimeError("no"), "FAILURE")
        with start_door(redis_url, tmp_path / "second", **settings):
            wait_until(lambda: receiver.received, "the webhook")
        assert json.loads(receiver.received[0][2])["error"]["detail"] == "no"


@pytest.mark.parametrize(
    "url",
    ["https://evil.example/", "{origin}.evil.example/", "{origin}@evil.example/", "//x", "http://[", 7, "{origin}/\n"],
)
def test_only_the_origins_of_the_settings_are_posted_to(url, redis_url):
    app = Celery("hooks", broker=redis_url, backend=redis_url, set_as_current=False)
    app.conf.update(sdtpu_http_webhook_origins=["http://127.0.0.1:1"], sdtpu_http_webhook_secret=SECRET)
    hooks = create_app(app).state.door.webhooks
    assert hooks.check("http://127.0.0.1:1/done") == "http://127.0.0.1:1/done"
    wrong = url.format(origin="http://127.0.0.1:1") if isinstance(url, str) else url
    with pytest.raises(ValueError, match="an allowed origin"):
        hooks.check(wrong)


def test_without_origins_or_a_secret_there_are_no_webhooks(client):
    answer = client.post("/v1/jobs", json={"prompt": "a fox", "webhook": "https://shop.example/done"})
    assert (answer.status_code, "sdtpu_http_webhook_origins" in answer.json()["detail"]) == (400, True)
    app = Celery("hooks", broker="memory://", backend="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.sdtpu_http_webhook_origins = "https://shop.example"
    with pytest.raises(ConfigurationError, match="sdtpu_http_webhook_secret"):
        create_app(app)
