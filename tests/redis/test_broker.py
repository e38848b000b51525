"""A Redis that does not take a job: a clear error within seconds, which tells no password."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time

import pytest
from celery import Celery
from redis import Redis

from sdtpu_worker import BrokerUnavailable
from sdtpu_worker.client.backend_wait import PATIENCE_S, bounded_wait
from sdtpu_worker.redaction import without_password
from sdtpu_worker.testing.processes import find_redis_server, free_port, private_redis, running
from tests.support.clients import client_app


def refusal(app: Celery) -> tuple[str, float]:
    """Return the text of the error and the seconds that it took."""
    started = time.monotonic()
    gc.disable()  # results of other tests, whose Redis is gone, would try for long to unsubscribe
    try:
        with pytest.raises(BrokerUnavailable, match="the job was not enqueued: ") as caught:
            app.tasks["sdtpu.generate"].delay("a")
    finally:
        gc.enable()
    return str(caught.value), time.monotonic() - started


@pytest.fixture(scope="module")
def own_redis_url():
    with private_redis() as url:
        yield url


@pytest.fixture
def own_redis(own_redis_url):
    client = Redis.from_url(own_redis_url)
    yield client
    client.close()


@contextlib.contextmanager
def server_that_says(reply: bytes):
    """Run a server that has the same answer to everything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    connection.sendall(reply * max(1, data.count(b"*")))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_redis_that_is_not_there_fails_within_seconds_every_time(caplog):
    url = f"redis://user:secret@127.0.0.1:{free_port()}/0"
    with client_app(url) as app:
        for _ in range(2):
            text, seconds = refusal(app)
            assert seconds < PATIENCE_S + 2
            assert f"the result backend at {url.replace('secret', '**')} cannot be reached" in text
    assert "secret" not in caplog.text


def test_a_redis_that_is_not_there_fails_as_fast_when_the_load_is_asked_for():
    with client_app(f"redis://127.0.0.1:{free_port()}/0", "cache+memory://", sdtpu_max_queue=1) as app:
        text, seconds = refusal(app)
    assert "Redis at redis://127.0.0.1" in text
    assert seconds < PATIENCE_S


def test_a_redis_that_comes_back_meanwhile_gets_the_job(tmp_path):
    port = free_port()
    command = [find_redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with client_app(f"redis://127.0.0.1:{port}/0") as app:
        refusal(app)
        results = []
        sending = threading.Thread(target=lambda: results.append(app.tasks["sdtpu.generate"].delay("a")))
        sending.start()
        time.sleep(0.3)
        with running(command, tmp_path / "redis.log"):
            sending.join(10)
            assert [result.state for result in results] == ["PENDING"]
            results.clear()  # collected later, without a Redis, it would try for long to unsubscribe


def test_only_the_thread_that_enqueues_is_impatient(own_redis_url):
    with client_app(own_redis_url) as app:
        backend = app.backend
        failing = ConnectionError("gone")

        def waits() -> float:
            return backend.on_connection_error(20, failing, iter([0.5]), 0)

        with bounded_wait(app):
            assert waits() == 0.5
        elsewhere = []
        with bounded_wait(app):
            time.sleep(0)
            thread = threading.Thread(target=lambda: elsewhere.append(waits()))
            thread.start()
            thread.join()
        assert elsewhere == [0.5]
        assert waits() == 0.5


def test_what_the_user_configured_stays():
    policy = {"retry_policy": {"max_retries": 0}}
    with client_app(f"redis://127.0.0.1:{free_port()}/0", result_backend_transport_options=policy) as app:
        assert refusal(app)[1] < 2
        assert "on_connection_error" not in vars(app.backend)


def test_a_redis_without_memory_says_so(own_redis_url, own_redis):
    with client_app(own_redis_url) as app:
        app.tasks["sdtpu.generate"].delay("a")  # connections are open, the queue is declared
        own_redis.config_set("maxmemory", 1)
        try:
            texts = [refusal(app)[0]]
            with client_app(own_redis_url) as fresh, client_app(own_redis_url, sdtpu_max_queue=9) as asking:
                texts += [refusal(fresh)[0], refusal(asking)[0]]
        finally:
            own_redis.config_set("maxmemory", 0)
    for text in texts:
        assert "is out of memory (maxmemory) and takes no writes" in text
        assert "raise maxmemory" in text


def test_a_replica_says_so(own_redis_url, own_redis):
    own_redis.replicaof("127.0.0.1", free_port())
    try:
        with client_app(own_redis_url) as app:
            text, _ = refusal(app)
    finally:
        own_redis.replicaof("NO", "ONE")
    assert "is a read-only replica" in text
    assert "at the primary" in text


def test_a_redis_that_wants_a_password_says_so_at_once(own_redis_url, own_redis):
    own_redis.config_set("requirepass", "right")
    try:
        with client_app(own_redis_url.replace("://", "://:wrong@")) as app:
            text, seconds = refusal(app)
    finally:
        own_redis.auth("right")
        own_redis.config_set("requirepass", "")
    assert "does not accept this user or password" in text
    assert "wrong" not in text
    assert seconds < 2


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "is still loading its data"),
        (b"-MISCONF Redis is configured to save RDB snapshots\r\n", "cannot save to its disk and takes no writes"),
        (b"-NOPERM this user has no permissions\r\n", "does not permit this user"),
    ],
)
def test_other_states_of_redis_are_named(reply, says):
    with server_that_says(reply) as url, client_app(url, "cache+memory://") as app:
        text, seconds = refusal(app)
    assert says in text
    assert seconds < 10


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://me:pw@h:1/2", "redis://me:**@h:1/2"),
        ("rediss://:pw@h:6380/0?ssl_cert_reqs=required&password=pw", "rediss://:**@h:6380/0"),
        ("sentinel://:pw@a:26379;sentinel://:pw@b:26379", "sentinel://:**@a:26379;sentinel://:**@b:26379"),
        ("sentinel://:pw@a:26379/0;sentinel://b:26379/0", "sentinel://:**@a:26379/0;sentinel://b:26379/0"),
        (["redis://:pw@a", "redis://:p@w@b:1"], "redis://:**@a;redis://:**@b:1"),
        ("redis://:p;pw@h/0", "redis://:**@h/0"),
        ("redis://:pw@[::1]:6379/0", "redis://:**@[::1]:6379/0"),
        ("redis+socket://:pw@/run/redis.sock?virtual_host=1", "redis+socket://:**@/run/redis.sock"),
        ("redis://:p/pw@h:1/0", "redis://:**@h:1/0"),
        ("redis://:p?pw@h:1/0", "redis://:**@h:1/0"),
        ("redis://:pw", "redis://**"),
        ("pw", "**"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


def test_an_error_shows_no_password_of_several_hosts():
    urls = ";".join(f"redis://:pw-of-it@127.0.0.1:{free_port()}/0" for _ in range(2))
    with client_app(urls, "cache+memory://") as app:
        text, seconds = refusal(app)
    assert text.count(":**@127.0.0.1") == 2
    assert "pw-of-it" not in text
    assert seconds < 10
