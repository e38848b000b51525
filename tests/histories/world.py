"""Everything that a history is about: true time, Redis, worker processes, jobs, and what must hold of them."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from typing import Any

import redis

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.keys import Keys
from tests.histories.actors import Actor, Fate
from tests.histories.virtual_redis import TIME_KEY
from tests.histories.worker import LEASE_S, QUEUE, TASK, WorkerProcess

BEGIN = 1_700_000_000.0
KEYS = Keys()
LIST = QUEUE + "\x06\x166"
BRIEF_S = LEASE_S / 3
"""A pause, or a step of Redis' clock, of fewer seconds is none: leases are renewed that often."""
MOST_TURNS = 2_000
"""How often time may move forward within one step."""
_BODY = b64encode(b'[["x"], {"seed": 1}, {}]').decode()


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
        self.sent: dict[str, float] = {}  # by task: seconds on the devices
        self.ends: dict[str, str] = {}
        self.crashes: Counter[str] = Counter()  # by task: processes that died, or were taken for dead, with it
        self._written_time = -1.0
        self._stall_before_sweep_s = 0.0
        self._expired: set[str] = set()
        self._broken: list[str] = []
        client.flushdb()

    # What a history's steps do

    def send(self, job_s: float) -> None:
        """Have a client enqueue a job, which is on the devices for some seconds."""
        task_id = f"t{len(self.sent)}"
        self.sent[task_id] = job_s
        properties = {
            "correlation_id": task_id, "delivery_tag": task_id, "body_encoding": "base64", "priority": 6,
            "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": QUEUE},
        }  # fmt: skip
        headers = {"lang": "py", "task": TASK, "id": task_id, "root_id": task_id}
        message = {
            "body": _BODY, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers,
            "properties": properties,
        }  # fmt: skip
        self.client.lpush(LIST, json.dumps(message))

    def start(self, host: str) -> None:
        """Start a worker, unless it runs."""
        if host not in self.workers or self.workers[host].is_dead:
            self.workers[host] = WorkerProcess(self, host)

    def kill(self, host: str) -> None:
        """Kill a worker."""
        if (worker := self._alive(host)) is not None:
            for delivery in worker.deliveries._held.values():
                self.crashes[delivery.task_id] += 1
            worker.kill()

    def pause(self, host: str, is_suspended: bool = False) -> None:
        """Stop a worker process (SIGSTOP), or suspend its machine, whose monotonic clock then stands still."""
        if (worker := self._alive(host)) is not None and not worker.is_paused:
            worker.is_paused, worker.is_suspended = True, is_suspended
            worker.away.append((self.now, math.inf))

    def resume(self, host: str) -> None:
        """Let a paused worker process go on."""
        if (worker := self._alive(host)) is not None and worker.is_paused:
            worker.is_paused = False
            worker.away[-1] = (worker.away[-1][0], self.now)
            if worker.is_suspended:
                worker.suspended_s += self.now - worker.away[-1][0]

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
        self.now = end

    def redelivered(self) -> int:
        """Return how many messages the workers' sweeps redelivered."""
        return sum(worker.deliveries.redelivered for worker in self.workers.values())

    # What processes tell

    def before_command(self, process: WorkerProcess, script: str) -> None:
        """Take note of a command that a process sends now."""
        actor, Actor.current = Actor.current, None
        if script == scripts.SWEEP and self._stall_before_sweep_s:
            for worker in self.workers.values():
                worker.away.append((self.now, self.now + self._stall_before_sweep_s))
            self.now += self._stall_before_sweep_s
            self._stall_before_sweep_s = 0.0
        redis_time = self.now + self.redis_ahead_s
        if redis_time != self._written_time:
            seconds, fraction = divmod(redis_time, 1)
            with self.client.pipeline() as pipe:
                pipe.delete(TIME_KEY)
                pipe.rpush(TIME_KEY, int(seconds), int(fraction * 1e6))
                pipe.execute()
            self._written_time = redis_time
        if script == scripts.SWEEP:
            self._expired = self._held()
        Actor.current = actor

    def after_command(self, process: WorkerProcess, script: str) -> None:
        """Take note of what a command did that Redis has just done."""
        if script == scripts.SWEEP:
            actor, Actor.current = Actor.current, None
            self._check_sweep(process, self._expired - self._held())
            Actor.current = actor

    def on_bad(self, bad: Any) -> None:
        """Take note of a message that cannot be run."""
        self._broken.append(f"a message was refused: {bad.reason}")

    def on_recall(self, task_id: str, died_on: Sequence[str]) -> None:
        """Check what a job is told of its earlier workers."""
        if len(died_on) > self.crashes[task_id]:
            self._broken.append(f"{task_id} is told of {len(died_on)} crashes, there were {self.crashes[task_id]}")

    def on_stored(self, task_id: str, status: str) -> None:
        """Check that a result never changes."""
        before = self.ends.setdefault(task_id, status)
        if before != status:
            self._broken.append(f"the result of {task_id} changed from {before} to {status}")
        if status == "FAILURE":
            self._broken.append(f"{task_id} failed")

    # What must hold

    def finish(self) -> None:
        """Mend everything, let the workers work, and check that every job has ended and nothing is left."""
        for host in list(self.workers):
            self.resume(host)
        if not any(not worker.is_dead for worker in self.workers.values()):
            self.start("a")
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
            if (status := json.loads(raw)["status"]) != self.ends.get(task_id, status):
                raise Broken(f"the result of {task_id} was {self.ends[task_id]} and is {status}")
        keys = sorted(key.decode() for key in self.client.scan_iter())
        left = [key for key in keys if not key.startswith(("celery-task-meta-", TIME_KEY, "_kombu"))]
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

    def _check_errors(self) -> None:
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
                alone_s = _alone_away_s(holder, sweeper, self.now)
                if alone_s < LEASE_S - 2 * BRIEF_S:
                    self._broken.append(
                        f"{sweeper.host} takes {task_id} from {holder.host}, which lives and was away alone for"
                        f" {alone_s:.1f} s"
                    )


def _alone_away_s(holder: WorkerProcess, sweeper: WorkerProcess, now: float) -> float:
    """Return for how long a worker was away just now while another one was not, in seconds."""
    begin, end = holder.away[-1] if holder.away else (-math.inf, -math.inf)
    if now - end > BRIEF_S:
        return 0.0  # it is back, and has had the time to renew its leases
    begin, end = max(begin, sweeper.started_at), min(end, now)
    both_s = sum(max(0.0, min(end, until) - max(begin, since)) for since, until in sweeper.away)
    return max(0.0, end - begin - both_s)
