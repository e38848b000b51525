"""What makes every job come back for ever is found when a worker starts, not by its jobs."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import Mock

import pytest
from celery import Celery
from redis import Redis, exceptions

from sdtpu_worker import ConfigurationError
from sdtpu_worker.operations.connections import connections_needed, connections_warning
from sdtpu_worker.operations.result_checks import check_results
from sdtpu_worker.testing.processes import free_port, private_redis


def app_with(backend: str, **conf: Any) -> Celery:
    app = Celery("starting", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.mark.parametrize("backend", ["redis", "cache+memory://", "rpc://", "disabled://", "file"])
def test_a_backend_that_stores_results_is_left_as_it_was(redis_url, redis, tmp_path, backend, caplog):
    url = {"redis": redis_url, "file": f"file://{tmp_path}"}.get(backend, backend)
    check_results(app_with(url))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert redis.keys("celery-task-meta*") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"result_serializer": "nonesuch"}, "result_serializer must be json, or another one that kombu has, got 'none"),
        ({"result_accept_content": ["yaml"]}, "every job would come back for ever; correct result_serializer"),
    ],
)
def test_a_serializer_that_cannot_work_is_refused(redis_url, redis, conf, message):
    with pytest.raises(ConfigurationError, match=message):
        check_results(app_with(redis_url, **conf))


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        ("nonesuch://x", "No module named 'nonesuch'"),
        ("couchbase://worker:secret@host/bucket", "You need to install the couchbase library"),
        ("redis://worker:secret@host:port/0", "Port could not be cast to integer"),
    ],
)
def test_a_backend_that_cannot_be_made_is_refused_with_its_own_cause(backend, cause):
    with pytest.raises(ConfigurationError, match=f"the result backend cannot be made .*{cause}") as caught:
        check_results(app_with(backend))
    assert "correct result_backend, or install the library" in str(caught.value)
    assert "serializer" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_permission_is_refused():
    with private_redis("--user", "worker", "on", ">secret", "~*", "+@all", "-set", "-setex") as url:
        address = url.removeprefix("redis://")
        with pytest.raises(ConfigurationError, match="NoPermissionError") as caught:
            check_results(app_with(f"redis://worker:secret@{address}"))
        assert "secret" not in str(caught.value)


def test_a_backend_that_is_away_or_full_is_no_reason_not_to_start(caplog):
    check_results(app_with(f"redis://127.0.0.1:{free_port()}/0"))
    assert "the result backend does not take results now (ConnectionError" in caplog.text
    caplog.clear()
    with private_redis("--maxmemory", "1", "--maxmemory-policy", "noeviction") as url:
        check_results(app_with(url))
    assert "OutOfMemoryError" in caplog.text


def test_a_database_without_its_tables_is_refused():
    backend = Mock()
    backend.encode.return_value = backend.client = ""
    for text in ("no such table: celery_taskmeta", 'relation "celery_taskmeta" does not exist'):
        backend.store_result.side_effect = RuntimeError(text)
        with pytest.raises(ConfigurationError, match="the tables and the permissions"):
            check_results(Mock(backend=backend, conf=app_with("disabled://").conf))


def test_a_redis_that_grants_fewer_connections_than_a_worker_needs_is_refused():
    needed = connections_needed(num_slots=8)
    assert needed == 40
    with private_redis("--maxclients", str(needed - 1)) as url, Redis.from_url(url) as client:
        with pytest.raises(ConfigurationError, match=r"grants 39 connections \(maxclients\).* 8 slots needs 40"):
            connections_warning(client, 8)


def test_a_redis_whose_connections_are_nearly_all_taken_is_told_with_the_numbers():
    client = Mock()
    client.info.return_value = {"maxclients": 100, "connected_clients": 61}
    assert "61 of 100 connections in use" in (connections_warning(client, 8) or "")
    client.info.return_value = {"maxclients": 100, "connected_clients": 60}
    assert connections_warning(client, 8) is None
    client.info.return_value = {"connected_clients": 60}
    assert connections_warning(client, 8) is None
    client.info.side_effect = exceptions.ConnectionError
    assert connections_warning(client, 8) is None
