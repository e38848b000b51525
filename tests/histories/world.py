"""Everything that a history is about: true time, two Redis servers, worker processes, and what happens to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdtpu_worker.delivery import scripts
from sdtpu_worker.delivery.transport import EagerConnection
from tests.histories.actors import Actor, Fate
from tests.histories.facts import KEYS, Broken, Facts
from tests.histories.messages import LIST, REPLIES, job_message, reply_message
from tests.histories.servers import Server
from tests.histories.worker import LEASE_S, WorkerProcess

BEGIN = 1_700_000_000.0
SERVERS = ("first", "second")
"""The host names of the servers, in the order in which `broker_url` has them."""
MOST_TURNS = 2_000
"""How often time may move forward within one step."""
_PUTTING_SCRIPTS = [(script,) for script in (scripts.REQUEUE, scripts.SWEEP, scripts.REQUEUE_DUE)]
"""Those that put messages into queues."""


class World:
    """Redis, the processes and the clocks of one history.

    Args:
        socket: the path of the Unix socket on which a Redis listens, whose databases stand for servers.

    Attributes:
        protocol: the version of Redis' protocol that workers speak.
        servers: those from which workers take messages, in the order of `broker_url`.
        results: the server that has the results.
        client: of the first server.
        facts: what is true, and what did not hold.
        workers: the latest process of each host.
        job_s: by task, seconds on the devices.
        notices_overtake: what Redis says on one connection arrives before what it has said on another.
    """

    def __init__(self, socket: str) -> None:
        self.protocol = 3
        self.now, self.redis_ahead_s = BEGIN, 0.0
        self.servers = [Server(socket, i) for i in range(len(SERVERS))]
        self.results = Server(socket, len(SERVERS))
        self.everything = (*self.servers, self.results)
        self.client = self.servers[0].client
        self.facts = Facts(self)
        self.workers: dict[str, WorkerProcess] = {}
        self.job_s: dict[str, float] = {}
        self.sent: dict[str, float] = {}  # the same, without the jobs that Redis has lost
        self.notices_overtake = False
        self._stall_before_sweep_s = 0.0
        self._count, self._clients_use = 0, 0
        self._replica: tuple[int, dict[Any, Any], dict[Any, Any]] | None = None
        self._replicated: dict[str, float] = {}
        self._is_settled, self._has_no_queue, self._may_be_deferred = True, True, False

    def connection(self, **_: Any) -> EagerConnection:
        """Return a connection to the broker, not made yet: what an app's `connection_for_read` returns."""
        return EagerConnection(";".join(f"redis://{name}" for name in SERVERS))

    def server_of(self, name: str) -> Server:
        """Return the server of a host name."""
        return self.servers[SERVERS.index(name)]

    # What a history's steps do

    def send(self, job_s: float, delay_s: float = 0.0, expires_s: float = 0.0) -> None:
        """Have a client enqueue a job.

        Args:
            job_s: how long it is on the devices.
            delay_s: it is due after so many seconds.
            expires_s: it expires after so many seconds; 0.0 for never.
        """
        task_id = f"t{self._count}"
        self._count += 1
        if expires_s:
            self.facts.expires_at[task_id] = self.now + expires_s
        if self._enqueue(task_id, delay_s):
            self.sent[task_id] = self.job_s[task_id] = job_s

    def send_again(self, number: int) -> None:
        """Have a client that got no answer enqueue a job once more."""
        if self.sent:
            task_id = list(self.sent)[number % len(self.sent)]
            self.facts.twice.add(task_id)
            self._enqueue(task_id)

    def _enqueue(self, task_id: str, delay_s: float = 0.0) -> bool:
        """Send a message to the server that clients use; return whether there is one that is up."""
        if self.servers[self._clients_use].is_down:
            self._clients_use = 1 - self._clients_use
        if (server := self.servers[self._clients_use]).is_down:
            return False
        due_at = self.now + delay_s if delay_s else None
        server.client.lpush(LIST, job_message(task_id, due_at, self.facts.expires_at.get(task_id)))
        self._is_settled = self._has_no_queue = False
        self._may_be_deferred |= delay_s > 0
        return True

    def reply(self, server: Server) -> None:
        """Have a worker answer another one."""
        server.client.delete(REPLIES)  # to one that was killed since it asked
        server.client.lpush(REPLIES, reply_message())
        self._is_settled = False

    def go_down(self, number: int) -> None:
        """End a server; it keeps what it has."""
        self.servers[number].is_down = True
        self.servers[number].close_connections()

    def come_up(self, number: int) -> None:
        """Start a server again."""
        self.servers[number].is_down = False

    def limit_idleness(self, seconds: float) -> None:
        """Have Redis close idle connections (`timeout`)."""
        for server in self.everything:
            server.timeout_s = seconds

    def drop_wake_up(self, host: str) -> None:
        """Close the connection on which a worker is told of new messages."""
        worker = self._alive(host)
        if worker is not None and (connection := worker.wake_up) is not None:
            connection.close_from_afar()

    def speak(self, version: int) -> None:
        """Have workers that start from now on speak a version of Redis' protocol."""
        self.protocol = version

    def overtake(self) -> None:
        """Have notices arrive before the replies of claims, or after them again."""
        self.notices_overtake = not self.notices_overtake

    def ask(self, host: str) -> None:
        """Have a worker ask another one (mingle, inspect)."""
        if (worker := self._alive(host)) is not None and not worker.is_stopping:
            worker.ask()

    def start(self, host: str) -> None:
        """Start a worker, unless it runs."""
        if host not in self.workers or self.workers[host].is_dead:
            self.workers[host] = WorkerProcess(self, host)

    def kill(self, host: str) -> None:
        """Kill a worker."""
        if (worker := self._alive(host)) is not None:
            self.facts.count_crashes(worker)
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
        for server in self.servers:
            server.client.delete(KEYS.starts(task_id), KEYS.snapshot(task_id))
        self.facts.forget(task_id)

    def replicate(self, number: int = 0) -> None:
        """Have a replica of a server get all that was written so far, and nothing more."""
        self._replica = number, self.servers[number].dump(), self.results.dump()
        self._replicated = dict(self.sent)

    def fail_over(self, to: int = 0) -> None:
        """Have the replica take its server's place: later writes are lost, and every connection breaks.

        Args:
            to: 0 if the replica gets the name of its server; 1 if it is the other server of `broker_url`, which must
                hold nothing of its own. What was the server is then its replica, and empty.
        """
        if self._replica is None:
            return
        number, messages, results = self._replica
        old, new = self.servers[number], self.servers[(number + to) % 2]
        if new is not old and any(True for _ in new.client.scan_iter()):
            return
        old.restore({})
        new.restore(messages)
        self.results.restore(results)
        for server in self.everything:
            server.close_connections()
        if new is not old:
            old.is_down, new.is_down = True, False
        self.sent, self._replica, self._has_no_queue = dict(self._replicated), None, False
        self.facts.on_failover(list(self.sent))

    def step_wall(self, host: str, seconds: float) -> None:
        """Step the wall clock of a worker's machine."""
        if (worker := self._alive(host)) is not None:
            worker.wall_ahead_s += seconds

    def pause(self, host: str, is_suspended: bool = False) -> None:
        """Stop a worker process (SIGSTOP), or suspend its machine, whose monotonic clock then stands still."""
        if (worker := self._alive(host)) is not None and not worker.is_paused:
            worker.pause(is_suspended)

    def resume(self, host: str) -> None:
        """Let a paused worker process go on."""
        if (worker := self._alive(host)) is not None and worker.is_paused:
            worker.resume()

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
            if at > self.now and not self._has_no_queue:
                waits = [self.facts.check_pick_up(server) for server in self.servers]
                self._has_no_queue = not any(waits)
            self.now = max(self.now, at)
            for server in self.everything:
                server.close_idle_connections(self.now)
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

    def before_command(self, server: Server, command: Sequence[Any]) -> None:
        """Take note of a command that a process sends now."""
        actor, Actor.current = Actor.current, None
        if command[1:2] == (scripts.SWEEP,) and self._stall_before_sweep_s:
            for worker in self.workers.values():
                if not (worker.is_paused or worker.is_cut_off):  # else it is away already
                    worker.away.append((self.now, self.now + self._stall_before_sweep_s))
            self.now += self._stall_before_sweep_s
            self._stall_before_sweep_s = 0.0
        self.facts.before_command(server, command)
        Actor.current = actor

    def after_command(self, process: WorkerProcess, server: Server, command: Sequence[Any]) -> None:
        """Take note of what a command did that Redis has just done."""
        actor, Actor.current = Actor.current, None
        if command[1:2] in _PUTTING_SCRIPTS and (self._may_be_deferred or command[1] != scripts.REQUEUE_DUE):
            self._is_settled = self._has_no_queue = False
        self.facts.after_command(process, server, command)
        Actor.current = actor

    def settle(self) -> None:
        """Wait until Redis has sent all its notices: those of a command are sent before the next one is answered."""
        if not self._is_settled:
            self.servers[0].ask("PING")
            self._is_settled = True

    # What must hold

    def finish(self) -> None:
        """Mend everything, let the workers work, and check that every job has ended and nothing is left."""
        self.limit_idleness(0.0)
        for number in range(len(self.servers)):
            self.come_up(number)
        for host in list(self.workers):
            self.resume(host)
            self.mend(host)
        if all(worker.is_dead or worker.is_stopping for worker in self.workers.values()):
            self.start("the last")
        for turn in range(120):
            self.advance(LEASE_S / 6)
            busy = [i for i, server in enumerate(self.servers) if server.ask("EXISTS", LIST, KEYS.held)]
            if not busy:
                break
            if turn % 20 == 19:  # the workers may all be at the other server, which has nothing
                self._visit(busy[0])
        self.facts.check_end()

    def _visit(self, number: int) -> None:
        """Have the workers go over to a server."""
        self.go_down(1 - number)
        self.advance(LEASE_S / 6)
        self.come_up(1 - number)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            if not worker.is_dead:
                worker.kill()

    def _alive(self, host: str) -> WorkerProcess | None:
        worker = self.workers.get(host)
        return None if worker is None or worker.is_dead else worker

    def _check_errors(self) -> None:
        for worker in self.workers.values():
            if worker.has_left and not worker.is_dead:
                self.facts.count_crashes(worker)
                worker.kill()
        if self.facts.broken:
            raise Broken(self.facts.broken[0])
        for worker in self.workers.values():
            for actor in worker.actors.values():
                if actor.error is not None:
                    raise actor.error
