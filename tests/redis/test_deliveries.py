"""What a worker holds, on a real Redis: every move is atomic, and nothing is in two places or in none."""

from __future__ import annotations

import json
import threading
import time

import pytest
import redis

from sdtpu_worker.delivery.deliveries import MAX_DEAD_LETTERS, Deliveries
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.scripts import CLAIM
from sdtpu_worker.testing.processes import private_redis
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def server():
    with private_redis() as url, redis.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def client(server):
    server.flushall()
    return server


@pytest.fixture
def make(client):
    made = []

    def deliveries(lease_s: float = 30.0, host: str = "host", prefix: str = "") -> Deliveries:
        url = client.connection_pool.connection_kwargs
        made.append(Deliveries(lambda: redis.Redis(port=url["port"], socket_timeout=5), Keys(prefix), lease_s, host))
        return made[-1]

    yield deliveries
    for each in made:
        each.connection.close()


def claim(deliveries: Deliveries, tag: str, *lists: str, max_bytes: int = 1000):
    keys = [deliveries.keys.held, deliveries.keys.leases, *lists]
    reply = deliveries.client.eval(
        CLAIM, len(keys), *keys, tag, deliveries.lease_s, max_bytes, 10, "t" * (len(keys) - 2)
    )
    if reply is not None:
        deliveries.hold(tag, f"task-{tag}")
    return reply


def take(client, deliveries: Deliveries, tag: str, task_id: str) -> None:
    """Have a message of a task, claimed from a queue of its own."""
    client.lpush("others", b"{}")
    assert claim(deliveries, tag, "others")
    deliveries.hold(tag, task_id)


def expire(client, deliveries: Deliveries, *tags: str) -> None:
    """Let leases be over, without waiting for it."""
    assert client.zadd(deliveries.keys.leases, dict.fromkeys(tags, 1.0), xx=True, ch=True) == len(tags)


def places(client, deliveries: Deliveries, *lists: str) -> tuple[list[bytes], int, int]:
    """Return the waiting messages, and how many are held and leased."""
    waiting = [message for name in lists for message in client.lrange(name, 0, -1)]
    return waiting, client.hlen(deliveries.keys.held), client.zcard(deliveries.keys.leases)


def test_a_claim_takes_the_first_message_of_the_first_list_that_has_one(client, make):
    ours = make()
    for message in (b"first", b"second"):
        client.lpush("b", message)
    client.lpush("c", b"third")
    assert claim(ours, "1", "a", "b", "c") == [1, b"first"]
    assert claim(ours, "2", "a", "b", "c") == [1, b"second"]
    assert claim(ours, "3", "a", "b", "c") == [2, b"third"]
    assert claim(ours, "4", "a", "b", "c") is None
    assert places(client, ours, "a", "b", "c") == ([], 3, 3)
    assert len(ours) == 3


def test_a_message_that_is_too_large_is_claimed_but_not_read_whole(client, make):
    ours = make()
    client.lpush("q", b"a" * 500 + b"b" * 501)
    assert claim(ours, "1", "q") == [0, 1001, b"a" * 10, b"b" * 10]
    assert places(client, ours, "q") == ([], 1, 1)
    ours.requeue("1")
    assert client.lrange("q", 0, -1) == [b" " + b"a" * 500 + b"b" * 501]


def test_an_acknowledged_message_is_nowhere_and_its_jobs_facts_are_gone(client, make):
    ours = make()
    client.lpush("q", b"{}")
    claim(ours, "1", "q")
    ours.record_starts(["task-1"])
    ours.save_snapshot("task-1", b"state")
    ours.acknowledge("1")
    assert places(client, ours, "q") == ([], 0, 0)
    assert client.keys("sdtpu:*") == []
    ours.acknowledge("1")
    ours.requeue("1")
    assert places(client, ours, "q") == ([], 0, 0), "what is not held any more is left alone"


def test_a_requeued_message_is_at_the_front_and_bears_one_mark_however_often(client, make):
    ours = make()
    client.lpush("q", b"first\nline", b"second")
    for tag in "123":
        assert claim(ours, tag, "q")[1].strip() == b"first\nline"
        ours.requeue(tag)
    assert client.lrange("q", 0, -1) == [b"second", b" first\nline"]


@pytest.mark.parametrize("starts", [0, 1])
def test_a_requeued_job_keeps_its_state_and_its_earlier_crashes_but_does_not_count_ours(client, make, starts):
    for host in ("other", "host"):  # which died, and was started again under its name
        dead = make(host=host)
        take(client, dead, f"of {host}", "task-1")
        dead.record_starts(["task-1"])
    ours = make()
    client.lpush("q", b"{}")
    claim(ours, "1", "q")
    for _ in range(starts):
        ours.record_starts(["task-1"])
    ours.save_snapshot("task-1", b"state")
    ours.requeue("1")
    facts = ours.job_facts("task-1")
    assert (facts.died_on, facts.snapshot) == (["other", "host"], b"state")


def test_a_worker_whose_job_is_done_elsewhere_leaves_no_snapshot_behind(client, make):
    late, other = make(), make()
    client.lpush("q", b"{}")
    claim(late, "1", "q")
    expire(client, late, "1")
    assert other.sweep() == 1
    claim(other, "2", "q")
    other.acknowledge("2")
    late.save_snapshot("task-1", b"state")
    late.requeue("1")
    assert client.keys("sdtpu:*") == []


def test_a_requeued_suspect_keeps_its_count_of_crashes_also_when_redis_is_told_later(client, make, monkeypatch):
    ours = make()
    client.lpush("q", b"{}", b"{}")
    for tag in ("1", "2"):
        claim(ours, tag, "q")
        ours.record_starts([f"task-{tag}"])
        ours.mark_suspect(tag)
    ours.requeue("1")
    with monkeypatch.context() as patch:
        patch.setattr(ours.connection, "run", lambda *_: 1 / 0)
        ours.requeue("2")
    ours.flush()
    assert places(client, ours, "q") == ([b" {}", b" {}"], 0, 0)
    assert [ours.job_facts(f"task-{tag}").died_on for tag in "12"] == [["host"], ["host"]]


def test_requeueing_a_message_that_another_worker_holds_keeps_that_workers_count_of_crashes(client, make):
    hung, alive = make(host="hung"), make(host="alive")
    client.lpush("q", b"{}")
    claim(hung, "1", "q")
    hung.record_starts(["task-1"])
    expire(client, hung, "1")
    assert alive.sweep() == 1
    assert claim(alive, "2", "q")
    alive.hold("2", "task-1")
    alive.record_starts(["task-1"])
    hung.requeue("1")
    hung.record_starts(["task-1"])
    assert alive.job_facts("task-1").died_on == ["hung", "alive"]
    assert places(client, alive, "q") == ([], 1, 1)


def test_a_job_that_starts_alone_clears_those_that_have_left_the_devices(client, make):
    ours, other = make(host="ours"), make(host="other")
    client.lpush("q", b"{}", b"{}", b"{}")
    for tag in ("1", "2", "3"):
        claim(ours, tag, "q")
    for tag, task_id in (("8", "task-1"), ("9", "task-9")):
        take(client, other, tag, task_id)
    other.record_starts(["task-1", "task-9"])
    ours.record_starts(["task-1", "task-2"])
    ours.record_starts(["task-3"], alone=True)
    facts = {task_id: ours.job_facts(task_id).died_on for task_id in ("task-1", "task-2", "task-3", "task-9")}
    assert facts == {"task-1": ["other"], "task-2": [], "task-3": ["ours"], "task-9": ["other"]}


def test_a_job_that_starts_alone_forgives_no_crash_of_the_worker_that_had_the_same_name_before(client, make):
    dead, ours = make(host="name"), make(host="name")
    for who, worker in enumerate((dead, ours)):
        for job in "12":
            take(client, worker, f"{who}-{job}", f"task-{job}")
    dead.record_starts(["task-1", "task-2"])
    ours.record_starts(["task-1"], alone=True)
    assert [ours.job_facts(f"task-{tag}").died_on for tag in "12"] == [["name", "name"], ["name"]]
    ours.record_starts(["task-2"], alone=True)
    assert [ours.job_facts(f"task-{tag}").died_on for tag in "12"] == [["name"], ["name", "name"]]


def test_a_state_of_any_size_and_starts_of_any_number_are_not_read_whole(client, make, monkeypatch, caplog):
    monkeypatch.setattr("sdtpu_worker.delivery.job_facts.MAX_SNAPSHOT_BYTES", 100)
    monkeypatch.setattr("sdtpu_worker.delivery.job_facts._MAX_STARTS", 3)
    ours = make()
    assert ours.job_facts("job") == JobFacts([], None)
    take(client, ours, "1", "job")
    ours.save_snapshot("job", b"x" * 100)
    assert ours.job_facts("job").snapshot == b"x" * 100
    client.set("sdtpu:snap:job", b"x" * 10_000)
    client.rpush("sdtpu:starts:job", *(f"{i:04}" + "y" * 10_000 for i in range(50)))
    facts = ours.job_facts("job")
    assert facts.snapshot is None
    assert "has more than 100 bytes and is not used" in caplog.text
    assert [(name[:4], len(name)) for name in facts.died_on] == [("0000", 512), ("0001", 512), ("0002", 512)]


def test_keys_of_another_type_in_the_place_of_a_jobs_facts_are_none(client, make):
    """The job went back to its queue again and again."""
    client.set("sdtpu:starts:job", "x")
    client.rpush("sdtpu:snap:job", "x")
    assert make().job_facts("job") == JobFacts([], None)


def test_starts_name_their_hosts_and_expire(client, make):
    for i, host in enumerate(("a", "b", "a")):
        theirs = make(host=host)
        take(client, theirs, f"{i}-1", "job")
        take(client, theirs, f"{i}-2", "other")
        for _ in range(2):
            theirs.record_starts(["job", "other"])
    assert make().job_facts("job").died_on == ["a", "b", "a"], "each died once"
    assert 0 < client.ttl("sdtpu:starts:job") <= 24 * 3600


def test_a_start_that_is_written_down_after_the_job_has_ended_leaves_nothing(client, make):
    ours = make()
    client.lpush("q", b"{}")
    claim(ours, "1", "q")
    ours.acknowledge("1")
    ours.record_starts(["task-1"])
    assert client.keys("*") == []


def test_only_a_message_whose_lease_has_expired_is_swept_and_its_crash_count_stays(client, make):
    dead, alive = make(host="dead"), make()
    client.lpush("q", b"lost", b"kept")
    claim(dead, "1", "q")
    claim(alive, "2", "q")
    dead.record_starts(["task-1"])
    assert alive.sweep() == 0
    expire(client, dead, "1")
    assert alive.sweep() == 1
    assert places(client, alive, "q") == ([b" lost"], 1, 1)
    assert alive.job_facts("task-1").died_on == ["dead"]
    assert dead.renew() == ["1"], "it hears that the message is not its own any more"
    dead.acknowledge("1")
    assert places(client, alive, "q") == ([b" lost"], 1, 1), "and cannot take it away from the next"


def test_renewing_makes_a_short_lease_last(client, make):
    ours, other = make(lease_s=30), make()
    client.lpush("q", b"long")
    claim(ours, "1", "q")
    expire(client, ours, "1")
    assert ours.renew() == []
    assert other.sweep() == 0
    assert 25 < client.zscore(ours.keys.leases, "1") - redis_time(client) <= 30


def test_a_job_that_ends_while_its_lease_is_renewed_is_not_said_to_be_redelivered(client, make, monkeypatch):
    ours = make()
    client.lpush("q", b"{}")
    claim(ours, "1", "q")
    evaluate = ours.connection.run

    def end_first(*args):
        monkeypatch.undo()
        ours.acknowledge("1")
        return evaluate(*args)

    monkeypatch.setattr(ours.connection, "run", end_first)
    assert ours.renew() == []


def test_a_move_that_cannot_be_sent_to_redis_is_sent_by_the_next_flush(client, make, monkeypatch):
    ours = make()
    client.lpush("q", b"done", b"back")
    claim(ours, "1", "q")
    claim(ours, "2", "q")
    working, away = ours.client, redis.Redis(port=1, retry=None)
    freed = []
    ours.on_free = lambda: freed.append(True)
    ours.connection._client = away
    ours.acknowledge("1")
    ours.requeue("2")
    assert (len(ours), len(freed)) == (0, 2)
    with pytest.raises(redis.exceptions.ConnectionError):
        ours.flush()
    ours.connection._client = working
    assert places(client, ours, "q") == ([], 2, 2)
    ours.flush()
    assert places(client, ours, "q") == ([b" back"], 0, 0)


def test_waiting_messages_are_requeued_when_a_connection_ends_and_running_ones_stay(client, make):
    ours = make()
    client.lpush("q", b"waits", b"runs")
    claim(ours, "1", "q")
    claim(ours, "2", "q")
    ours.mark_running("2")
    ours.requeue_waiting()
    assert places(client, ours, "q") == ([], 2, 2), "Redis may be away: it is not asked now"
    ours.flush()
    assert places(client, ours, "q") == ([b" waits"], 1, 1)
    ours.requeue_all()
    ours.flush()
    assert client.llen("q") == 2
    assert len(ours) == 0


def test_a_message_bears_a_mark_for_every_holder_that_died(client, make):
    dying, alive = make(), make()
    client.lpush("q", b"{}")
    for tag in "123":
        claim(dying, tag, "q")
        expire(client, dying, tag)
        assert alive.sweep() == 1
    claim(alive, "4", "q")
    alive.requeue("4")
    assert client.lrange("q", 0, -1) == [b"   {}"]


def test_a_released_message_is_redelivered_when_its_lease_expires(client, make):
    ours = make()
    client.lpush("q", b"stuck")
    claim(ours, "1", "q")
    ours.release("1")
    assert (len(ours), ours.renew()) == (0, [])
    expire(client, ours, "1")
    assert make().sweep() == 1
    assert client.lrange("q", 0, -1) == [b" stuck"]


def test_dead_letters_are_counted_by_kind_and_the_last_ones_kept(client, make):
    ours = make()
    for i in range(5):
        client.lpush("q", b"\xff bad %d" % i)
        _, message = claim(ours, str(i), "q")
        ours.dead_letter(str(i), "InvalidMessage", "q", "it is no JSON", len(message), message)
    assert places(client, ours, "q")[1:] == (0, 0)
    assert client.hgetall("sdtpu:dead:counts") == {b"InvalidMessage": b"5"}
    letter = json.loads(client.lindex("sdtpu:dead", 0))
    assert (letter["queue"], letter["reason"], letter["bytes"]) == ("q", "it is no JSON", 7)
    assert letter["message"] == "\\xff bad 4"
    client.lpush("sdtpu:dead", *range(2 * MAX_DEAD_LETTERS))
    ours.dead_letter("x", "InvalidMessage", "q", "", 0, b"")
    assert client.llen("sdtpu:dead") == MAX_DEAD_LETTERS


def test_every_key_bears_the_prefix(client, make):
    ours = make(prefix="shop:")
    client.lpush("shop:q", b"{}", b"{}")
    claim(ours, "1", "shop:q")
    claim(ours, "2", "shop:q")
    ours.record_starts(["task-1"])
    ours.save_snapshot("task-1", b"state")
    ours.dead_letter("2", "kind", "q", "reason", 0, b"")
    assert ours.defer("1", time.time() + 60)
    assert all(key.startswith(b"shop:") for key in client.keys("*"))


def test_a_full_redis_still_gives_messages_keeps_their_leases_and_takes_them_back(client, make):
    ours, dead = make(), make(lease_s=0)
    client.lpush("q", b"one", b"two", b"three")
    claim(ours, "1", "q")
    client.config_set("maxmemory", 1)
    try:
        assert claim(ours, "2", "q")[1] == b"two"
        before = client.zscore(ours.keys.leases, "2")
        assert ours.renew() == []
        assert client.zscore(ours.keys.leases, "2") > before
        ours.acknowledge("1")
        ours.requeue("2")
        assert client.lrange("q", 0, -1) == [b"three", b" two"]
        claim(dead, "3", "q")
        assert ours.sweep() == 1
        assert client.lrange("q", 0, -1) == [b"three", b"  two"]
    finally:
        client.config_set("maxmemory", 0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_sweeps_only_after_a_whole_lease_of_unbroken_contact(client, make):
    dead, ours = make(), make(lease_s=30)
    client.lpush("q", b"lost")
    claim(dead, "1", "q")
    expire(client, dead, "1")
    clock = Clock()
    lease = Lease(ours, lambda: True, clock=clock)
    for seconds in (0, 15, 14):
        clock.now += seconds
        lease.pulse()
    working = ours.client
    ours.connection._client = redis.Redis(port=1, retry=None)
    clock.now += 2
    lease.pulse()
    ours.connection._client = working
    for seconds in (1, 15, 14):
        clock.now += seconds
        lease.pulse()
        assert client.llen("q") == 0, "contact was lost: everybody may renew first"
    clock.now += 11
    lease.pulse()
    assert client.lrange("q", 0, -1) == [b" lost"]


def test_a_hung_device_loses_its_leases_and_a_mended_one_renews_again(client, make, caplog):
    ours, other = make(lease_s=30), make()
    client.lpush("q", b"job")
    claim(ours, "1", "q")
    clock, well, contacts = Clock(), threading.Event(), []
    lease = Lease(ours, well.is_set, lambda: contacts.append(True), clock)
    lease.pulse()
    assert contacts, "Redis is there, whatever the devices do"
    expire(client, ours, "1")
    clock.now += 31
    lease.pulse()
    assert "no progress" in caplog.text
    assert other.sweep() == 1
    well.set()
    client.lpush("q", b"another")
    claim(ours, "2", "q")
    clock.now += 31
    lease.pulse()
    assert "other workers run them as well" in caplog.text


def test_a_lease_thread_starts_renews_and_stops(client, make):
    ours = make(lease_s=0.3)
    client.lpush("q", b"job")
    claim(ours, "1", "q")
    lease = Lease(ours, lambda: True)
    lease.start()
    for _ in range(2):
        lease_ends_at = client.zscore(ours.keys.leases, "1")
        wait_until(
            lambda before=lease_ends_at: client.zscore(ours.keys.leases, "1") > before, "the lease to be renewed"
        )
    lease.stop()
    assert "sdtpu-lease" not in {thread.name for thread in threading.enumerate()}


def redis_time(client) -> float:
    seconds, microseconds = client.time()
    return seconds + microseconds / 1e6


def test_a_deferred_message_is_held_by_nobody_and_is_at_the_front_of_its_queue_when_it_is_due(client, make):
    ours = make()
    client.lpush("q", b"later", b"soon", b"now")
    now = redis_time(client)
    for tag, due_at in (("later", now + 40), ("soon", now + 30), ("now", now - 1)):
        assert claim(ours, tag, "q")[1].decode() == tag
        assert ours.defer(tag, due_at) == (tag != "now")
    assert client.zrange("sdtpu:unacked_index", 0, -1) == [b"now"]
    assert client.zrange("sdtpu:delayed", 0, -1) == [b"soon", b"later"]
    client.lpush("q", b"another")
    assert 0 < ours.requeue_due() <= 30
    assert client.llen("q") == 1
    client.zadd("sdtpu:delayed", {"later": now - 1, "soon": now - 2}, xx=True)
    assert make().requeue_due() is None, "any worker brings it"
    assert client.lrange("q", 0, -1) == [b"another", b"later", b"soon"], "unmarked: nobody has had it"
    assert not client.exists("sdtpu:delayed")
    assert client.hkeys("sdtpu:unacked") == [b"now"]


def test_a_message_that_another_worker_holds_by_now_is_not_deferred(client, make):
    slow, other = make(), make()
    client.lpush("q", b"{}")
    claim(slow, "1", "q")
    expire(client, slow, "1")
    assert other.sweep() == 1
    assert not slow.defer("1", redis_time(client) + 60)
    assert not client.exists("sdtpu:delayed")


def test_many_messages_that_are_due_at_once_come_in_their_order(client, make):
    ours = make()
    now = redis_time(client)
    client.lpush("q", *(b"%d" % i for i in range(450)))
    for i in range(450):
        claim(ours, str(i), "q")
        assert ours.defer(str(i), now + 5 + i / 1000)
    client.zadd("sdtpu:delayed", {str(i): now - 5 + i / 1000 for i in range(450)})
    assert ours.requeue_due() == 0.0, "some are left for the next time"
    order = [client.rpop("q") for _ in range(200)]
    assert order == [b"%d" % i for i in range(200)]
    ours.requeue_due()
    assert ours.requeue_due() is None
    assert client.llen("q") == 250


def test_a_lease_thread_requeues_a_deferred_message_when_it_is_due(client, make):
    ours = make()
    client.lpush("q", b"{}")
    claim(ours, "1", "q")
    lease = Lease(ours, lambda: True)
    lease.start()
    due_at = redis_time(client) + 1.5
    assert ours.defer("1", due_at)
    wait_until(lambda: client.llen("q"), "the job to be put into its queue")
    late_s = redis_time(client) - due_at
    lease.stop()
    assert 0 <= late_s < 0.5


def test_a_server_that_became_a_replica_is_left_for_whoever_has_its_name_now(client, make):
    deliveries = make()
    before = deliveries.client.client_id()
    client.replicaof("127.0.0.1", 1)
    try:
        with pytest.raises(redis.ResponseError, match="READONLY"):
            deliveries.dead_letter("tag", "kind", "q", "reason", 1, b"x")
    finally:
        client.replicaof("NO", "ONE")
    assert deliveries.client.client_id() != before, "the next command has a new connection"


def test_a_move_that_redis_refuses_again_and_again_keeps_no_lease_from_being_renewed(client, make):
    ours = make(lease_s=30)
    for tag, name in (("stuck", "q"), ("running", "r")):
        client.lpush(name, b"job")
        claim(ours, tag, name)
    client.set("q", "of another type")
    ours.requeue("stuck")
    expire(client, ours, "running")
    Lease(ours, lambda: True).pulse()
    assert client.zscore(ours.keys.leases, "running") > redis_time(client)


def test_a_job_that_only_waits_for_another_one_is_held_and_takes_no_place(client, make):
    deliveries = make()
    for tag in ("1", "2", "3"):
        take(client, deliveries, tag, f"task-{tag}")
    deliveries.aside.add("task-2")
    assert (len(deliveries), deliveries.num_places) == (3, 2)
    deliveries.acknowledge("2")
    assert (len(deliveries), deliveries.num_places) == (2, 2)
    deliveries.aside.discard("task-2")
    assert deliveries.num_places == 2
