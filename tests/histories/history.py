"""A history: steps drawn from a seed, run in a world, and made as short as they can be when something breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.histories.actors import Fate
from tests.histories.worker import LEASE_S
from tests.histories.world import World

HOSTS = ("a", "b")


@dataclass(frozen=True)
class Step:
    """A method of `World` with its arguments; where it makes no sense, it does nothing."""

    name: str
    arguments: tuple[Any, ...] = ()

    def apply(self, world: World) -> None:
        """Do it."""
        getattr(world, self.name)(*self.arguments)

    def __str__(self) -> str:
        shown = (str(each) if isinstance(each, Fate) else repr(each) for each in self.arguments)
        return f"world.{self.name}({', '.join(shown)})"


def draw(seed: int, length: int = 25) -> list[Step]:
    """Return the steps of a history.

    Args:
        seed: the same one draws the same steps.
        length: about how many.
    """
    random = Random(seed)
    steps = [Step("start", (host,)) for host in HOSTS]
    if random.random() < 0.2:
        steps.insert(0, Step("limit_idleness", (random.choice((1.5, 3.0)),)))
    if random.random() < 0.2:
        steps.insert(0, Step("speak", (2,)))
    for _ in range(random.randint(1, 3)):
        steps += _sends(random)
    kinds, weights = zip(*_KINDS, strict=True)
    while len(steps) < length:
        steps += random.choices(kinds, weights)[0](random)
    return steps


def run(steps: Iterable[Step], world: World) -> None:
    """Run the steps of a history to its end.

    Raises:
        Exception: something broke.
    """
    try:
        for step in steps:
            step.apply(world)
        world.finish()
    finally:
        world.close()


def shrink(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """Return a part of the steps that still fails, and of which no step can be left out.

    Args:
        steps: a history that fails.
        fails: runs steps in a new world and says whether they fail.
    """
    kept, size = list(steps), len(steps) // 2
    while size:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if fails(fewer):
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def _sends(random: Random) -> list[Step]:
    """Enqueue a short job or a long one; some expire, some are due later."""
    job_s = random.choice((1.0, 1.5 * LEASE_S))
    if random.random() < 0.7:
        return [Step("send", (job_s,))]
    delay_s = round(random.uniform(0.5, 2) * LEASE_S, 1) if random.random() < 0.4 else 0.0
    expires_s = round(delay_s + random.uniform(0.2, 3) * LEASE_S, 1) if random.random() < 0.7 else 0.0
    return [Step("send", (job_s, delay_s, expires_s))]


def _runs(random: Random) -> list[Step]:
    """Let an actor go on for a few commands; seldom, the last one meets a broken connection."""
    fate = random.choices(list(Fate), (20, 1, 1))[0]
    return [Step("run", (random.choice(HOSTS), random.choice(("main", "lease", "job")), random.randint(1, 8), fate))]


def _pauses_together(random: Random) -> list[Step]:
    """Pause all workers, for about a lease or more, and let them go on one after the other."""
    order = random.sample(HOSTS, len(HOSTS))
    is_suspended = random.random() < 0.5
    steps = [Step("pause", (host, is_suspended)) for host in order]
    steps.append(Step("advance", (round(random.uniform(0.5, 2.5) * LEASE_S, 1),)))
    for host in random.sample(HOSTS, len(HOSTS)):
        steps += [Step("resume", (host,)), *_runs(random)]
    return steps


def _away(random: Random) -> list[Step]:
    """Cut a worker off, or have its devices hang, for a while."""
    host = random.choice(HOSTS)
    steps = [Step(random.choice(("cut", "hang")), (host,)), *_runs(random)]
    steps.append(Step("advance", (round(random.uniform(0.1, 2) * LEASE_S, 1),)))
    return [*steps, *_runs(random), Step("mend", (host,))]


def _failover(random: Random) -> list[Step]:
    """Have a replica that misses the last writes take over, under its server's name or as the next of `broker_url`."""
    steps = [Step("replicate", (int(random.random() < 0.2),))]
    for _ in range(random.randint(1, 4)):
        steps += random.choice((_runs, _sends))(random)
    return [*steps, Step("fail_over", (random.randrange(2),))]


def _outage(random: Random) -> list[Step]:
    """End a server, most often the one that workers begin with; workers and clients go over to the other one."""
    number = int(random.random() < 0.3)
    steps = [Step("go_down", (number,))]
    for _ in range(random.randint(1, 4)):
        steps += random.choice((_runs, _sends, _waits))(random)
    return [*steps, Step("come_up", (number,))]


def _waits(random: Random) -> list[Step]:
    """Let time pass."""
    return [Step("advance", (round(random.uniform(0.1, 1.5) * LEASE_S, 1),))]


def _restart(random: Random) -> list[Step]:
    """Stop a worker in good order and start it again, as an update does."""
    host, steps = random.choice(HOSTS), []
    if random.random() < 0.5:  # in the middle of a job, which expires soon
        steps = [Step("send", (1.5 * LEASE_S, 0.0, 2.0)), Step("run", (host, "main", random.randint(1, 8)))]
    return [*steps, Step("stop", (host,)), *_waits(random), Step("start", (host,))]


def _creeping_clock(random: Random) -> list[Step]:
    """Step Redis' clock forward a few times, each time by less than the lease has left."""
    steps = []
    for _ in range(random.randint(2, 4)):
        steps.append(Step("step_redis", (round(random.uniform(0.1, 0.5) * LEASE_S, 1),)))
        steps.append(Step("advance", (round(random.uniform(0.2, 2.0), 1),)))
    return steps


_KINDS: list[tuple[Callable[[Random], list[Step]], float]] = [
    (_runs, 20),
    (_sends, 3),
    (_waits, 3),
    (lambda random: [Step("kill", (random.choice(HOSTS),))], 1),
    (lambda random: [Step("start", (random.choice(HOSTS),))], 3),
    (lambda random: [Step("pause", (random.choice(HOSTS), random.random() < 0.5))], 0.5),
    (lambda random: [Step("resume", (random.choice(HOSTS),))], 2),
    (_pauses_together, 0.5),
    (_creeping_clock, 0.5),
    (_away, 1),
    (_failover, 0.3),
    (_outage, 0.5),
    (_restart, 0.5),
    (lambda random: [Step("come_up", (random.randrange(2),))], 0.5),
    (lambda random: [Step("drop_wake_up", (random.choice(HOSTS),))], 0.5),
    (lambda random: [Step("overtake")], 0.3),
    (lambda random: [Step("ask", (random.choice(HOSTS),))], 0.3),
    (lambda random: [Step("stop", (random.choice(HOSTS),))], 1),
    (lambda random: [Step("evict", (random.randrange(5),))], 0.2),
    (lambda random: [Step("send_again", (random.randrange(5),))], 0.2),
    (lambda random: [Step("step_wall", (random.choice(HOSTS), round(random.uniform(-1, 1) * LEASE_S, 1)))], 0.3),
    (lambda random: [Step("stall_before_sweep", (round(random.uniform(0.5, 2) * LEASE_S, 1),))], 0.3),
    (lambda random: [Step("step_redis", (round(random.uniform(-2, 3) * LEASE_S, 1),))], 0.3),
]
