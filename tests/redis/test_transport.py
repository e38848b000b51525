"""kombu's transport, made safe, on a real Redis and a real event loop, without Celery's worker."""

from __future__ import annotations

import contextlib
import json
import select
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest
import redis
from celery import Celery
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import Hub, get_event_loop, set_event_loop
from kombu.exceptions import OperationalError

from sdtpu_worker.delivery import claim_schedule, transport, wake_up
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.keys import Keys
from sdtpu_worker.delivery.lease import Lease
from sdtpu_worker.delivery.qos import Intake
from sdtpu_worker.errors import DeliveryLimitExceeded
from sdtpu_worker.testing.processes import private_redis


@pytest.fixture(scope="module")
def url():
    with private_redis() as url:
        yield url


class Worker:
    """A consumer on kombu's event loop, with our transport; runs in the test's own thread."""

    def __init__(self, url: str, queues: tuple[str, ...] = ("q",), prefetch: int = 4, **options):
        self.client = redis.Redis.from_url(url)
        self.prefix = options.get("global_keyprefix", "")
        self.deliveries = Deliveries(lambda: redis.Redis.from_url(url), Keys(self.prefix), 30, "host")
        self.bad, self.got, self.well = [], [], True
        self.contacts, self.refusals = 0, []
        intake = Intake(
            self.deliveries, queues.__contains__, {"t"}, 10_000, 5, self.bad.append, lambda: self.well, self._on_reply
        )
        self.installed = contextlib.ExitStack()
        self.installed.enter_context(transport.installed(intake))
        self.hub = Hub()
        set_event_loop(self.hub)
        self.deliveries.on_free = lambda: self.hub.call_soon(lambda: None)
        self.url, self.queues, self.prefetch, self.options = url, queues, prefetch, options
        self.connect()

    def _on_reply(self, refusal: str | None) -> None:
        self.contacts += refusal is None
        self.refusals += [refusal] if refusal else []

    def connect(self) -> None:
        self.connection = Connection(self.url, transport_options=self.options)
        self.connection.connect()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.channel = self.connection.default_channel
        self.channel.basic_qos(0, self.prefetch, False)
        queues = [Queue(name) for name in self.queues]
        self.consumer = Consumer(self.channel, queues, on_message=self.got.append, accept=["json"])
        self.consumer.consume()
        self.hub.propagate_errors = self.connection.connection_errors
        self.loop = self.hub.create_loop()

    def run(self, condition, timeout_s: float = 5.0) -> bool:
        """Turn the event loop until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            next(self.loop)
        return True

    def run_for(self, seconds: float) -> None:
        self.run(lambda: False, seconds)

    def ids(self) -> list[str]:
        return [message.headers["id"] for message in self.got]

    def close(self) -> None:
        with contextlib.suppress(OperationalError, redis.ConnectionError):
            self.connection.close()
        self.installed.close()
        self.deliveries.connection.close()
        self.client.close()


@pytest.fixture
def make_worker(url):
    workers = []
    loop = get_event_loop()
    with redis.Redis.from_url(url) as client:
        client.flushall()

    def make(*args, **kwargs) -> Worker:
        workers.append(Worker(url, *args, **kwargs))
        return workers[-1]

    yield make
    for worker in reversed(workers):
        worker.close()
    set_event_loop(loop)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def send(url):
    """Give what an ordinary client sends with: stock kombu, made before ours is in place."""
    app = Celery("client", broker=url, set_as_current=False)
    app.conf.task_ignore_result = True
    producer = app.amqp.Producer(app.connection_for_write(), auto_declare=False)

    def send(task_id: str, queue: str = "q", **options) -> None:
        app.send_task("t", task_id=task_id, queue=queue, producer=producer, **options)

    yield send
    producer.connection.close()
    app.close()


@pytest.fixture
def publish_other(url):
    """Give what sends messages that are no tasks: stock kombu, made before ours is in place."""
    connection = Connection(url)
    producer = connection.Producer(auto_declare=False)
    producer.channel.client.ping()

    def publish(name: str, *payloads: Any) -> None:
        queue = Queue(name, Exchange("others", "direct"), routing_key=name)
        for payload in payloads:
            producer.publish(payload, exchange=queue.exchange, routing_key=name, declare=[queue])

    yield publish
    connection.close()


def test_a_message_is_held_until_it_is_acknowledged(make_worker, send):
    send("a")
    worker = make_worker()
    assert worker.run(lambda: worker.got)
    assert worker.ids() == ["a"]
    assert (worker.client.hlen("sdtpu:unacked"), worker.client.llen("q")) == (1, 0)
    assert not worker.client.exists("unacked", "unacked_index"), "other apps' own keys are not touched"
    worker.got[0].ack()
    assert worker.client.keys("sdtpu:*") == []
    assert worker.contacts


def test_a_worker_tries_to_reach_its_broker_every_three_seconds_at_least(monkeypatch):
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda _: None)
    pauses_s = []
    connection = transport.EagerConnection("redis://127.0.0.1:1")
    with pytest.raises(OperationalError):
        connection.ensure_connection(lambda exc, pause_s: pauses_s.append(pause_s), 12)
    assert pauses_s == [0.5, 1, 1.5, 2, 2.5, *[3] * 7]


def test_priorities_go_first_and_queues_take_turns(make_worker, send):
    for i in range(4):
        send(f"low-{i}", priority=9)
    for i in range(2):
        send(f"other-{i}", queue="other", priority=9)
    send("high", priority=0)
    worker = make_worker(("q", "other"), 10)
    assert worker.run(lambda: len(worker.got) == 7)
    assert worker.ids()[0] == "high"
    assert {"other-0", "other-1"} <= set(worker.ids()[1:5]), worker.ids()


def test_no_more_than_the_prefetch_limit_is_held_also_over_a_reconnect(make_worker, send):
    for i in range(12):
        send(str(i))
    worker = make_worker()
    worker.run(lambda: len(worker.got) == 4)
    worker.run_for(0.2)
    assert len(worker.got) == 4
    for message in worker.got[:3]:
        worker.deliveries.mark_running(message.delivery_tag)
    worker.connection.close()
    worker.deliveries.flush()
    assert worker.client.hlen("sdtpu:unacked") == 3, "what waited went back, what runs stays"
    worker.connect()
    assert worker.run(lambda: len(worker.got) == 5)
    worker.run_for(0.2)
    assert worker.ids() == ["0", "1", "2", "3", "3"]
    assert worker.got[-1].delivery_info["redelivered"]
    worker.got[0].ack()
    assert worker.run(lambda: len(worker.got) == 6), "an acknowledgement of the old connection frees its place"


def test_a_worker_whose_devices_hang_takes_nothing(make_worker, send):
    send("a")
    worker = make_worker()
    worker.well = False
    worker.run_for(0.3)
    assert worker.got == []
    worker.well = True
    assert worker.run(lambda: worker.got)


def test_a_message_that_is_claimed_when_the_devices_begin_to_hang_is_held(make_worker, send):
    """Its reply lay unread, so nobody renewed its lease: it was redelivered, and ran here too after the hang."""
    worker = make_worker()
    assert worker.run(lambda: worker.contacts)
    send("a")
    worker.channel._schedule.on_notice()
    worker.channel.connection.cycle.on_poll_start()  # sends a claim
    worker.well = False
    assert worker.run(worker.ids)
    assert worker.deliveries.holds(worker.got[0].delivery_tag)
    assert not worker.channel.is_claim_in_flight


def test_a_rejected_message_goes_to_the_front_or_away(make_worker, send):
    send("a")
    send("b")
    worker = make_worker(prefetch=1)
    assert worker.run(lambda: worker.got)
    worker.got[0].reject(requeue=True)
    assert worker.run(lambda: len(worker.got) == 2)
    assert worker.ids() == ["a", "a"]
    worker.got[1].reject()
    assert worker.run(lambda: len(worker.got) == 3)
    assert worker.ids()[-1] == "b"


def test_what_celery_must_not_see_is_put_aside_and_has_its_error(make_worker, send):
    worker = make_worker()
    for raw in (b"", b"[]", b"[" * 5000, b"x" * 20_000, json.dumps({"headers": {"id": "bad"}, "body": 5}).encode()):
        worker.client.lpush("q", raw)
    send("good")
    assert worker.run(lambda: worker.got)
    assert worker.ids() == ["good"]
    assert [bad.task_id for bad in worker.bad] == ["bad"]
    assert worker.client.hgetall("sdtpu:dead:counts") == {b"InvalidMessage": b"5"}
    assert len(worker.deliveries) == 1


def test_a_message_whose_holders_keep_dying_is_put_aside_with_its_error(make_worker, send):
    send("deadly")
    client = redis.Redis.from_url(make_worker().url)
    held: Any = client.hvals("sdtpu:unacked")
    raw: Any = client.rpop("q") or held[0].split(b"\n", 1)[1]
    client.flushall()
    worker = make_worker()
    worker.client.lpush("q", b" " * 4 + raw)
    assert worker.run(lambda: worker.got), "four times is not often enough"
    worker.got[0].ack()
    worker.client.lpush("q", b" " * 5 + raw)
    assert worker.run(lambda: worker.bad)
    assert worker.bad[0].task_id == "deadly"
    assert isinstance(worker.bad[0].error, DeliveryLimitExceeded)
    assert worker.client.hgetall("sdtpu:dead:counts") == {b"DeliveryLimitExceeded": b"1"}


def test_a_lost_connection_is_an_error_of_the_loop_and_nothing_is_lost(make_worker, send):
    worker = make_worker()
    send("a")
    assert worker.run(lambda: worker.got)
    worker.deliveries.mark_running(worker.got[0].delivery_tag)
    for other in worker.client.client_list():
        if int(other["id"]) != worker.client.client_id():
            worker.client.client_kill_filter(_id=other["id"])
    with pytest.raises(worker.connection.connection_errors):
        worker.run_for(3)
    worker.connection.collect()
    worker.hub.reset()
    assert worker.client.hlen("sdtpu:unacked") == 1
    worker.connect()
    send("b")
    assert worker.run(lambda: len(worker.got) == 2)
    assert worker.ids() == ["a", "b"]
    worker.got[0].ack()
    worker.got[1].ack()
    assert worker.client.keys("sdtpu:*") == []


@pytest.mark.parametrize("tells", [True, False])
def test_a_job_is_picked_up_at_once_also_where_redis_does_not_tell_of_it(make_worker, send, monkeypatch, tells):
    if not tells:
        real = wake_up._ask

        def refuse(connection, *command):
            if command[:2] == ("CLIENT", "TRACKING"):
                raise redis.ResponseError("unknown subcommand")
            return real(connection, *command)

        monkeypatch.setattr(wake_up, "_ask", refuse)
    worker = make_worker()
    delays, done = [], threading.Event()

    def produce() -> None:
        for i in range(30):
            time.sleep(0.02)
            before, sent_at = len(worker.got), time.monotonic()
            send(str(i))
            while len(worker.got) == before and time.monotonic() < sent_at + 5:
                time.sleep(0.0005)
            delays.append(time.monotonic() - sent_at)
            worker.got[-1].ack()
        done.set()
        worker.hub.call_soon(lambda: None)

    thread = threading.Thread(target=produce)
    thread.start()
    worker.run(done.is_set, 20)
    thread.join()
    assert len(delays) == 30
    assert statistics.median(delays) < 0.1, "not only at the safety look once a second"


def test_an_idle_worker_hardly_turns(make_worker):
    worker = make_worker()
    worker.run_for(0.2)
    turns, until = 0, time.monotonic() + 2
    while time.monotonic() < until:
        next(worker.loop)
        turns += 1
    assert turns < 20


def test_keys_have_the_prefix_that_clients_use(make_worker, url):
    app = Celery("prefixed", broker=url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": "shop:"}
    app.send_task("t", task_id="a", queue="q", ignore_result=True)
    worker = make_worker(global_keyprefix="shop:")
    assert worker.run(lambda: worker.got)
    assert all(key.startswith(b"shop:") for key in worker.client.keys("*"))
    worker.got[0].ack()
    assert worker.client.keys("shop:sdtpu:*") == []
    app.close()


def test_a_job_for_later_waits_in_redis_and_neither_takes_a_place_nor_keeps_others_waiting(make_worker, send, stack):
    for i in range(20):
        send(f"later-{i}", countdown=3600)
    send("soon", countdown=1)
    send("now")
    worker = make_worker(prefetch=2)
    lease = Lease(worker.deliveries, lambda: True)
    stack.callback(lease.stop)
    lease.start()
    assert worker.run(lambda: len(worker.got) == 2)
    assert worker.ids() == ["now", "soon"]
    assert (len(worker.deliveries), worker.client.zcard("sdtpu:delayed")) == (2, 20)
    for message in worker.got:
        message.ack()
    (first, *_) = worker.client.zrange("sdtpu:delayed", 0, 0)
    worker.client.zadd("sdtpu:delayed", {first: 0})
    worker.deliveries.requeue_due()
    worker.run_for(0.3)
    assert worker.client.zcard("sdtpu:delayed") == 20, "it is not due by its own header"
    send("past", countdown=-5)
    assert worker.run(lambda: len(worker.got) == 3)


FANOUT_NOISE = (
    b"",
    b"x",
    b"\xff\xfe",
    b"null",
    b"7",
    b'"text"',
    b"[]",
    b"{}",
    b"[[],{}]",
    b"[" * 100_000,
    b'{"properties": null}',
    b'{"properties": {}}',
    b'{"properties": {"delivery_tag": 1}, "body": 7}',
    b'{"properties": {"delivery_tag": 1, "body_encoding": "rot13"}, "body": "x"}',
    b'{"properties": {"delivery_tag": [], "body_encoding": "base64"}, "body": "%"}',
    b'{"properties": {"delivery_tag": 1}, "headers": 7, "body": "x"}',
    b'{"properties": {"delivery_tag": 1}, "content-type": "application/x-python-serialize", "body": "x"}',
)


def test_noise_on_a_fanout_channel_costs_neither_the_worker_nor_its_connection(make_worker, send):
    worker = make_worker()
    heard = []

    def on_message(message) -> None:
        if not isinstance(message.payload, dict):
            raise TypeError("as Celery's own consumers do")
        heard.append(message.payload)

    channel = worker.connection.channel()
    queue = Queue("mailbox", Exchange("control", "fanout"), auto_delete=True)
    fanout = Consumer(channel, [queue], on_message=on_message, accept=["json"], no_ack=True)
    fanout.consume()
    worker.run_for(0.2)
    for noise in FANOUT_NOISE:
        assert worker.client.publish("/0.control", noise) == 1
    worker.connection.Producer().publish({"method": "ping"}, exchange=queue.exchange, declare=[queue])
    send("a")
    assert worker.run(lambda: heard and worker.got)
    assert heard == [{"method": "ping"}]
    assert worker.ids() == ["a"]


def test_every_redis_address_gets_our_transport_and_others_do_not(make_worker):
    make_worker()
    for address in ("redis://a", "rediss://a", "redis://a;redis://b"):
        assert isinstance(Connection(address).transport, transport.Transport)
    assert isinstance(Connection("sentinel://a").transport, transport.SentinelTransport)
    assert not isinstance(Connection("memory://").transport, transport.Transport)


def other_messages(worker: Worker, channel: Any, name: str, **options: Any) -> list[Any]:
    """Consume a queue that is none of the worker's task queues, as an app's own consumer does; return what comes."""
    got: list[Any] = []
    queue = Queue(name, Exchange("others", "direct"), routing_key=name)
    Consumer(channel, [queue], on_message=got.append, accept=["json"], **options).consume()
    return got


@pytest.mark.parametrize("has_own_channel", [True, False])
def test_messages_of_an_apps_own_consumer_reach_it_and_are_no_dead_letters(
    make_worker, send, publish_other, has_own_channel
):
    worker = make_worker()
    channel = worker.connection.channel() if has_own_channel else worker.channel
    events = other_messages(worker, channel, "events")
    publish_other("events", {"order": 1}, {"order": 2}, 7)
    send("job")
    assert worker.run(lambda: len(events) == 3 and worker.got)
    assert [event.payload for event in events] == [{"order": 1}, {"order": 2}, 7]
    assert worker.ids() == ["job"]
    assert not worker.client.exists("sdtpu:dead", "sdtpu:dead:counts")
    assert len(worker.deliveries) == 1
    assert (worker.client.hlen("sdtpu:unacked"), worker.client.hlen("unacked")) == (1, 3), "each in the keys of its own"
    events[0].ack()
    events[1].reject()
    events[2].reject(requeue=True)
    assert worker.run(lambda: len(events) == 4)
    assert (events[3].payload, events[3].delivery_info["redelivered"]) == (7, True)
    assert (worker.client.hlen("sdtpu:unacked"), worker.client.hlen("unacked")) == (1, 1)
    worker.connection.close()
    assert worker.client.llen("events") == 1, "what its consumer has not acknowledged, kombu restores"


def test_an_apps_own_consumer_has_a_prefetch_limit_of_its_own(make_worker, send, publish_other):
    worker = make_worker(prefetch=1)
    channel = worker.connection.channel()
    events = other_messages(worker, channel, "events", prefetch_count=2)
    publish_other("events", 1, 2, 3)
    send("a")
    send("b")
    assert worker.run(lambda: len(events) == 2 and worker.got)
    worker.run_for(0.2)
    assert (len(events), worker.ids()) == (2, ["a"])
    events[0].ack()
    assert worker.run(lambda: len(events) == 3)


def test_replies_to_remote_control_reach_who_asked_over_the_channel_of_the_tasks(make_worker, send, publish_other):
    worker = make_worker()
    replies = other_messages(worker, worker.channel, "reply.celery.pidbox", no_ack=True)
    publish_other("reply.celery.pidbox", {"worker@host": {"revoked": ["x"], "clock": 3}})
    assert worker.run(lambda: replies)
    assert not worker.client.exists("sdtpu:dead", "sdtpu:dead:counts", "sdtpu:unacked", "unacked")
    worker.client.zadd("unacked_index", {"another-apps": 0})
    for _ in range(30):
        worker.connection.transport.cycle.maybe_restore_messages()
    assert worker.client.zcard("unacked_index") == 1, "who asks for replies redelivers nothing of others"
    send("a")
    assert worker.run(lambda: worker.got)


def test_a_job_that_is_told_of_before_an_older_empty_reply_is_read_is_claimed_at_once(make_worker, send, monkeypatch):
    monkeypatch.setattr(claim_schedule, "SAFETY_POLL_S", 3600.0)
    worker = make_worker()
    channel = worker.channel
    assert worker.run(lambda: worker.contacts and not channel._in_poll), "idle"
    channel._schedule = claim_schedule.ClaimSchedule()
    channel._brpop_start()
    assert select.select([channel.client.connection._sock], [], [], 5)[0], "the empty reply has come"
    send("a")
    assert select.select([channel._wake_up._connection._sock], [], [], 5)[0], "the notice has come"
    channel._on_wake_up()
    with pytest.raises(Empty):
        channel._brpop_read()
    assert worker.run(lambda: worker.got), "not only at the safety look"


@contextlib.contextmanager
def busy(client: redis.Redis) -> Iterator[None]:
    """Have a script run for ever in Redis."""
    port = client.connection_pool.connection_kwargs["port"]
    client.config_set("lua-time-limit", 50)

    def run() -> None:
        with contextlib.suppress(redis.RedisError), redis.Redis(port=port) as other:
            other.eval("while true do end", 0)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    client.script_kill()
    thread.join()


@contextlib.contextmanager
def replica(client: redis.Redis) -> Iterator[None]:
    """Make Redis a replica of a master that is away."""
    client.replicaof("127.0.0.1", 1)
    yield
    client.replicaof("NO", "ONE")


@contextlib.contextmanager
def without_replicas(client: redis.Redis) -> Iterator[None]:
    """Have Redis want more replicas than it has."""
    client.config_set("min-replicas-to-write", 1)
    yield
    client.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def without_permission(client: redis.Redis) -> Iterator[None]:
    """Forbid the default user to take from a list."""
    client.execute_command("ACL SETUSER", "default", "-rpop")
    yield
    client.execute_command("ACL SETUSER", "default", "+rpop")


@contextlib.contextmanager
def without_disk(client: redis.Redis) -> Iterator[None]:
    """Have Redis fail to save its snapshot."""
    before: Any = client.config_get("dir")
    with tempfile.TemporaryDirectory() as folder:
        client.config_set("dir", folder)
    client.config_set("save", "3600 1")
    client.bgsave()
    while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
        time.sleep(0.01)
    yield
    client.config_set("save", "")
    client.config_set("dir", before["dir"])


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (busy, "BUSY"),
        (replica, "READONLY"),
        (without_replicas, "NOREPLICAS"),
        (without_permission, "can't run this command"),
        (without_disk, "MISCONF"),
    ],
)
def test_an_error_in_reply_to_a_claim_costs_neither_the_worker_nor_its_connection(
    make_worker, send, caplog, trouble, text
):
    worker = make_worker()
    assert worker.run(lambda: worker.contacts)
    with trouble(worker.client):
        assert worker.run(lambda: len(worker.refusals) > 1, 10), "it tries again"
        assert text in worker.refusals[0] or text == "NOPERM"
        assert worker.got == []
    send("a")
    assert worker.run(lambda: worker.got, 10)
    lines = [record.message for record in caplog.records if "refuses to give jobs" in record.message]
    assert len(lines) == 1, "said once"


@pytest.mark.parametrize("protocol", [2, 3])
def test_an_idle_worker_keeps_its_connections_where_redis_closes_idle_ones(monkeypatch, protocol):
    of_kombu = transport.Channel._connparams
    monkeypatch.setattr(
        transport.Channel, "_connparams", lambda self, **options: {**of_kombu(self, **options), "protocol": protocol}
    )
    with private_redis("--timeout", "2") as url, contextlib.closing(Worker(url)) as worker:
        assert worker.run(lambda: worker.contacts)
        wake_up, claims = worker.channel._wake_up, worker.channel.client.connection
        before = wake_up._connection_id, claims._sock
        assert (wake_up._connection.get_protocol(), wake_up.tracks(claims)) == (protocol, True)
        worker.run_for(4.5)
        assert (wake_up._connection_id, claims._sock) == before
        assert wake_up.tracks(claims)
        alive = {client["id"] for client in worker.client.client_list()}
        assert str(wake_up._connection_id) in alive


def test_a_worker_that_is_full_keeps_its_consumer_where_redis_closes_idle_connections():
    with private_redis("--timeout", "1") as url:
        client = Celery("client", broker=url, set_as_current=False)
        for i in range(2):
            client.send_task("t", task_id=str(i), queue="q", ignore_result=True)
        client.close()
        with contextlib.closing(Worker(url, prefetch=1)) as worker:
            assert worker.run(lambda: worker.got)
            worker.run_for(3.5)
            worker.got[0].ack()
            assert worker.run(lambda: len(worker.got) == 2)


def test_a_lost_wake_up_connection_costs_nothing_else_and_is_replaced(make_worker, send, monkeypatch):
    monkeypatch.setattr(wake_up, "RETRY_S", 0.1)
    worker = make_worker()
    assert worker.run(lambda: worker.contacts)
    for _ in range(3):
        lost = str(worker.channel._wake_up._connection_id)
        worker.client.client_kill_filter(_id=lost)
        send("a")
        count = len(worker.got)
        assert worker.run(lambda n=count: len(worker.got) > n)
        worker.got[-1].ack()
        assert worker.run(lambda gone=lost: str(worker.channel._wake_up._connection_id) != gone)
        assert worker.run(lambda: worker.channel._wake_up.tracks(worker.channel.client.connection))


def test_whether_a_job_is_due_is_for_redis_to_say_and_celery_waits_for_no_due_job(make_worker, send, monkeypatch):
    for i in range(20):
        send(str(i), countdown=0.05)
    time.sleep(0.1)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this host's clock is far behind
    worker = make_worker(prefetch=4)
    assert worker.run(lambda: len(worker.got) == 4)
    worker.run_for(0.2)
    assert len(worker.got) == 4
    assert [message.headers["eta"] for message in worker.got] == [None] * 4, (
        "with an eta, Celery would take one more each"
    )
    assert worker.client.zcard("sdtpu:delayed") == 0


def test_a_job_that_is_due_in_a_moment_is_not_late(make_worker, send, stack):
    worker = make_worker()
    lease, late_s = Lease(worker.deliveries, lambda: True), []
    stack.callback(lease.stop)
    lease.pulse()
    lease.start()
    for i in range(5):
        due_at = time.time() + 0.3
        send(str(i), countdown=0.3)
        assert worker.run(lambda n=i: len(worker.got) > n)
        late_s.append(time.time() - due_at)
        worker.got[-1].ack()
    assert all(late > -0.01 for late in late_s), late_s
    assert statistics.median(late_s) < 0.3, "not only at the next pulse, which comes once a second"


def test_a_channel_of_remote_control_closes_without_an_error_when_redis_is_gone():
    with private_redis() as url:
        worker = Worker(url)
        channel = worker.connection.channel()
        mailbox = Queue("mailbox", Exchange("control", "fanout"), auto_delete=True)
        Consumer(channel, [mailbox], on_message=worker.got.append, accept=["json"], no_ack=True).consume()
        worker.run_for(0.2)
    channel.close()
    assert channel.closed
    worker.close()
