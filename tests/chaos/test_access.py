"""Ways to reach a broker: users with few rights, TLS, a key prefix, a database, a Unix socket, no Redis at all.

    pytest -s tests/chaos/test_access.py -n 0

In each way through Redis a worker is killed with jobs in hand, and another one does them when their lease ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from redis.exceptions import NoPermissionError

from sdtpu_worker import generate
from sdtpu_worker.operations.health import WorkerHealth
from sdtpu_worker.operations.health_http import ask_health
from sdtpu_worker.testing.processes import free_port
from tests.chaos.fleet import Fleet, Ledger
from tests.chaos.proxies import FlakyProxy, TlsProxy
from tests.chaos.servers import RedisServer
from tests.support.clients import client_app
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

LEASE_S = 2
WORKER = {"SDTPU_CPU_DEVICES": "2", "SDTPU_FAKE_STEP_MS": "10", "SDTPU_LEASE_S": str(LEASE_S)}

OPTIONAL = {
    *itertools.product(("sdtpu-client", "sdtpu-worker"), ("command",), ("client", "client|setinfo")),
    ("sdtpu-worker", "command", "info"),
}
"""What may be refused: drivers that introduce themselves, as Redis 6 or 7 calls it, and what the warnings need."""


UNPREFIXED = ("~sdtpu:image:", "&__redis__:")
"""What SECURITY.md says has no prefix where keys and channels have one."""


def documented_rules(user: str, prefix: str = "") -> list[str]:
    """Return the rules that SECURITY.md gives a user."""
    text = (ROOT / "SECURITY.md").read_text()
    found = re.search(rf"^    ACL SETUSER {user} (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert found
    rules = [
        f"{rule[0]}{prefix}{rule[1:]}" if rule[0] in "~&" and not rule.startswith(UNPREFIXED) else rule
        for rule in found[1].split()
    ]
    if prefix and user == "sdtpu-worker":
        rules.append("~sdtpu:image:*")
    return rules


def kill_and_take_over(
    fleet: Fleet, admin: redis.Redis, prefix: str = "", operator: Celery | None = None
) -> tuple[Ledger, float]:
    """Kill a worker that has all jobs in hand; return when another one, started then, has done them.

    `operator` is the app of somebody who may use remote control, if the client may not.
    """
    first = fleet.start("first", SDTPU_FAKE_STEP_MS="200")  # it has them all before the first of them is done
    ledger = Ledger()
    ledger.add(1, 5)
    ledger.wait(60)
    for seed, priority in enumerate((9, 6, 0)):
        ledger.add(seed, 100, priority=priority)
    of_a_tenant = generate.apply_async(("x",), {"seed": 7, "num_inference_steps": 100, "tenant": "blue"})
    ledger.jobs[of_a_tenant.id] = of_a_tenant, 7, 100
    wait_until(lambda: admin.hlen(f"{prefix}sdtpu:unacked") == 4, "all jobs to be taken")
    first.kill()
    begin = time.monotonic()
    second = fleet.launch("second", SDTPU_FAKE_STEP_MS="20")
    ledger.wait(90)
    took_s = time.monotonic() - begin
    unwanted = generate.apply_async(("x",), {"num_inference_steps": 1000, "seed": 1}, priority=9)
    wait_until(lambda: admin.hlen(f"{prefix}sdtpu:unacked") == 1, "the job to be taken")
    wait_until(lambda: admin.hexists(f"{prefix}sdtpu:load:sdtpu", "second@chaos"), "the worker to report its load")
    (operator or unwanted.app).control.revoke(unwanted.id, terminate=True)
    wait_until(lambda: unwanted.state == "REVOKED", "the job to end")
    assert not ledger.errors
    assert not ledger.wrong_pictures()
    assert second.stop() == 0
    assert "messages redelivered: " in second.text()
    return ledger, took_s


@pytest.mark.parametrize("prefix", ["", "shop:"])
def test_users_with_least_rights_over_tls(tmp_path: Path, prefix: str):
    users = ["default off", "admin on >root ~* &* +@all"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer({"user": users}, login="admin:root"))
        admin = stack.enter_context(contextlib.closing(server.client(decode_responses=True)))
        for user in ("sdtpu-client", "sdtpu-worker"):
            admin.execute_command("ACL", "SETUSER", user, *documented_rules(user, prefix))
        proxy = stack.enter_context((TlsProxy if shutil.which("openssl") else FlakyProxy)(server.url))
        as_client = proxy.url.replace("admin:root", "sdtpu-client:CLIENT_PASSWORD")
        as_worker = proxy.url.replace("admin:root", "sdtpu-worker:WORKER_PASSWORD")
        options = {"global_keyprefix": prefix}
        conf: dict[str, Any] = {"broker_transport_options": options, "result_backend_transport_options": options}
        stack.enter_context(client_app(as_client, sdtpu_max_queue=1000, **conf))
        settings = {**WORKER, "SDTPU_PROGRESS_S": "0.1", "SDTPU_FAKE_CONF": json.dumps(conf)}
        fleet = stack.enter_context(Fleet(as_worker, tmp_path, **settings))
        admin.acl_log_reset()
        operator = stack.enter_context(Celery(broker=server.url, backend=server.url, set_as_current=False))
        operator.conf.update(conf)
        ledger, took_s = kill_and_take_over(fleet, admin, prefix, operator)
        refused = {(entry["username"], entry["reason"], entry["object"]) for entry in admin.acl_log()}
        assert refused <= OPTIONAL, refused - OPTIONAL

        stranger = stack.enter_context(contextlib.closing(redis.Redis.from_url(as_client)))
        task_id = next(iter(ledger.jobs))
        forbidden: list[tuple[Any, ...]] = [
            ("RPOP", "sdtpu"),
            ("LRANGE", "sdtpu", 0, -1),
            ("HGETALL", "sdtpu:unacked"),
            ("GET", f"sdtpu:snap:{task_id}"),
            ("SET", f"celery-task-meta-{task_id}", "{}"),
            ("SET", f"sdtpu:image:{task_id}", b""),
            ("DEL", f"sdtpu:image:{task_id}"),
            ("PUBLISH", "other", "x"),
            ("EVAL", "return 1", 0),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
        ]
        for command in forbidden:
            with pytest.raises(NoPermissionError):
                stranger.execute_command(*command)
        assert not any("does not say when jobs arrive" in worker.text() for worker in fleet.workers)
        assert not any("PASSWORD" in worker.text() for worker in fleet.workers)
        print(
            f"\nusers of SECURITY.md, {proxy.url.partition(':')[0]}: {len(ledger.jobs)} jobs done, nothing that"
            f" either needs was refused, {len(forbidden)} things that a client must not do were; taken over"
            f" {took_s:.1f} s after SIGKILL"
        )


def test_a_key_prefix_a_database_a_socket_priorities_and_several_queues(tmp_path: Path):
    options = {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru", "appendonly": "no"}
    socket = tmp_path / "redis.sock"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer({**options, "unixsocket": str(socket)}))
        admin = stack.enter_context(
            contextlib.closing(redis.Redis(port=server.port, db=3, socket_timeout=10, decode_responses=True))
        )
        url = f"redis+socket://{socket}?virtual_host=3"
        prefixed = {"global_keyprefix": "shop:"}
        conf: dict[str, Any] = {"broker_transport_options": prefixed, "result_backend_transport_options": prefixed}
        stack.enter_context(client_app(url, **conf))
        fleet = stack.enter_context(Fleet(url, tmp_path, **WORKER, SDTPU_FAKE_CONF=json.dumps(conf)))
        _, took_s = kill_and_take_over(fleet, admin, "shop:")
        print(f"\nsocket, database, prefix, queues, priorities: taken over {took_s:.1f} s after SIGKILL")
        keys: Any = admin.keys("*")
        assert [key for key in keys if not key.startswith(("shop:", "sdtpu:image:"))] == []
        text = fleet.workers[0].text()
        assert "maxmemory-policy is allkeys-lru" in text
        assert "Redis writes nothing to its disk" in text


def test_a_broker_that_is_not_redis(tmp_path: Path):
    for name in ("queue", "processed", "results", "images"):
        (tmp_path / name).mkdir()
    folders = {f"data_folder_{way}": str(tmp_path / "queue") for way in ("in", "out")}
    folders["control_folder"] = str(tmp_path / "control")
    store = f"file://{tmp_path}/images"
    transport = {**folders, "store_processed": False}
    conf = {"broker_transport_options": transport}
    with contextlib.ExitStack() as stack:
        app = stack.enter_context(client_app("filesystem://", sdtpu_image_store=store))
        app.conf.update(conf, result_backend=f"file://{tmp_path}/results")
        fleet = stack.enter_context(
            Fleet(
                "filesystem://",
                tmp_path,
                CELERY_RESULT_BACKEND=f"file://{tmp_path}/results",
                SDTPU_IMAGE_STORE=store,
                SDTPU_FAKE_CONF=json.dumps(conf),
                SDTPU_HEALTH_ADDRESS=f"127.0.0.1:{(port := free_port())}",
                **WORKER,
            )
        )
        worker, ledger = fleet.start("files"), Ledger()
        started = time.monotonic()
        for seed in range(10):
            ledger.add(seed, 10)
        ledger.wait(60)
        assert not ledger.errors
        assert not ledger.wrong_pictures()
        time.sleep(max(0.0, started + WorkerHealth.CONTACT_READY_S + 1 - time.monotonic()))
        for path in ("/livez", "/readyz"):
            wait_until(lambda path=path: ask_health(("127.0.0.1", port), path)[0], f"{path} to be well")
        assert worker.stop() == 0
        assert "the broker is not Redis: leases, hand-over, delivery limits and message checks are off" in worker.text()
        print(f"\nfilesystem://: {len(ledger.results)} jobs done")
