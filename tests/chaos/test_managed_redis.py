"""Redis as services rent it out: with commands missing, users who may do little, TLS, or as a cluster.

    pytest -s tests/chaos/test_managed_redis.py -n 0

The real services are not asked: a Redis is set up as their documentation says that theirs is.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdtpu_worker import generate
from sdtpu_worker.client.queue_figures import read_figures
from sdtpu_worker.errors import BrokerUnavailable
from tests.chaos.fleet import Fleet
from tests.chaos.proxies import FlakyProxy, TlsProxy
from tests.chaos.servers import RedisServer
from tests.chaos.test_access import WORKER, kill_and_take_over
from tests.support.clients import client_app
from tests.support.waiting import wait_until

WITHOUT = (
    "bgrewriteaof",
    "bgsave",
    "config",
    "debug",
    "migrate",
    "module",
    "monitor",
    "replicaof",
    "save",
    "slaveof",
    "sync",
)
"""What managed services take away; ElastiCache and Memorystore name these."""
NOBODY_DANGEROUS = "user app on >secret ~* &* +@all -@dangerous"
SERVICES = {
    "no CONFIG and its like": (WITHOUT, ""),
    "a user without dangerous commands": (WITHOUT, "app:secret"),
    "no CLIENT either": ((*WITHOUT, "client", "acl"), ""),
}

pytestmark = pytest.mark.timeout(180)


def options_of(commands: tuple[str, ...]) -> dict[str, str | list[str]]:
    """Return the directives of a Redis without these commands."""
    return {"rename-command": [f'{name} ""' for name in commands]}


@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_takes_over_in_a_redis_that_a_service_runs(tmp_path: Path, service: str) -> None:
    commands, login = SERVICES[service]
    options = options_of(commands) | ({"user": ["default on >root ~* &* +@all", NOBODY_DANGEROUS.removeprefix("user ")]}
                                      if login else {"requirepass": "root"})  # fmt: skip
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(options, login=":root"))
        admin = stack.enter_context(contextlib.closing(server.client(decode_responses=True)))
        proxy = stack.enter_context((TlsProxy if shutil.which("openssl") else FlakyProxy)(server.url))
        url = proxy.url.replace(":root@", f"{login or ':root'}@")
        app = stack.enter_context(client_app(url))
        fleet = stack.enter_context(Fleet(url, tmp_path, **WORKER))
        _, took_s = kill_and_take_over(fleet, admin)
        figures: dict[str, Any] = dict(read_figures(app))
        assert figures["sdtpu_requests_held"][("sdtpu",)] == 0
        assert bool(figures["sdtpu_redis_memory_bytes"]) == (not login)  # INFO is a dangerous command
        text = fleet.workers[0].text()
        polls = "does not say when jobs arrive" in text
        if not login:  # to Redis 6.2 all of CLIENT is dangerous, to Redis 7 a part
            assert polls == ("client" in commands)
        assert "secret" not in text
        assert "root@" not in text
        print(f"\n{service}, {url.partition(':')[0]}: taken over {took_s:.1f} s after SIGKILL")


@pytest.mark.parametrize("may_ask", [True, False])
def test_a_redis_cluster_is_refused_by_worker_and_client_in_a_line(tmp_path: Path, may_ask: bool) -> None:
    user = "app on >secret ~* &* +@all" + ("" if may_ask else " -@dangerous")
    options: dict[str, str | list[str]] = {"cluster-enabled": "yes", "user": ["default on >root ~* &* +@all", user]}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(options, login=":root"))
        with contextlib.closing(server.client()) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            wait_until(lambda: b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"), "the cluster to be up")
        url = server.url.replace(":root@", "app:secret@")
        worker = stack.enter_context(Fleet(url, tmp_path, **WORKER)).launch("refused")
        assert worker.process.wait(60) == 1
        (line,) = [line for line in worker.text().splitlines() if "belongs to a Redis Cluster" in line]
        assert "let broker_url name a server that is no cluster" in line
        stack.enter_context(client_app(url))
        with pytest.raises(BrokerUnavailable, match="Redis Cluster"):
            generate.delay("x")
