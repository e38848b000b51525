"""The door inside another ASGI app, and on other kinds of connections to Redis."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from celery import Celery
from redis import Redis
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from sdtpu_worker import install
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.http import create_app
from sdtpu_worker.testing.processes import find_redis_server, free_port, running
from tests.support.waiting import wait_until


def make_client_app(url: str, **conf: object) -> Celery:
    app = install(Celery("mounted", broker=url, backend=url, set_as_current=False))
    app.conf.update(conf)
    return app


def test_addresses_lead_through_the_app_that_the_door_is_mounted_in(redis_url):
    async def hello(_: object) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def ask() -> None:
        door = create_app(make_client_app(redis_url, sdtpu_queue="mounted"))
        site = Starlette(routes=[Route("/", hello), Mount("/pictures", door)])
        transport = httpx.ASGITransport(site)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/")).text == "hello"
            made = await client.post("/pictures/v1/jobs", json={"prompt": "a fox"})
            assert made.status_code == 202
            assert made.headers["location"].startswith("http://localhost/pictures/v1/jobs/")
            assert (await client.get(made.headers["location"])).json()["status"] == "queued"
            assert (await client.get("/pictures/v1/nothing")).status_code == 404
            page = await client.get("/pictures/", follow_redirects=True)
            assert (str(page.url), page.status_code) == ("http://localhost/pictures/v1/jobs/page/", 200)
            page = await client.get("/pictures/v1/jobs/page", follow_redirects=True)
            assert str(page.url) == "http://localhost/pictures/v1/jobs/page/"
        await door.state.door.close()

    asyncio.run(ask())


@contextlib.contextmanager
def redis_on_a_socket(folder: Path) -> Iterator[str]:
    place = folder / "redis.sock"
    command = [find_redis_server(), "--port", "0", "--unixsocket", str(place), "--save", "", "--dir", str(folder)]
    with running(command, folder / "redis.log"), Redis(unix_socket_path=str(place)) as redis:
        wait_until(redis.ping, "Redis to answer")
        yield f"redis+socket://{place}"


@contextlib.contextmanager
def redis_behind_a_sentinel(folder: Path) -> Iterator[str]:
    port, sentinel_port = free_port(), free_port()
    (folder / "sentinel.conf").write_text(f"port {sentinel_port}\nsentinel monitor door 127.0.0.1 {port} 1\n")
    server = find_redis_server()
    commands = [
        [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)],
        [server, str(folder / "sentinel.conf"), "--sentinel"],
    ]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            process: subprocess.Popen[bytes] = stack.enter_context(running(command, folder / f"{number}.log"))
            assert process.poll() is None
        for each in (port, sentinel_port):
            client = stack.enter_context(Redis(port=each))
            wait_until(client.ping, "Redis to answer")
        yield f"sentinel://127.0.0.1:{sentinel_port}/0"


@pytest.mark.parametrize("server", [redis_on_a_socket, redis_behind_a_sentinel])
def test_states_come_over_every_kind_of_connection(server, tmp_path):
    async def ask(url: str) -> None:
        app = Celery("other", broker="memory://", backend=url, set_as_current=False)
        app.conf.result_backend_transport_options = {"master_name": "door"}
        door = create_app(app).state.door
        await door.jobs.ping()
        async with door.jobs.watch("a-job") as watch:
            assert (await watch.next_state(60)).status == "queued"
            await asyncio.to_thread(app.backend.store_result, "a-job", {}, "STARTED")
            assert (await watch.next_state(60)).status == "running"
        await door.close()

    with server(tmp_path) as url:
        asyncio.run(ask(url))


def test_a_result_backend_that_only_this_process_can_read_is_refused():
    with pytest.raises(ConfigurationError, match="keeps results by task id"):
        create_app(Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False))
