"""What is true of a history, whatever its processes believe, and what must hold of them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.delivery.keys import Keys
from tests.histories.actors import Actor
from tests.histories.jobs import MAX_DELIVERIES
from tests.histories.messages import LIST, REPLIES, REPLY
from tests.histories.worker import BRIEF_S, LEASE_S, WorkerProcess

if TYPE_CHECKING:
    from tests.histories.servers import Server, VirtualConnection
    from tests.histories.world import World

KEYS = Keys()
_DIGEST_BYTES = 32  # what a snapshot begins with


class Broken(AssertionError):
    """What must hold did not."""


class Facts:
    """Is told of all that processes do, and compares it with what they may do.

    Args:
        world: what it is true of.

    Attributes:
        broken: what did not hold.
        replies: how many answers processes got from each other.
        ends: by task, the state that was stored.
        crashes: by task, the processes that died, or were taken for dead, with it.
        expires_at: by task, when it expires if it has had no slot by then.
        twice: tasks whose message was sent twice. What a job is told of crashes, and that its end stays, is not checked
            for them: a start has the name of a process, not of a message, so who looks at one message takes a process
            that runs the other one for a dead one. It fails a job only beside real crashes, and both messages store
            the end of one task in any case.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.broken: list[str] = []
        self.replies = 0
        self.ends: dict[str, str] = {}
        self.crashes: Counter[str] = Counter()
        self.expires_at: dict[str, float] = {}
        self.twice: set[str] = set()
        self._snapshots: set[str] = set()  # of tasks
        self._ever_had_slot: set[str] = set()
        self._had_slot: set[str] = set()  # tasks that had a slot in time, and of which that must be known
        self._recorded: dict[str, set[WorkerProcess]] = defaultdict(set)  # by task: processes that wrote its start
        self._died: dict[str, set[WorkerProcess]] = defaultdict(set)  # by task: those of them that were killed
        self._expired: set[str] = set()
        self._counted: set[str] = set()  # tags of messages that are among the crashes

    # What processes do

    def before_command(self, server: Server, command: Sequence[Any]) -> None:
        """Take note of a command that a process sends now."""
        if command[1:2] == (scripts.SWEEP,):
            self._expired = _held(server)

    def after_command(self, process: WorkerProcess, server: Server, command: Sequence[Any]) -> None:
        """Take note of what a command did that Redis has just done."""
        match command:
            case ("EVAL", scripts.SWEEP, *_):
                self._check_sweep(process, self._expired - _held(server))
            case ("EVAL", scripts.RECORD_STARTS, _, _, key, *_):
                starts: Any = server.ask("LRANGE", key, 0, -1)
                if process.deliveries._name.encode() in starts:
                    self._recorded[key.removeprefix(KEYS.starts(""))].add(process)
            case ("EVAL", scripts.REQUEUE, _, _, _, key, *_):
                self._recorded[key.removeprefix(KEYS.starts(""))].discard(process)
            case ("EVAL", scripts.ACKNOWLEDGE, _, _, _, key, *_):
                self.forget(key.removeprefix(KEYS.starts("")))
            case ("EVAL", scripts.SAVE_SNAPSHOT, _, _, key, _, snapshot, *_) if server.ask("EXISTS", key):
                if len(snapshot) > _DIGEST_BYTES:
                    self._snapshots.add(key.removeprefix(KEYS.snapshot("")))

    def on_fault(self, connection: VirtualConnection, was_idle: bool) -> None:
        """Take note that a process found a connection broken.

        Args:
            connection: the connection.
            was_idle: Redis has closed it because it was idle.
        """
        actor, process = Actor.current, connection.process
        if actor is None:
            return
        if actor.name.startswith("job-"):  # it may not be able to tell what Redis would have to know
            self._had_slot.discard(actor.name.split("-")[1])
        if actor.name == "main" and connection is not process.wake_up and not was_idle:
            process.must_reconnect = True

    def on_follow(self, process: WorkerProcess, server: Server) -> None:
        """Take note that a process takes its messages from a server from now on."""
        if process.followed not in (None, server):
            for delivery in process.deliveries._held.values():  # which the other server redelivers
                self.crashes[delivery.task_id] += 1
                self._had_slot.discard(delivery.task_id)
        process.followed = server

    def on_consumer_lost(self, process: WorkerProcess, error: Exception) -> None:
        """Check that a process lost its consumer by a connection that broke, not by one that was idle."""
        if not process.must_reconnect:
            self.broken.append(f"{process.host} lost its consumer, and only idle connections were closed: {error!r}")

    def on_reply(self, process: WorkerProcess, got: list[Any]) -> None:
        """Check that a process gets the reply of another one."""
        self.replies += 1
        if got != [REPLY]:
            self.broken.append(f"{process.host} got {got} for a reply")

    def on_bad(self, bad: Any) -> None:
        """Take note of a message that cannot be run."""
        self.broken.append(f"a message was refused: {bad.reason}")

    def on_recall(self, process: WorkerProcess, task_id: str, facts: JobFacts, tag: str) -> None:
        """Check what a job is told of its earlier workers."""
        told, most, least = len(facts.died_on), self.crashes[task_id], len(self._died[task_id])
        if task_id in self.twice:
            return  # the job's other message may be running, or may have been looked at
        if told > most:
            self.broken.append(f"{task_id} is told of {told} crashes, there were at most {most}")
        if not _has(process.followed, tag):
            return  # it was taken over while this worker was away: the message here is of an earlier time
        if told < least:
            self.broken.append(f"{task_id} is told of {told} crashes, there were {least}")
        if task_id in self._snapshots and facts.snapshot is None:
            self.broken.append(f"{task_id} was handed over, and starts anew")

    def on_slot(self, process: WorkerProcess, task_id: str, tag: str) -> None:
        """Check that a job gets its first slot before it expires."""
        late_s = self._world.now - self.expires_at.get(task_id, self._world.now)
        is_clock_true = process.wall_ahead_s == process.suspended_s == 0.0
        if late_s <= 1e-3:
            if _has(process.followed, tag):  # else no worker can hear of it
                self._had_slot.add(task_id)
        elif is_clock_true and task_id not in self._ever_had_slot:
            self.broken.append(f"{task_id} gets its first slot {late_s:.1f} s after it has expired")
        self._ever_had_slot.add(task_id)

    def on_stored(self, task_id: str, status: str, reason: str) -> None:
        """Check that a result never changes."""
        before = self.ends.setdefault(task_id, status)
        if task_id in self.twice:
            return
        is_late = before == "REVOKED" and task_id in self._ever_had_slot  # on a worker that could tell nobody of it
        if is_late:
            self.ends[task_id] = status
        elif before != status:
            self.broken.append(f"the result of {task_id} changed from {before} to {status}")
        if status == "FAILURE" and self.crashes[task_id] < MAX_DELIVERIES:
            self.broken.append(f"{task_id} failed")
        if status == "REVOKED" and task_id in self._had_slot:
            self.broken.append(f"{task_id} is {reason}, and had its slot in time")

    def check_pick_up(self, server: Server) -> bool:
        """Check that no worker sleeps while a job waits, now that everybody has done what was due.

        Returns:
            Whether there is a job that waits.
        """
        if not server.ask("EXISTS", LIST):
            return False
        for worker in self._world.workers.values():
            channel = worker.consumer
            if channel is None or worker.followed is not server or worker.is_away() or not channel.qos.can_consume():
                continue
            will_look = channel._schedule.is_due(worker.monotonic())  # when its event loop turns, within a second
            if channel._wake_up.tracks(channel.client.connection) and not will_look:
                self.broken.append(f"{worker.host} has room, knows of no job, and one waits")
        return True

    def check_end(self) -> None:
        """Check that every job has ended once, and that Redis holds nothing but results."""
        for task_id in self._world.sent:
            raw: Any = self._world.results.client.get(f"celery-task-meta-{task_id}")
            if raw is None:
                raise Broken(f"{task_id} has not ended")
            status = json.loads(raw)["status"]
            if status != self.ends.get(task_id, status) and task_id not in self.twice:
                raise Broken(f"the result of {task_id} was {self.ends[task_id]} and is {status}")
        for server in self._world.servers:
            keys = sorted(key.decode() for key in server.client.scan_iter())
            if left := [key for key in keys if key != REPLIES and not key.startswith("_kombu")]:
                raise Broken(f"Redis still has {left}")

    # What happens to processes and to Redis

    def count_crashes(self, worker: WorkerProcess) -> None:
        """Count a crash for each job that a worker holds, or of which it could not tell Redis that it ended."""
        held = worker.deliveries._held
        for tag in held.keys() | worker.deliveries._unsent_moves.keys():
            self._counted.add(tag)
            self.crashes[worker.tasks.get(tag, "")] += 1
        for tag in held:
            if worker in self._recorded[task_id := worker.tasks.get(tag, "")]:
                self._died[task_id].add(worker)
            else:
                self._had_slot.discard(task_id)

    def forget(self, task_id: str) -> None:
        """Forget what must be known of a job's earlier workers: Redis does."""
        self._snapshots.discard(task_id)
        self._had_slot.discard(task_id)
        self._recorded.pop(task_id, None)
        self._died.pop(task_id, None)

    def on_failover(self, sent: Sequence[str]) -> None:
        """Take note that Redis has lost what it did last.

        Args:
            sent: the tasks that it still knows.
        """
        self.ends = {}
        for task_id in sent:
            self.forget(task_id)
            self.crashes[task_id] += 1  # a message that comes back as held looks as if its holder had died

    def _check_sweep(self, sweeper: WorkerProcess, tags: set[str]) -> None:
        """Check that a sweep took no message from a worker that lives and could renew, or was not alone away."""
        for holder in self._world.workers.values():
            for tag in tags & holder.tasks.keys() - self._counted:  # perhaps it is just about to be moved
                self._counted.add(tag)
                self.crashes[holder.tasks[tag]] += 1
            for tag in tags & holder.deliveries._held.keys():
                if holder.is_dead:
                    continue
                task_id = holder.deliveries._held[tag].task_id
                alone_s = holder.away_alone_s(sweeper)
                if alone_s < LEASE_S - 2 * BRIEF_S and holder.followed is sweeper.followed:
                    self.broken.append(
                        f"{sweeper.host} takes {task_id} from {holder.host}, which lives and was away alone for"
                        f" {alone_s:.1f} s"
                    )


def _has(server: Server | None, tag: str) -> bool:
    """Return whether a server has a message as held."""
    return server is not None and bool(server.ask("HEXISTS", KEYS.held, tag))


def _held(server: Server) -> set[str]:
    """Return the tags of the held messages."""
    tags: Any = server.ask("ZRANGE", KEYS.leases, 0, -1)
    return {tag.decode() for tag in tags}
