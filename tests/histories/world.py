"""Everything that a history is about: true time, Redis, worker processes, jobs, and what must hold of them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import redis

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.job_facts import JobFacts
from sdtpu_worker.delivery.keys import Keys
from tests.histories.actors import Actor, Fate
from tests.histories.messages import LIST, job_message
from tests.histories.worker import BRIEF_S, LEASE_S, MAX_DELIVERIES, WorkerProcess

BEGIN = 1_700_000_000.0
KEYS = Keys()
MOST_TURNS = 2_000
"""How often time may move forward within one step."""


class Broken(AssertionError):
    """What must hold did not."""


class World:
    """Redis, the processes and the clocks of one history.

    Args:
        client: of the Redis, which is emptied.
        socket: the path of the Unix socket on which it listens.
    """

    def __init__(self, client: redis.Redis, socket: str) -> None:
        self.client, self.socket = client, socket
        self.now, self.redis_ahead_s = BEGIN, 0.0
        self.workers: dict[str, WorkerProcess] = {}
        self.job_s: dict[str, float] = {}  # by task: seconds on the devices
        self.sent: dict[str, float] = {}  # the same, without the jobs that Redis has lost
        self.ends: dict[str, str] = {}
        self.crashes: Counter[str] = Counter()  # by task: processes that died, or were taken for dead, with it
        self._stall_before_sweep_s = 0.0
        self._count, self.failovers = 0, 0
        self._twice: set[str] = set()  # of tasks; a worker that runs the other message counts as one that died with it
        self._snapshots: set[str] = set()  # of tasks
        self._recorded: dict[str, set[WorkerProcess]] = defaultdict(set)  # by task: processes that wrote its start
        self._died: dict[str, set[WorkerProcess]] = defaultdict(set)  # by task: those of them that were killed
        self._replica: dict[Any, Any] | None = None
        self._replicated: dict[str, float] = {}
        self._expired: set[str] = set()
        self._broken: list[str] = []
        client.flushdb()

    # What a history's steps do

    def send(self, job_s: float, delay_s: float = 0.0) -> None:
        """Have a client enqueue a job, which is on the devices for some seconds, and due after some seconds."""
        task_id = f"t{self._count}"
        self._count += 1
        self.sent[task_id] = self.job_s[task_id] = job_s
        self._enqueue(task_id, delay_s)

    def send_again(self, number: int) -> None:
        """Have a client that got no answer enqueue a job once more."""
        if self.sent:
            task_id = list(self.sent)[number % len(self.sent)]
            self._twice.add(task_id)
            self._enqueue(task_id, 0.0)

    def _enqueue(self, task_id: str, delay_s: float) -> None:
        self.client.lpush(LIST, job_message(task_id, self.now + delay_s if delay_s else None))

    def start(self, host: str) -> None:
        """Start a worker, unless it runs."""
        if host not in self.workers or self.workers[host].is_dead:
            self.workers[host] = WorkerProcess(self, host)

    def kill(self, host: str) -> None:
        """Kill a worker."""
        if (worker := self._alive(host)) is not None:
            self._count_crashes(worker)
            worker.kill()

    def stop(self, host: str) -> None:
        """Have a worker stop (SIGTERM)."""
        if (worker := self._alive(host)) is not None:
            worker.stop()

    def cut(self, host: str) -> None:
        """Cut a worker off from Redis."""
        if (worker := self._alive(host)) is not None and not worker.is_cut_off:
            worker.is_cut_off = True
            worker.go_away(worker.away)

    def mend(self, host: str) -> None:
        """Connect a worker to Redis again, and have its devices make progress."""
        if (worker := self._alive(host)) is not None and (worker.is_cut_off or worker.is_hung):
            worker.is_cut_off = worker.is_hung = False
            worker.come_back()

    def hang(self, host: str) -> None:
        """Have a worker's devices make no progress."""
        if (worker := self._alive(host)) is not None and not worker.is_hung:
            worker.is_hung = True
            worker.go_away(worker.hung)

    def evict(self, number: int) -> None:
        """Have Redis forget what it keeps of a job beside its message."""
        task_id = list(self.sent)[number % len(self.sent)] if self.sent else ""
        self.client.delete(KEYS.starts(task_id), KEYS.snapshot(task_id))
        self._forget(task_id)

    def replicate(self) -> None:
        """Have a replica of Redis get all that was written so far, and nothing more."""
        self._replica = {key: self.client.dump(key) for key in self.client.scan_iter()}
        self._replicated = dict(self.sent)

    def fail_over(self) -> None:
        """Have the replica take Redis' place: later writes are lost, and every connection breaks."""
        if self._replica is None:
            return
        self.client.flushdb()
        for key, dumped in self._replica.items():
            self.client.restore(key, 0, dumped)
        self.failovers, self.sent = self.failovers + 1, self._replicated
        self.ends = {}
        for task_id in self.sent:
            self._forget(task_id)
            self.crashes[task_id] += 1  # a message that comes back as held looks as if its holder had died

    def step_wall(self, host: str, seconds: float) -> None:
        """Step the wall clock of a worker's machine."""
        if (worker := self._alive(host)) is not None:
            worker.wall_ahead_s += seconds

    def pause(self, host: str, is_suspended: bool = False) -> None:
        """Stop a worker process (SIGSTOP), or suspend its machine, whose monotonic clock then stands still."""
        if (worker := self._alive(host)) is not None and not worker.is_paused:
            worker.is_paused, worker.is_suspended, worker.paused_at = True, is_suspended, self.now
            worker.go_away(worker.away)

    def resume(self, host: str) -> None:
        """Let a paused worker process go on."""
        if (worker := self._alive(host)) is not None and worker.is_paused:
            worker.is_paused = False
            if worker.is_suspended:
                worker.suspended_s += self.now - worker.paused_at
            worker.come_back()

    def stall_before_sweep(self, seconds: float) -> None:
        """Have everything but Redis stand still when a worker is just about to sweep."""
        self._stall_before_sweep_s = seconds

    def step_redis(self, seconds: float) -> None:
        """Step Redis' clock."""
        self.redis_ahead_s += seconds

    def run(self, host: str, name: str, commands: int, fate: Fate = Fate.DONE) -> None:
        """Let an actor of a worker send some commands; `job` is the first job that can run."""
        worker = self._alive(host)
        names = [] if worker is None else [each for each in worker.runnable() if each.startswith(name)]
        if worker is not None and names:
            worker.actors[names[0]].run(commands, fate)
            self._check_errors()

    def advance(self, seconds: float) -> None:
        """Let time pass in which every process that can run does all that is due."""
        end = self.now + seconds
        for _ in range(MOST_TURNS):
            due = [(w.due_at(n), w, n) for w in self.workers.values() for n in w.runnable()]
            at = min((each[0] for each in due), default=end)
            if at > end or not due:
                break
            self.now = max(self.now, at)
            for _, worker, name in [each for each in due if each[0] <= self.now + 1e-6]:
                if name in worker.runnable():
                    worker.actors[name].run()
            self._check_errors()
        else:
            raise Broken(f"{sorted((w.host, n, t - self.now) for t, w, n in due)} never waits")
        self.now = max(self.now, end)

    def redelivered(self) -> int:
        """Return how many messages the workers' sweeps redelivered."""
        return sum(worker.deliveries.redelivered for worker in self.workers.values())

    def redis_time(self) -> tuple[str, str]:
        """Return what Redis' command TIME would: the seconds and the microseconds."""
        seconds, fraction = divmod(self.now + self.redis_ahead_s, 1)
        return str(int(seconds)), str(int(fraction * 1e6))

    # What processes tell

    def before_command(self, command: Sequence[Any]) -> None:
        """Take note of a command that a process sends now."""
        script = command[1] if len(command) > 1 else ""
        actor, Actor.current = Actor.current, None
        if script == scripts.SWEEP and self._stall_before_sweep_s:
            for worker in self.workers.values():
                if not (worker.is_paused or worker.is_cut_off):  # else it is away already
                    worker.away.append((self.now, self.now + self._stall_before_sweep_s))
            self.now += self._stall_before_sweep_s
            self._stall_before_sweep_s = 0.0
        if script == scripts.SWEEP:
            self._expired = self._held()
        Actor.current = actor

    def after_command(self, process: WorkerProcess, command: Sequence[Any]) -> None:
        """Take note of what a command did that Redis has just done."""
        actor, Actor.current = Actor.current, None
        match command:
            case ("EVAL", scripts.SWEEP, *_):
                self._check_sweep(process, self._expired - self._held())
            case ("EVAL", scripts.RECORD_STARTS, _, _, key, *_):
                starts: Any = self.client.lrange(key, 0, -1)
                if process.deliveries._name.encode() in starts:
                    self._recorded[key.removeprefix(KEYS.starts(""))].add(process)
            case ("EVAL", scripts.REQUEUE, _, _, _, key, *_):
                self._recorded[key.removeprefix(KEYS.starts(""))].discard(process)
            case ("EVAL", scripts.ACKNOWLEDGE, _, _, _, key, *_):
                self._forget(key.removeprefix(KEYS.starts("")))
            case ("EVAL", scripts.SAVE_SNAPSHOT, _, _, key, *_) if self.client.exists(key):
                self._snapshots.add(key.removeprefix(KEYS.snapshot("")))
        Actor.current = actor

    def on_bad(self, bad: Any) -> None:
        """Take note of a message that cannot be run."""
        self._broken.append(f"a message was refused: {bad.reason}")

    def on_recall(self, task_id: str, facts: JobFacts, tag: str) -> None:
        """Check what a job is told of its earlier workers."""
        told, most, least = len(facts.died_on), self.crashes[task_id], len(self._died[task_id])
        if task_id in self._twice:
            return  # the job's other message may be running, or may have been looked at
        if told > most:
            self._broken.append(f"{task_id} is told of {told} crashes, there were at most {most}")
        if not self.client.hexists(KEYS.held, tag):
            return  # it was taken over while this worker was away: the message here is of an earlier time
        if told < least:
            self._broken.append(f"{task_id} is told of {told} crashes, there were {least}")
        if task_id in self._snapshots and facts.snapshot is None:
            self._broken.append(f"{task_id} was handed over, and starts anew")

    def on_stored(self, task_id: str, status: str) -> None:
        """Check that a result never changes."""
        before = self.ends.setdefault(task_id, status)
        if before != status and task_id not in self._twice:
            self._broken.append(f"the result of {task_id} changed from {before} to {status}")
        if status == "FAILURE" and self.crashes[task_id] < MAX_DELIVERIES and task_id not in self._twice:
            self._broken.append(f"{task_id} failed")

    # What must hold

    def finish(self) -> None:
        """Mend everything, let the workers work, and check that every job has ended and nothing is left."""
        for host in list(self.workers):
            self.resume(host)
            self.mend(host)
        if all(worker.is_dead or worker.is_stopping for worker in self.workers.values()):
            self.start("the last")
        for _ in range(60):
            self.advance(LEASE_S / 6)
            if not self.client.exists(LIST, KEYS.held):
                break
        self.check_end()

    def check_end(self) -> None:
        """Check that every job has ended once, and that Redis holds nothing but results."""
        for task_id in self.sent:
            raw: Any = self.client.get(f"celery-task-meta-{task_id}")
            if raw is None:
                raise Broken(f"{task_id} has not ended")
            status = json.loads(raw)["status"]
            if status != self.ends.get(task_id, status) and task_id not in self._twice:
                raise Broken(f"the result of {task_id} was {self.ends[task_id]} and is {status}")
        keys = sorted(key.decode() for key in self.client.scan_iter())
        left = [key for key in keys if not key.startswith(("celery-task-meta-", "_kombu"))]
        if left:
            raise Broken(f"Redis still has {left}")

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            if not worker.is_dead:
                worker.kill()

    def _alive(self, host: str) -> WorkerProcess | None:
        worker = self.workers.get(host)
        return None if worker is None or worker.is_dead else worker

    def _count_crashes(self, worker: WorkerProcess) -> None:
        """Count a crash for each job that a worker holds, or of which it could not tell Redis that it ended."""
        for tag in worker.deliveries._held.keys() | worker.deliveries._unsent_moves.keys():
            self.crashes[worker.tasks.get(tag, "")] += 1
        for tag in worker.deliveries._held:
            if worker in self._recorded[task_id := worker.tasks.get(tag, "")]:
                self._died[task_id].add(worker)

    def _forget(self, task_id: str) -> None:
        """Forget what must be known of a job's earlier workers: Redis does."""
        self._snapshots.discard(task_id)
        self._recorded.pop(task_id, None)
        self._died.pop(task_id, None)

    def _check_errors(self) -> None:
        for worker in self.workers.values():
            if worker.has_left and not worker.is_dead:
                self._count_crashes(worker)
                worker.kill()
        if self._broken:
            raise Broken(self._broken[0])
        for worker in self.workers.values():
            for actor in worker.actors.values():
                if actor.error is not None:
                    raise actor.error

    def _held(self) -> set[str]:
        """Return the tags of the held messages."""
        tags: Any = self.client.zrange(KEYS.leases, 0, -1)
        return {tag.decode() for tag in tags}

    def _check_sweep(self, sweeper: WorkerProcess, tags: set[str]) -> None:
        """Check that a sweep took no message from a worker that lives and could renew, or was not alone away."""
        for holder in self.workers.values():
            for tag in tags & holder.deliveries._held.keys():
                if holder.is_dead:
                    continue
                task_id = holder.deliveries._held[tag].task_id
                self.crashes[task_id] += 1
                alone_s = holder.away_alone_s(sweeper)
                if alone_s < LEASE_S - 2 * BRIEF_S:
                    self._broken.append(
                        f"{sweeper.host} takes {task_id} from {holder.host}, which lives and was away alone for"
                        f" {alone_s:.1f} s"
                    )
