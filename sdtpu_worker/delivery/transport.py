"""kombu's Redis transport, made safe: what a device worker consumes through.

Stock kombu pops a message and records it as held in two commands (a worker that is killed in between loses it), hands
whatever it popped to Celery (some shapes end the process), and gives running jobs back when a connection drops (they
run twice). Here a message is claimed and recorded by one script, checked before Celery sees it, and belongs to the
process, not to the connection that it came on; see `sdtpu_worker.delivery.deliveries`. A job whose `eta` lies ahead is
not held at all (stock Celery holds every one of them, and takes one message more for each). What comes over a fanout
channel (remote control, gossip) and is no message is left out, where it would end a stock worker.

A claim never blocks. When there is nothing, `CLIENT TRACKING` has Redis say on a second connection when one of the
lists is written to; where Redis refuses that, the lists are looked at every few milliseconds.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty
from typing import Any

from celery.utils.functional import noop
from celery.utils.time import maybe_iso8601
from kombu import Connection
from kombu import transport as kombu_transports
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.envelope import BadEnvelope, check_envelope, find_task_id
from sdtpu_worker.delivery.scripts import CLAIM, REDELIVERED
from sdtpu_worker.errors import DeliveryLimitExceeded

logger = logging.getLogger(__name__)

POLL_S = 0.01
"""Between two looks at empty lists when Redis does not say when they change."""
SAFETY_POLL_S = 1.0
"""Between two looks at empty lists when it does."""
PROMPT_S = 1.0
"""A job that is due within this time is Celery's, whose timer is exact; a later one waits in Redis."""
_ENDS_BYTES = 4096
_WAKE = "WAKE"  # a kind of connection, beside kombu's BRPOP (here the claims) and LISTEN


@dataclass(frozen=True)
class Intake:
    """What the channels of this process work with.

    Attributes:
        deliveries: what the worker holds.
        known_tasks: names of the tasks that it can run.
        max_message_bytes: a larger message is put aside unread.
        max_holders: a message whose holder died this often is put aside: it may be why.
        on_bad: told of a message with a usable id that cannot be run: the id and the error to store.
        is_well: whether the worker should take more at all (its devices are neither hung nor lost).
        on_contact: told whenever Redis answered a claim.
    """

    deliveries: Deliveries
    known_tasks: Container[str]
    max_message_bytes: int
    max_holders: int
    on_bad: Callable[[BadEnvelope], None]
    is_well: Callable[[], bool]
    on_contact: Callable[[], None]


class QoS(kombu_redis.QoS):
    """Counts what the worker holds, over all connections that it ever had, against the prefetch limit."""

    restore_at_shutdown = False

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._intake: Intake = channel.intake

    def can_consume(self) -> bool:
        """Return whether another message may be taken."""
        if not self.prefetch_count:
            return True
        return len(self._intake.deliveries) < self.prefetch_count and self._intake.is_well()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Know a delivered message; it was recorded as held when it was claimed."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge, also when the connection that it came on is gone."""
        self._intake.deliveries.ack(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give it back to the front of its queue, or acknowledge it."""
        (self._intake.deliveries.release if requeue else self._intake.deliveries.ack)(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """The channel closes: give back what no job runs for; what runs goes on."""
        self._on_collect.cancel()
        if self.prefetch_count:
            self._intake.deliveries.release_waiting()

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Nothing: `sdtpu_worker.delivery.lease` sweeps."""


class Poller(kombu_redis.MultiChannelPoller):
    """Watches, beside kombu's connections, those on which Redis tells of new jobs."""

    def on_readable(self, fileno: int) -> Any:
        """Handle a connection that has something to read."""
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        return channel.handlers[_WAKE]() if kind == _WAKE else super().on_readable(fileno)


class ClaimingChannel:
    """A channel that claims; mixed into kombu's two Redis channels. The worker's main thread."""

    QoS = QoS
    intake: Intake
    _look_at = 0.0  # when to look at the lists again, on the monotonic clock
    _claimed_tag = ""
    _claimed_queues: list[str]  # of the claim on its way, by number of the list
    _wake: Any = None  # the connection on which Redis tells of writes
    _wake_id = 0
    _tracked: Any = None  # the socket of the claims that Redis tells about

    def __init__(self: Any, transport: Any, *args: Any, **kwargs: Any) -> None:
        self.intake = transport.intake  # kept: a closed channel has no transport any more
        super().__init__(transport, *args, **kwargs)  # type: ignore[call-arg]  # kombu's channel is mixed in
        self.handlers[_WAKE] = self._on_wake

    def _on_wake(self: Any) -> None:
        """A list was written to, or the second connection has ended."""
        self._look_at = 0.0
        wake = self._wake
        if wake._sock is None or not _drain(wake._sock):
            wake.disconnect()
            raise RedisConnectionError("the connection on which Redis tells of new jobs was closed")

    def _brpop_start(self: Any, timeout: float | None = None) -> None:
        """Send a claim, if it is time for one."""
        now = time.monotonic()
        if now < self._look_at:
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self.client.connection
        if connection._sock is not self._tracked:
            self._start_tracking(connection)
        prefix, deliveries = self.global_keyprefix, self.intake.deliveries
        lists = [(prefix + self._q_for_pri(queue, step), queue) for step in self.priority_steps for queue in queues]
        self._claimed_tag, self._claimed_queues = str(uuid.uuid4()), [queue for _, queue in lists]
        names = [deliveries.keys.held, deliveries.keys.leases, *(name for name, _ in lists)]
        self._in_poll, self._brpop_sent_at = connection, now
        connection.send_command(
            "EVAL", CLAIM, len(names), *names,
            self._claimed_tag, deliveries.lease_s, self.intake.max_message_bytes, _ENDS_BYTES,
        )  # fmt: skip

    def _brpop_read(self: Any, **options: Any) -> bool:
        """Read what a claim brought and deliver it.

        Raises:
            Empty: there was nothing.
        """
        try:
            reply = self.client.parse_response(self.client.connection, "EVAL", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self.intake.on_contact()
        if not reply:
            is_told = self.client.connection._sock is self._tracked
            self._look_at = time.monotonic() + (SAFETY_POLL_S if is_told else POLL_S)
            if not is_told:
                self.connection.wake_up_in(POLL_S)
            raise Empty
        queue = self._claimed_queues[int(reply[0])]
        self._queue_cycle.rotate(queue)
        try:
            self._take(queue, reply[1:])
        except ResponseError as exc:  # no permission, a key of another type
            logger.error("Redis refused to move a message, which comes again when its lease ends: %s", exc)
        return True

    def _take(self: Any, queue: str, content: list[Any]) -> None:
        """Check a claimed message and hand it to Celery, or put it aside.

        Args:
            queue: where the message was.
            content: the message; or its size, its beginning and its end.
        """
        tag, intake = self._claimed_tag, self.intake
        limit = intake.max_message_bytes
        raw, size = (content[0], len(content[0])) if len(content) == 1 else (content[1], int(content[0]))
        try:
            if len(content) > 1:
                reason = f"a message must have at most {limit:,} bytes (sdtpu_max_message_bytes), got {size:,}"
                raise BadEnvelope(reason, {"id": find_task_id(*content[1:])})
            message = check_envelope(raw, intake.known_tasks, limit)
            if (died := len(raw) - len(raw.lstrip(REDELIVERED))) >= intake.max_holders:
                reason = f"{died} workers died while they held this message; sdtpu_max_deliveries allows fewer"
                raise BadEnvelope(reason, message["headers"], DeliveryLimitExceeded(reason))
        except BadEnvelope as exc:
            logger.warning("a message of %d bytes in the queue %s was put aside: %s", size, queue, exc.reason)
            if exc.task_id is not None:
                intake.on_bad(exc)
            intake.deliveries.bury(tag, type(exc.error).__name__, queue, exc.reason, size, raw)
            return
        properties, headers = message["properties"], message["headers"]
        due_at = _due_at(headers)
        if due_at - time.time() > PROMPT_S and intake.deliveries.delay(tag, due_at):
            return
        properties["delivery_tag"] = tag
        if raw.startswith(REDELIVERED):
            headers["redelivered"] = properties["delivery_info"]["redelivered"] = True
        intake.deliveries.hold(tag, headers.get("id") or properties.get("correlation_id") or "")
        if self._closing or queue not in self.connection._callbacks:
            intake.deliveries.release(tag)
        else:
            self.connection._deliver(message, queue)

    def _receive_one(self: Any, client: Any) -> bool:
        """Deliver what came over a fanout channel, if it is a message that its consumer can live with."""
        try:
            return bool(super()._receive_one(client))  # type: ignore[misc]
        except (Empty, OSError, RedisError):
            raise
        except Exception as exc:  # whatever a consumer raises: it would end the worker, or cost it the connection
            logger.warning("a message of a fanout channel cannot be handled: %r", exc)
            return False

    def _start_tracking(self: Any, connection: Any) -> None:
        """Have Redis tell on a second connection when a list that a claim looked at is written to."""
        self._tracked = None
        try:
            if self._wake is None or self._wake._sock is None:
                self._wake = self.client.connection_pool.get_connection()
                self._wake.connect()
                self._wake_id = _ask(self._wake, "CLIENT", "ID")
                if str(self._wake.get_protocol()) != "3":
                    _ask(self._wake, "SUBSCRIBE", "__redis__:invalidate")
                self._wake._sock.setblocking(False)
                self._watch_wake()
            _ask(connection, "CLIENT", "TRACKING", "ON", "REDIRECT", self._wake_id)
            self._tracked = connection._sock
        except ResponseError as exc:
            logger.info("Redis does not tell of new jobs (%s): looking every %.0f ms", exc, 1000 * POLL_S)

    def _watch_wake(self: Any) -> None:
        poller, sock = self.connection.cycle, self._wake._sock
        poller._fd_to_chan[sock.fileno()] = (self, _WAKE)
        poller._chan_to_sock[self, _Client(self._wake), _WAKE] = sock
        poller.poller.register(sock, poller.eventflags)


class EagerConnection(Connection):
    """A connection that is tried again often: kombu's own pauses grow to 30 s, and a worker waits through them."""

    def ensure_connection(
        self,
        errback: Any = None,
        max_retries: int | None = None,
        interval_start: float = 0.5,
        interval_step: float = 0.5,
        interval_max: float = 3.0,
        **options: Any,
    ) -> Connection:
        """Connect, with pauses of at most three seconds unless the caller wants others."""
        return super().ensure_connection(errback, max_retries, interval_start, interval_step, interval_max, **options)


class _Client:
    """What kombu's poller knows a socket by: something with a connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection


class Channel(ClaimingChannel, kombu_redis.Channel):
    """A channel to one Redis server."""


class SentinelChannel(ClaimingChannel, kombu_redis.SentinelChannel):
    """A channel to the master that Sentinels name."""


class TransportMixin:
    """Uses our poller; `installed` makes a class of it that knows its process's `intake`."""

    intake: Intake
    _loop: Any = None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self: Any, connection: Any, loop: Any) -> None:
        """Join Celery's event loop."""
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]
        self._loop = loop

    def wake_up_in(self, seconds: float) -> None:
        """Have the event loop look again after this time, whatever happens."""
        if self._loop is not None:
            self._loop.call_later(seconds, noop)


class Transport(TransportMixin, kombu_redis.Transport):
    """For `redis://`, `rediss://` and `redis+socket://`."""

    Channel = Channel


class SentinelTransport(TransportMixin, kombu_redis.SentinelTransport):
    """For `sentinel://`."""

    Channel = SentinelChannel


@contextlib.contextmanager
def installed(intake: Intake) -> Iterator[None]:
    """Make every connection that kombu opens to Redis meanwhile one of ours.

    kombu finds a transport by the scheme of a URL, in a registry of the process; it forgets a class that is given in
    any other way when it fails over. So the registry is changed, and changed back.
    """
    ours: dict[str, type] = {"redis": Transport, "rediss": Transport, "sentinel": SentinelTransport}
    before = {alias: kombu_transports.TRANSPORT_ALIASES[alias] for alias in ours}
    for alias, transport in ours.items():
        bound = type(transport.__name__, (transport,), {"intake": intake})
        kombu_transports.TRANSPORT_ALIASES[alias] = partial(_just, bound)
        kombu_transports._transport_cache.pop(alias, None)
    try:
        yield
    finally:
        kombu_transports.TRANSPORT_ALIASES.update(before)
        for alias in ours:
            kombu_transports._transport_cache.pop(alias, None)


def _just(transport: type) -> type:
    return transport


def _due_at(headers: dict[str, Any]) -> float:
    """Return when a job is due, seconds since 1970; 0.0 for at once, and where Celery is to find out (protocol 1)."""
    eta = headers.get("eta")
    due_at = maybe_iso8601(eta) if eta is not None else None
    return due_at.timestamp() if due_at is not None and due_at.tzinfo is not None else 0.0


def _ask(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _drain(sock: socket.socket) -> bool:
    """Read away what is there, whatever it says; False when the other side has closed."""
    try:
        while data := sock.recv(65_536):
            del data
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    return False
