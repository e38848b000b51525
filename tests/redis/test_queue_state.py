"""`sdtpu queues` and `sdtpu purge`: what lies in Redis for the task, whichever list or set it lies in."""

from __future__ import annotations

import json

import pytest
from celery import Celery
from click.testing import CliRunner
from redis import Redis

from sdtpu_worker import BrokerUnavailable, ConfigurationError, generate
from sdtpu_worker.cli import sdtpu
from sdtpu_worker.client.queue_state import purge_queues, read_queues
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.scripts import CLAIM, DEFER
from sdtpu_worker.testing.processes import free_port
from tests.support.clients import client_app


@pytest.fixture(params=["", "shop:"])
def prefixed(request, redis_url, redis):
    """Give an app, also one with kombu's prefix before its keys."""
    with client_app(redis_url, broker_transport_options={"global_keyprefix": request.param}) as app:
        yield app


def claim(redis: Redis, prefix: str, queue_list: str, tag: str, due_in_s: float | None = None) -> None:
    """Hold a message as a worker does, or defer it."""
    keys = Keys(prefix)
    redis.eval(CLAIM, 3, keys.held, keys.leases, queue_list, tag, 30, 10**6, 100, "t")
    if due_in_s is not None:
        due_at = redis.time()[0] + due_in_s
        assert redis.eval(DEFER, 3, keys.held, keys.leases, keys.delayed, tag, due_at) == 1


def fill(app: Celery, redis: Redis) -> str:
    """Have six jobs: three wait, one is held and two are deferred; and a message of another queue of each kind."""
    prefix = app.conf.broker_transport_options["global_keyprefix"]
    generate.delay("held")
    claim(redis, prefix, f"{prefix}sdtpu\x06\x166", "held-tag")
    for number in range(2):
        generate.apply_async(("deferred",), {"tenant": "a"})
        claim(redis, prefix, f"{prefix}sdtpu.t10\x06\x166", f"deferred-{number}", due_in_s=1000)
    generate.delay("waits")
    generate.apply_async(("waits",), priority=0)
    generate.apply_async(("waits",), {"tenant": "a"}, priority=9)
    app.send_task("shop.mail", queue="mail")
    app.send_task("shop.mail", queue="mail")
    claim(redis, prefix, f"{prefix}mail", "mail-tag", due_in_s=1000)
    return prefix


def test_waiting_held_and_deferred_jobs_are_counted_in_all_lists(prefixed, redis):
    """`LLEN sdtpu` read 0 while jobs waited: the default priority has a list of its own."""
    fill(prefixed, redis)
    states = {state.queue: state for state in read_queues(prefixed)}
    assert states["sdtpu"].waiting == {0: 1, 3: 0, 6: 1, 9: 0}
    assert (states["sdtpu"].held, states["sdtpu"].deferred, states["sdtpu"].load) == (1, 0, 3)
    assert states["sdtpu.t10"].waiting == {0: 0, 3: 0, 6: 0, 9: 1}
    assert (states["sdtpu.t10"].held, states["sdtpu.t10"].deferred) == (0, 2)
    assert sum(state.load + state.deferred for state in states.values()) == 6


def test_purge_deletes_what_waits_and_is_deferred_and_nothing_else(prefixed, redis):
    """`celery purge` sees neither the tenants' queues nor deferred jobs."""
    prefix = fill(prefixed, redis)
    assert purge_queues(prefixed) == 5
    (held,) = [state for state in read_queues(prefixed) if state.load or state.deferred]
    assert (held.queue, held.load, held.deferred) == ("sdtpu", 1, 0)
    assert redis.llen(f"{prefix}mail") == 1
    assert redis.zrange(Keys(prefix).delayed, 0, -1) == [b"mail-tag"]
    assert set(redis.hkeys(Keys(prefix).held)) == {b"held-tag", b"mail-tag"}
    assert purge_queues(prefixed) == 0


@pytest.fixture
def project(tmp_path, monkeypatch, app, redis_url, redis):
    """Give the module of an app as a project has it, with a queue of its own for the task."""
    (tmp_path / "project_of_queues.py").write_text(
        "from celery import Celery\nfrom sdtpu_worker import install\n"
        f"app = install(Celery('project', broker={redis_url!r}, set_as_current=False))\n"
        "app.conf.sdtpu_tick_s = 0.2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "project_of_queues"


def test_the_commands_print_what_an_operator_and_an_autoscaler_read(project, app):
    generate.delay("a fox")
    run = CliRunner().invoke
    shown = run(sdtpu, ["queues", "-A", project])
    assert "sdtpu: 1 waiting (priority 6: 1), 0 held, 0 deferred\n" in shown.output, shown.output
    assert "all 17 queues: 1 waiting + 0 held = 1, 0 deferred" in shown.output
    state = json.loads(run(sdtpu, ["queues", "-A", project, "--json"]).output)
    assert (state["waiting"], state["held"], state["load"]) == (1, 0, 1)
    assert state["queues"]["sdtpu"]["waiting"] == {"0": 0, "3": 0, "6": 1, "9": 0}
    assert run(sdtpu, ["purge", "-A", project], input="n\n").exit_code == 1
    assert "1 jobs deleted" in run(sdtpu, ["purge", "-A", project, "--force"]).output
    refused = run(sdtpu, ["queues", "-A", "no_such_module"])
    assert refused.exit_code == 1
    assert "--app must name a module with a Celery app, got 'no_such_module'" in refused.output


def test_the_settings_in_force_are_listed_with_who_set_them(project, monkeypatch):
    """`sdtpu settings` showed defaults alone."""
    monkeypatch.setenv("SDTPU_IMAGE_STORE", "redis://me:hunter2@h/0")
    output = CliRunner().invoke(sdtpu, ["settings", "-A", project]).output
    assert "Now 0.2, from the app's configuration." in output
    assert "Now 'redis://me:**@h/0', from SDTPU_IMAGE_STORE." in output
    assert output.count("    Now ") == 2


def test_another_broker_and_a_redis_that_is_away_are_clear_errors():
    with client_app("memory://", "cache+memory://") as app, pytest.raises(ConfigurationError, match="broker is Redis"):
        read_queues(app)
    with (
        client_app(f"redis://:secret@127.0.0.1:{free_port()}/0", "cache+memory://") as app,
        pytest.raises(BrokerUnavailable, match="Redis cannot be read") as caught,
    ):
        read_queues(app)
    assert "secret" not in str(caught.value)
