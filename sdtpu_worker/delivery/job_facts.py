"""What earlier workers left of a job in Redis, read within bounds: others may be able to write there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtpu_worker.delivery.keys import Keys

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

MAX_SNAPSHOT_BYTES = 2**26
"""The largest snapshot, deflated, that is read. One of 1024 x 1024 pixels has about 2 MB; a forged one could fill the
worker's memory."""
_MAX_STARTS, _MAX_NAME_BYTES = 10_000, 512  # of a job's starts, and of the name in each: more is not read


@dataclass(frozen=True)
class JobFacts:
    """What earlier workers left of a job: the hosts that died with it on their devices, and its snapshot."""

    died_on: Sequence[str] = ()
    snapshot: bytes | None = None


def read_job_facts(client: Redis, keys: Keys, task_id: str) -> JobFacts:
    """Return what earlier workers left of a job.

    Args:
        client: a client of the broker's Redis.
        keys: the names of the keys in Redis.
        task_id: the job.

    Raises:
        redis.exceptions.RedisError: Redis was not reached.
    """
    with client.pipeline(transaction=False) as pipe:
        pipe.lrange(keys.starts(task_id), 0, _MAX_STARTS - 1)
        pipe.getrange(keys.snapshot(task_id), 0, MAX_SNAPSHOT_BYTES)
        names, snapshot = map(_value_of, pipe.execute(raise_on_error=False))
    cut = (name[:_MAX_NAME_BYTES].decode(errors="replace") for name in dict.fromkeys(names))
    hosts = [name.partition("\n")[0] for name in cut]
    if len(snapshot) > MAX_SNAPSHOT_BYTES:
        logger.warning("the snapshot of task %s has more than %d bytes and is not used: the job starts from its"
                       " first step", task_id, MAX_SNAPSHOT_BYTES)  # fmt: skip
        snapshot = b""
    return JobFacts(hosts, snapshot or None)


def _value_of(answer: Any) -> Any:
    """Return a value that Redis answered with; nothing for a key of another type, which no worker wrote.

    Raises:
        redis.exceptions.RedisError: Redis answered with any other error.
    """
    if not isinstance(answer, Exception):
        return answer
    if "WRONGTYPE" in str(answer):
        return b""
    raise answer
