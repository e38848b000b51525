"""What the start-up checks say about real Redis servers that are set up badly, and that they say nothing else."""

from __future__ import annotations

import contextlib
from unittest.mock import Mock

import pytest
import redis
from celery import Celery

from sdtpu_worker.config import read_config
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.redis_checks import redis_warnings
from sdtpu_worker.testing.processes import private_redis
from sdtpu_worker.worker.services import DeviceServices

AOF = ("--appendonly", "yes")


@contextlib.contextmanager
def client_of(*options: str):
    with private_redis(*options) as url, contextlib.closing(redis.Redis.from_url(url)) as client:
        yield client


def warnings_of(client, **arguments) -> list[str]:
    return redis_warnings(client, **arguments)


def test_a_server_with_persistence_and_without_eviction_is_fine():
    with client_of(*AOF) as client:
        assert warnings_of(client) == []
    with client_of("--save", "60", "1", "--maxmemory", "100mb", "--maxmemory-policy", "noeviction") as client:
        assert warnings_of(client) == []


def test_eviction_policies_are_told_by_what_they_may_drop():
    with client_of(*AOF, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru") as client:
        (text,) = warnings_of(client)
        assert "maxmemory-policy is allkeys-lru" in text
        assert "jobs, leases, results and images may vanish" in text
        assert "Set maxmemory-policy noeviction" in text
        client.config_set("maxmemory-policy", "volatile-ttl")
        (text,) = warnings_of(client)
        assert "so results and images may vanish before result_expires" in text
        (text,) = warnings_of(client, images_in_redis=False)
        assert "so results may vanish" in text
        client.config_set("maxmemory", 0)
        assert warnings_of(client) == []


def test_a_server_that_is_nearly_full_is_told_with_the_numbers():
    with client_of(*AOF, "--maxmemory", "100mb") as client:
        assert warnings_of(client) == []
        # A short command: the buffer of a long one is memory in use for a while.
        client.setrange("images", 12 * 2**20 - 1, b"x")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.05))
        (text,) = warnings_of(client)
        assert "MiB (maxmemory)" in text
        assert "sdtpu_image_store" in text
        (text,) = warnings_of(client, images_in_redis=False)
        assert "sdtpu_image_store" not in text


def test_no_persistence_is_told_where_it_can_be_known():
    with client_of() as client:
        (text,) = warnings_of(client)
        assert "loses every job" in text
        assert "Set appendonly yes" in text
        client.execute_command("ACL SETUSER", "no-config", "on", ">pw", "~*", "+@all", "-config")
        client.execute_command("ACL SETUSER", "no-info", "on", ">pw", "~*", "+@all", "-@dangerous")
        for user in ("no-config", "no-info"):
            port = client.connection_pool.connection_kwargs["port"]
            with contextlib.closing(redis.Redis(port=port, username=user, password="pw")) as limited:
                assert warnings_of(limited) == []


def test_a_replica_is_told_with_its_master():
    with client_of(*AOF, "--replicaof", "127.0.0.1", "1") as client:
        (text,) = warnings_of(client)
        assert "connected to a Redis replica" in text
        assert "127.0.0.1:1" in text


def test_old_servers_are_told_and_ones_too_old_are_refused():
    def server(version):
        return Mock(**{"info.return_value": {"redis_version": version, "aof_enabled": 1}})

    with pytest.raises(ConfigurationError, match=r"is 4\.0\.14, but .* need 5\.0 or newer"):
        warnings_of(server("4.0.14"))
    assert "no CLIENT TRACKING" in warnings_of(server("5.0.14"))[0]
    assert "tested with 6.2 and newer" in warnings_of(server("6.0.20"))[0]
    for version in ("6.2.0", "7.4.1", "10.0.0", "unknown"):
        assert warnings_of(server(version)) == []


class NothingToLoad:
    """Stands for a pool, whose engine must not be made."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for before Redis was looked at")


def test_a_redis_cluster_is_refused_in_one_line_before_anything_is_loaded():
    with private_redis("--cluster-enabled", "yes") as url, Celery(broker=url, set_as_current=False) as app:
        services = DeviceServices(app, "host", read_config(app.conf))
        with pytest.raises(ConfigurationError, match=r"belongs to a Redis Cluster .* let broker_url name a server"):
            services.start(NothingToLoad())
        services.stop(is_stuck=False)


def test_a_cluster_that_may_not_be_asked_is_found_by_a_script_on_two_keys():
    with client_of("--cluster-enabled", "yes", *AOF) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        client.execute_command("ACL SETUSER", "app", "on", ">pw", "~*", "+@all", "-@dangerous")
        port = client.connection_pool.connection_kwargs["port"]
        with contextlib.closing(redis.Redis(port=port, username="app", password="pw")) as limited:
            with pytest.raises(redis.ResponseError):
                limited.info()
            with pytest.raises(ConfigurationError, match="belongs to a Redis Cluster"):
                warnings_of(limited)


def test_a_redis_that_is_away_at_the_start_does_not_keep_the_worker_from_loading():
    with Celery(broker="redis://127.0.0.1:1", set_as_current=False) as app:
        services = DeviceServices(app, "host", read_config(app.conf))
        with pytest.raises(AssertionError, match="make_store was asked for"):
            services.start(NothingToLoad())
        services.stop(is_stuck=False)
