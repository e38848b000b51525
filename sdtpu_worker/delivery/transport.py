"""kombu's Redis transport, made safe: a device worker consumes through it.

Stock kombu pops a message and records it as held in two commands, so a worker that is killed in between loses the
message. It hands whatever it popped to Celery, and some shapes end the process. When a connection drops it requeues the
messages of running jobs, which then run twice. Here one script claims and records a message; the message is checked
before Celery sees it; and it belongs to the process, not to the connection that it came on (see `deliveries.py`). A
message whose `eta` lies ahead is deferred instead of held; stock Celery holds every such message, and takes one more
for each.

All this is for the queues of the task consumer alone. A process has others, over which replies to remote control come
(mingle, inspect) or which an app's own consumers read: they are kombu's own. On a fanout channel (remote control,
gossip) this transport drops what is no message and would end a stock worker.

A claim never blocks. When all lists are empty, Redis says on a second connection when one of them is written to (see
`wake_up.py`); where Redis refuses that, the channel looks at the lists every few milliseconds.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterator
from functools import partial
from queue import Empty
from typing import Any

from celery.utils.functional import noop
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Connection
from kombu import transport as kombu_transports
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import RedisError, ResponseError

from sdtpu_worker.contract.queues import waiting_lists
from sdtpu_worker.delivery.claim_schedule import ClaimSchedule
from sdtpu_worker.delivery.envelope import BadEnvelope, check_envelope, find_task_id
from sdtpu_worker.delivery.qos import Intake, QoS
from sdtpu_worker.delivery.scripts import CLAIM, REDELIVERED, is_read_only
from sdtpu_worker.delivery.wake_up import WAKE_UP, Poller, WakeUp
from sdtpu_worker.errors import DeliveryLimitExceeded

logger = logging.getLogger(__name__)

_ENDS_BYTES = 4096


class ClaimingChannel:
    """A channel that claims; mixed into kombu's two Redis channels. The worker's main thread."""

    QoS = QoS
    intake: Intake
    has_claimed = False
    """Whether this channel ever claimed, so that messages which the worker holds may have come on it."""
    _refusal: str | None = None  # the error with which Redis answered the last claim
    _claimed_tag = ""
    _claimed_lists: list[tuple[str, bool]] | None = None
    """Of each list of the claim that waits for its reply: the queue, and whether it is a task queue; None while kombu's
    own command waits for its reply."""

    def __init__(self: Any, transport: Any, *args: Any, **kwargs: Any) -> None:
        self.intake = transport.intake  # kept: a closed channel has no transport any more
        self._acknowledged_queues: set[str] = set()
        super().__init__(transport, *args, **kwargs)  # type: ignore[call-arg]  # kombu's channel is mixed in
        self._schedule, self._wake_up = ClaimSchedule(), WakeUp(self)
        self.handlers[WAKE_UP] = self._on_wake_up

    @property
    def task_queues(self: Any) -> list[str]:
        """The queues of the task consumer that this channel consumes."""
        return [queue for queue in self.active_queues if self.intake.is_task_queue(queue)]

    @property
    def other_queues(self: Any) -> list[str]:
        """All other queues that this channel consumes, but for fanout."""
        return [queue for queue in self.active_queues if not self.intake.is_task_queue(queue)]

    @property
    def restorable_queues(self: Any) -> list[str]:
        """The other queues whose consumer acknowledges, so that kombu records what it pops from them."""
        return [queue for queue in self.other_queues if queue in self._acknowledged_queues]

    @property
    def is_claim_in_flight(self: Any) -> bool:
        """Whether a claim waits for its reply to be read."""
        return bool(self._in_poll) and self._claimed_lists is not None

    def basic_consume(self: Any, queue: str, *args: Any, **options: Any) -> Any:
        """Consume a queue, and take note of whether its messages are acknowledged."""
        if not (args[0] if args else options.get("no_ack")):
            self._acknowledged_queues.add(queue)
        return super().basic_consume(queue, *args, **options)  # type: ignore[misc]  # kombu's channel is mixed in

    def queue_delete(self: Any, queue: str, *args: Any, **options: Any) -> None:
        """Delete a queue; where the channel closes because Redis is away, nothing is raised."""
        with contextlib.suppress(*(self.connection_errors if self._closing else ())):
            super().queue_delete(queue, *args, **options)  # type: ignore[misc]  # kombu's channel is mixed in

    def _on_wake_up(self: Any) -> None:
        """Claim at once, or as soon as the claim that is in flight has its reply: a list was written to."""
        self._schedule.on_notice()
        self._wake_up.read()

    def _brpop_start(self: Any, timeout: float | None = None) -> None:
        """Send a claim, if it is time for one; on a channel without a task queue, what kombu sends."""
        if not self.task_queues:
            self._claimed_lists = None
            super()._brpop_start(timeout)  # type: ignore[misc]  # kombu's channel is mixed in
            return
        now = time.monotonic()
        if not self._schedule.is_due(now):
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        connection = self.client.connection
        if not self._wake_up.tracks(connection):
            self._wake_up.track(connection, now)
        deliveries, prefix = self.intake.deliveries, self.global_keyprefix
        by_queue = [[(name, queue) for name in waiting_lists(self, queue, prefix)] for queue in queues]
        lists = [one for band in zip(*by_queue, strict=True) for one in band]
        self._claimed_tag = str(uuid.uuid4())
        self._claimed_lists = [(queue, self.intake.is_task_queue(queue)) for _, queue in lists]
        names = [deliveries.keys.held, deliveries.keys.leases, *(name for name, _ in lists)]
        kinds = "".join("t" if is_task_queue else "-" for _, is_task_queue in self._claimed_lists)
        self._in_poll, self._brpop_sent_at, self.has_claimed = connection, now, True
        self._schedule.on_send()
        connection.send_command(
            "EVAL", CLAIM, len(names), *names,
            self._claimed_tag, deliveries.lease_s, self.intake.max_message_bytes, _ENDS_BYTES, kinds,
        )  # fmt: skip

    def _brpop_read(self: Any, **options: Any) -> bool:
        """Read what a claim brought and deliver it; where kombu has sent something else, read that as kombu does.

        Raises:
            Empty: all lists were empty.
        """
        if self._claimed_lists is None:
            return bool(super()._brpop_read(**options))  # type: ignore[misc]  # kombu's channel is mixed in
        if not self._in_poll:  # no reply: Redis closed the connection, or says that its notices reach nobody
            self.client.connection.disconnect()
            self._schedule.on_notice()
            raise Empty
        try:
            reply = self.client.parse_response(self.client.connection, "EVAL", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except ResponseError as exc:
            self._on_refusal(exc)
            raise Empty from exc
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._on_answer()
        if not reply:
            is_told = self._wake_up.tracks(self.client.connection)
            pause_s = self._schedule.on_empty(time.monotonic(), is_told)
            if pause_s and not is_told:  # else the loop turns by itself, now or once a second
                self.connection.wake_up_in(pause_s)
            raise Empty
        self._schedule.on_message()
        queue, is_task_queue = self._claimed_lists[int(reply[0])]
        self._queue_cycle.rotate(queue)
        if not is_task_queue:
            self.connection._deliver(loads(bytes_to_str(reply[1])), queue)
            return True
        try:
            self._take(queue, reply[1:])
        except ResponseError as exc:  # no permission, a key of another type
            logger.error("Redis refused to move a message, which is redelivered when its lease expires: %s", exc)
        return True

    def _on_refusal(self: Any, error: ResponseError) -> None:
        """Claim again after a pause: Redis answered a claim with an error (BUSY, READONLY, NOREPLICAS, NOPERM …)."""
        if self._refusal != (text := str(error)):
            self._refusal = text
            logger.error("Redis refuses to give jobs to this worker, which goes on trying; its jobs continue: %s", text)
        self.connection.wake_up_in(self._schedule.on_refusal(time.monotonic()))
        if is_read_only(error):  # the name of the server may belong to another one by now
            self.client.connection.disconnect()
        self.intake.on_reply(text)

    def _on_answer(self: Any) -> None:
        """Take note that Redis answered a claim without an error."""
        if self._refusal is not None:
            self._refusal = None
            logger.info("Redis gives jobs to this worker again")
        self.intake.on_reply(None)

    def _take(self: Any, queue: str, content: list[Any]) -> None:
        """Check a claimed message and hand it to Celery, or defer it, or dead-letter it.

        Args:
            queue: where the message was.
            content: the message; of one that is too large its size, its beginning and its end.
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
            logger.warning(
                "a message of %d bytes in the queue %s was dead-lettered (%s): %s", size, queue,
                "no usable id" if exc.task_id is None else f"task {exc.task_id}", exc.reason,
                extra={"data": {"id": exc.task_id, "name": exc.task_name}},
            )  # fmt: skip
            if exc.task_id is not None:
                intake.on_bad(exc)
            intake.deliveries.dead_letter(tag, type(exc.error).__name__, queue, exc.reason, size, raw)
            return
        properties, headers = message["properties"], message["headers"]
        if due_at := _due_at(headers):
            if intake.deliveries.defer(tag, due_at):
                return
            headers["eta"] = None  # due by Redis' clock: Celery must not wait for this host's, and take more meanwhile
        properties["delivery_tag"] = tag
        if raw.startswith(REDELIVERED):
            headers["redelivered"] = properties["delivery_info"]["redelivered"] = True
        intake.deliveries.hold(tag, headers.get("id") or properties.get("correlation_id") or "")
        if self._closing or queue not in self.connection._callbacks:
            intake.deliveries.requeue(tag)
        else:
            self.connection._deliver(message, queue)

    def _receive_one(self: Any, client: Any) -> bool:
        """Deliver what came over a fanout channel, unless its consumer raises for it."""
        try:
            return bool(super()._receive_one(client))  # type: ignore[misc]  # kombu's channel is mixed in
        except ResponseError as exc:  # BUSY, no permission
            logger.warning("Redis refused a command of remote control: %s", exc)
            return False
        except (Empty, OSError, RedisError):
            raise
        except Exception as exc:  # of any consumer: it would end the worker, or cost it the connection
            logger.warning("a message of a fanout channel cannot be handled: %r", exc)
            return False


class EagerConnection(Connection):
    """A connection that is tried again at least every three seconds; kombu's own pauses grow to 30 s."""

    def ensure_connection(
        self,
        errback: Any = None,
        max_retries: int | None = None,
        interval_start: float = 0.5,
        interval_step: float = 0.5,
        interval_max: float = 3.0,
        **options: Any,
    ) -> Connection:
        """Connect, with pauses of at most three seconds between the tries unless the caller asks for others."""
        return super().ensure_connection(errback, max_retries, interval_start, interval_step, interval_max, **options)


class Channel(ClaimingChannel, kombu_redis.Channel):
    """A channel to one Redis server."""


class SentinelChannel(ClaimingChannel, kombu_redis.SentinelChannel):
    """A channel to the master that Sentinels name."""


class TransportMixin:
    """A transport with our poller; `installed` derives the class that has the `intake` of its process."""

    intake: Intake
    _loop: Any = None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self: Any, connection: Any, loop: Any) -> None:
        """Join Celery's event loop."""
        super().register_with_event_loop(connection, loop)  # type: ignore[misc]  # kombu's is mixed in
        self._loop = loop

    def wake_up_in(self, seconds: float) -> None:
        """Have the event loop turn after this time, whatever happens."""
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
    """Have every Redis connection that kombu opens inside this context use our transport.

    kombu finds a transport by the scheme of a URL in a registry of the process, and falls back to that registry when
    it fails over, whatever class it was given first. So the registry is changed, and changed back.
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
    """Return when a job is due, seconds since 1970; 0.0 for at once, and where Celery has to find out (protocol 1)."""
    eta = headers.get("eta")
    return maybe_make_aware(maybe_iso8601(eta)).timestamp() if eta is not None else 0.0
