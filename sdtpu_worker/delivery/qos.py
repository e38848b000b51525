"""How many messages a channel may take, and what becomes of them: claimed ones apart from those that kombu popped."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from kombu.transport import redis as kombu_redis

from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.delivery.envelope import BadEnvelope


@dataclass(frozen=True)
class Intake:
    """What the channels of a device worker's process work with.

    Attributes:
        deliveries: the messages that the worker holds.
        is_task_queue: says whether the worker's task consumer consumes a queue. Messages of these queues are claimed
            and checked; every other queue (replies to remote control, an app's own consumers) is kombu's own business.
        known_tasks: names of the tasks that the worker can run.
        max_message_bytes: a larger message is dead-lettered unread.
        max_holders: a message whose holders died this often is dead-lettered: it may be why they died.
        on_bad: called with a message that has a usable id and cannot be run; it ends the job with the error.
        devices_make_progress: says whether the worker should claim messages at all (no device hangs or is lost).
        on_reply: called whenever Redis answered a claim: with None, or with the text of the error that it answered.
    """

    deliveries: Deliveries
    is_task_queue: Callable[[str], bool]
    known_tasks: Container[str]
    max_message_bytes: int
    max_holders: int
    on_bad: Callable[[BadEnvelope], None]
    devices_make_progress: Callable[[], bool]
    on_reply: Callable[[str | None], None]


class QoS(kombu_redis.QoS):
    """Compares what a channel has taken with its prefetch limit.

    On the channel of the task consumer that is all that the worker holds, whatever connection it came on, less the jobs
    that only wait for another one. What kombu popped from any other queue is kombu's own: it alone counts, records and
    restores it.
    """

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._intake: Intake = channel.intake
        self._popped: set[str] = set()  # tags of messages that are kombu's own

    def can_consume(self) -> bool:
        """Return whether another message may be taken."""
        if not self.prefetch_count:
            return True
        if not self.channel.task_queues:
            return super().can_consume()
        return self._intake.deliveries.num_places < self.prefetch_count and self._intake.devices_make_progress()

    def append(self, message: Any, delivery_tag: str) -> None:
        """Take note of a delivered message; where the worker holds it, the claim has recorded that already."""
        if not self._intake.deliveries.holds(delivery_tag):
            self._popped.add(delivery_tag)
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message; a claimed one also when the connection that it came on is gone."""
        if delivery_tag in self._popped:
            self._popped.discard(delivery_tag)
            super().ack(delivery_tag)
        else:
            self._intake.deliveries.acknowledge(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Requeue a message, or acknowledge it."""
        if delivery_tag in self._popped:
            self._popped.discard(delivery_tag)
            super().reject(delivery_tag, requeue)
        else:
            (self._intake.deliveries.requeue if requeue else self._intake.deliveries.acknowledge)(delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Requeue the messages whose jobs do not run yet: the channel closes. Running jobs continue."""
        if self.channel.has_claimed:
            self._intake.deliveries.requeue_waiting()
        super().restore_unacked_once(stderr)

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Restore what kombu popped for consumers that died; the worker's `Lease` sweeps what was claimed."""
        if self.channel.restorable_queues:
            super().restore_visible(*args, **options)
