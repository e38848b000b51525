"""The servers and proxies of the fault tests do what their names say, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import threading
import time

import pytest
import redis
from celery import Celery
from redis.exceptions import AuthenticationError, ConnectionError, NoPermissionError, TimeoutError

from sdtpu_worker.testing.processes import StartFailed
from tests.chaos.proxies import FlakyProxy, TlsProxy
from tests.chaos.sentinel import SentinelCluster
from tests.chaos.servers import RedisServer
from tests.support.waiting import wait_until


@contextlib.contextmanager
def client_of(url: str):
    with contextlib.closing(redis.Redis.from_url(url, socket_timeout=60, retry=None)) as client:
        yield client


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_redis_keeps_what_it_has_through_kill_and_restart():
    with RedisServer() as server, contextlib.closing(server.client()) as client:
        url, folder, pid = server.url, server.folder, client.info("server")["process_id"]
        client.rpush("jobs", "a", "b")
        wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "ok", "the file")
        time.sleep(1.1)  # appendfsync everysec
        server.kill()
        assert not is_there(pid)
        with pytest.raises(ConnectionError):
            client.ping()
        server.start()
        assert (server.url, client.lrange("jobs", 0, -1)) == (url, [b"a", b"b"])
        server.restart()
        assert client.llen("jobs") == 2
        pid = client.info("server")["process_id"]
    assert not is_there(pid)
    assert not folder.exists()


def test_a_redis_that_is_paused_answers_later():
    with RedisServer() as server, contextlib.closing(server.client(socket_timeout=0.2)) as client:
        wait_until(client.ping, "an answer")
        server.pause()
        with pytest.raises(TimeoutError):
            client.ping()
        server.resume()
        wait_until(client.ping, "an answer")
        began = time.monotonic()
        server.pause(0.5)
        wait_until(client.ping, "an answer")
        assert 0.4 < time.monotonic() - began < 30
        server.pause()  # and the end of the block ends it all the same


def test_options_and_users_reach_the_server():
    users = ["default off", "app on >pw ~sdtpu* &* +@all -@dangerous", "admin on >root ~* &* +@all"]
    with RedisServer({"maxmemory": "50mb", "user": users}, login="admin:root") as server:
        with contextlib.closing(server.client()) as client:
            assert client.config_get("maxmemory") == {"maxmemory": "52428800"}
        with client_of(server.url.replace("admin:root", "app:pw")) as app:
            app.set("sdtpu:x", 1)
            with pytest.raises(NoPermissionError):
                app.config_get("save")
    with RedisServer({"requirepass": "secret"}) as server:
        with contextlib.closing(server.client()) as client:
            assert client.ping()
        with client_of(server.url.replace(":secret@", "")) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing():
    server = RedisServer({"maxmemory": "plenty"})
    with pytest.raises(StartFailed, match="maxmemory"):
        server.__enter__()
    assert not server.is_running
    assert not server.folder.exists()


def test_a_flaky_proxy_cuts_restores_drops_and_delays():
    with RedisServer({"requirepass": "secret"}) as server, FlakyProxy(server.url) as proxy:
        with client_of(proxy.url) as client:
            client.set("large", b"x" * 8_000_000)
            assert len(client.get("large")) == 8_000_000
            proxy.cut()
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    client.ping()
            proxy.restore()
            before = client.client_id()
            threading.Timer(0.2, proxy.drop_connections).start()
            with pytest.raises(ConnectionError):
                client.blpop("empty", 40)
            assert client.client_id() != before
            proxy.delay(0.2)
            client.ping()
            began = time.monotonic()
            assert len(client.get("large")) == 8_000_000
            assert 0.4 <= time.monotonic() - began < 12  # there and back, once, however many packets
            proxy.delay(60)
            threading.Timer(0.2, proxy.delay, [0]).start()
            client.ping()
            server.kill()
            with pytest.raises(ConnectionError):
                client.ping()
    assert "flaky-proxy" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program")
def test_a_tls_proxy_speaks_tls_to_redis_py_and_celery():
    with RedisServer({"requirepass": "secret"}) as server, TlsProxy(server.url) as proxy:
        with client_of(proxy.url) as client:
            client.set("a", 1)
            proxy.cut()
            with pytest.raises(ConnectionError):
                client.ping()
            proxy.restore()
            assert client.get("a") == b"1"
        with (
            client_of(proxy.url.split("?")[0]) as stranger,
            pytest.raises(ConnectionError, match=r"(?i)certificate.verify.failed"),
        ):
            stranger.ping()
        with client_of(proxy.url.replace("rediss://", "redis://").split("?")[0]) as plain, pytest.raises(Exception):  # noqa: B017, PT011  (any error of the driver)
            plain.ping()
        app = Celery("tls", broker=proxy.url, backend=proxy.url, set_as_current=False)
        assert app.backend.connparams["ssl_cert_reqs"] == ssl.CERT_REQUIRED
        app.send_task("nothing", task_id="some-id", queue="tls")
        app.backend.store_result("some-id", 7, "SUCCESS")
        assert app.AsyncResult("some-id").get(timeout=60) == 7
        app.close()
        folder = proxy.ca_file.parent
    assert not folder.exists()


def test_a_sentinel_cluster_fails_over_and_clients_follow():
    with SentinelCluster(password="secret", sentinel_password="watch") as cluster:
        app = Celery("sentinels", broker=cluster.broker_url, set_as_current=False)
        app.conf.broker_transport_options = cluster.transport_options
        app.send_task("nothing", queue="waiting")
        with contextlib.closing(cluster.client()) as client:
            assert client.llen("waiting") == 1
            old = cluster.kill_master()
            new = cluster.wait_for_failover()
            assert new is cluster.master is not old
            assert client.llen("waiting") == 1
            client.set("a", 1)
        app.close()
        folders = [server.folder for server in (*cluster.servers, *cluster.sentinels)]
    assert not any(folder.exists() for folder in folders)
