"""A real Sentinel cluster for fault tests, on loopback."""

from __future__ import annotations

import contextlib
from typing import Any

import redis
from redis.exceptions import RedisError
from redis.sentinel import Sentinel

from sdtpu_worker.testing.processes import StartFailed
from tests.chaos.servers import Options, RedisServer
from tests.support.waiting import wait_until


class SentinelCluster:
    """A master, a replica and three sentinels with a quorum of two.

    Args:
        password: of the Redis servers; "" for none.
        sentinel_password: of the sentinels.
        down_after_ms: silence after which a sentinel takes a server for dead.
    """

    master_name = "sdtpu-master"

    def __init__(self, password: str = "", sentinel_password: str = "", down_after_ms: int = 1000) -> None:
        self.password, self.sentinel_password, self._down_after_ms = password, sentinel_password, down_after_ms
        self._stack = contextlib.ExitStack()
        self._killed: RedisServer | None = None

    def __enter__(self) -> SentinelCluster:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        secret = {"requirepass": self.password, "masterauth": self.password} if self.password else {}
        common: dict[str, str | list[str]] = {"repl-diskless-sync": "yes", "repl-diskless-sync-delay": "0", **secret}
        first = self._stack.enter_context(RedisServer(common))
        second = self._stack.enter_context(RedisServer({**common, "replicaof": f"127.0.0.1 {first.port}"}))
        self.servers = (first, second)
        replica = self._stack.enter_context(contextlib.closing(second.client()))
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica to follow")

        directives = [
            f"monitor {self.master_name} 127.0.0.1 {first.port} 2",
            f"down-after-milliseconds {self.master_name} {self._down_after_ms}",
            f"failover-timeout {self.master_name} 6000",
        ]
        if self.password:
            directives.append(f"auth-pass {self.master_name} {self.password}")
        own: dict[str, str | list[str]] = {"sentinel": directives}
        if self.sentinel_password:
            own["requirepass"] = self.sentinel_password
            directives.append(f"sentinel-pass {self.sentinel_password}")
        self.sentinels = [self._stack.enter_context(_sentinel(own)) for _ in range(3)]
        self._asked = [
            self._stack.enter_context(contextlib.closing(server.client(decode_responses=True)))
            for server in self.sentinels
        ]
        wait_until(lambda: all(map(self._knows_all, self._asked)), "the sentinels to know one another")

    def _knows_all(self, sentinel: Any) -> bool:
        (seen,) = sentinel.sentinel_masters().values()
        return seen["num-other-sentinels"] == 2 and seen["num-slaves"] == 1 and seen["is_master"]

    @property
    def broker_url(self) -> str:
        """The URL in Celery's form; it goes with `transport_options`."""
        login = f":{self.password}@" if self.password else ""
        return ";".join(f"sentinel://{login}127.0.0.1:{server.port}/0" for server in self.sentinels)

    @property
    def transport_options(self) -> dict[str, Any]:
        """What `broker_transport_options` and `result_backend_transport_options` need."""
        secret = {"sentinel_kwargs": {"password": self.sentinel_password}} if self.sentinel_password else {}
        return {"master_name": self.master_name, **secret}

    @property
    def master(self) -> RedisServer:
        """The server that the first sentinel that answers takes for the master."""
        for sentinel in self._asked:
            with contextlib.suppress(RedisError):
                address: Any = sentinel.sentinel_get_master_addr_by_name(self.master_name)
                port = int(address[1])
                return next(server for server in self.servers if server.port == port)
        raise StartFailed("no sentinel answers")

    def client(self, **options: Any) -> redis.Redis:
        """Return a client of whichever server is the master; close it."""
        addresses = [("127.0.0.1", server.port) for server in self.sentinels]
        secret = {"password": self.sentinel_password} if self.sentinel_password else {}
        sentinel = Sentinel(addresses, sentinel_kwargs={"socket_timeout": 10, **secret})
        return sentinel.master_for(
            self.master_name, **{"password": self.password or None, "socket_timeout": 10, "retry": None, **options}
        )

    def kill_master(self) -> RedisServer:
        """End the master with SIGKILL; return it: after `start()` the sentinels make it a replica, within some 10 s."""
        self._killed = self.master
        self._killed.kill()
        return self._killed

    def wait_for_failover(self, timeout_s: float = 60) -> RedisServer:
        """Wait until every sentinel names the other server, and that one is a master; return it."""
        (heir,) = (server for server in self.servers if server is not self._killed)
        with contextlib.closing(heir.client()) as client:
            wait_until(lambda: client.role()[0] in ("master", b"master"), "the replica's promotion", timeout_s)
        for sentinel in self._asked:
            wait_until(
                lambda asked=sentinel: int(asked.sentinel_get_master_addr_by_name(self.master_name)[1]) == heir.port,
                "a sentinel to name the new master",
                timeout_s,
            )
        return heir


def _sentinel(options: Options) -> RedisServer:
    return RedisServer({"appendonly": "no", **options}, mode=("--sentinel",))
