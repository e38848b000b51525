"""What the door itself keeps of a job: whose it is and what was asked for, in Redis, for as long as a result is kept.

| key | holds |
|---|---|
| `sdtpu:http:job:{id}` | a `JobRecord` in JSON |
| `sdtpu:http:jobs:{caller}` | the ids of a caller's jobs, by the time of their request |
| `sdtpu:http:open:{kind}:{caller}` | those of them that came by one API and that nobody has seen ended |
| `sdtpu:http:once:{caller}:{hash}` | the id of the job behind an `Idempotency-Key` |
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.once import PENDING_S, hash_of_key, read_note, write_note

if TYPE_CHECKING:
    from redis.asyncio import Redis

JOB, LIST, OPEN, ONCE = "sdtpu:http:job:", "sdtpu:http:jobs:", "sdtpu:http:open:", "sdtpu:http:once:"
KINDS = ("jobs", "openai", "sdapi")
"""The APIs by which a job can come."""
MOST_LISTED = 10_000
"""How many jobs of a caller are kept in its list."""
_TOKEN_BYTES = 16


@dataclass(frozen=True)
class JobRecord:
    """A job that came through the door.

    Attributes:
        id: of the job's task.
        caller: the name of its caller's key; empty for a door without keys.
        created_at: seconds since 1970.
        parameters: of `generate`, as the caller gave them, with the seed.
        kind: which API it came by, one of `KINDS`.
        webhook: the address to which it is posted when it has ended; empty for none.
        image_token: whoever knows it may read the picture, without a key.
    """

    caller: str
    parameters: Mapping[str, Any]
    kind: str = "jobs"
    webhook: str = ""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_at: float = field(default_factory=lambda: round(time.time(), 6))
    image_token: str = field(default_factory=lambda: secrets.token_urlsafe(_TOKEN_BYTES), repr=False)


class JobRecords:
    """Stores and finds records.

    Args:
        redis: a client of the result backend's Redis.
        expires_s: seconds after which a record expires, if nobody has asked for the job meanwhile; None for never.
    """

    def __init__(self, redis: Redis, expires_s: int | None) -> None:
        self._redis: Any = redis  # whose types leave open whether replies are text or bytes
        self._expires_s = expires_s

    async def add(self, records: Sequence[JobRecord]) -> None:
        """Store records of one caller and one kind, before their jobs are enqueued."""
        pipeline = self._redis.pipeline(transaction=False)
        for record in records:
            pipeline.set(f"{JOB}{record.id}", json.dumps(asdict(record)), ex=self._expires_s)
        for key in _lists_of(records[0]):
            pipeline.zadd(key, {record.id: record.created_at for record in records})
            pipeline.zremrangebyrank(key, 0, -MOST_LISTED - 1)
            if self._expires_s:
                pipeline.zremrangebyscore(key, "-inf", time.time() - self._expires_s)
                pipeline.expire(key, self._expires_s)
        await pipeline.execute()

    async def remove(self, records: Sequence[JobRecord]) -> None:
        """Remove records, of one caller and one kind, whose jobs were not enqueued."""
        ids = [record.id for record in records]
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.delete(*(f"{JOB}{job_id}" for job_id in ids))
        for key in _lists_of(records[0]):
            pipeline.zrem(key, *ids)
        await pipeline.execute()

    async def find(self, job_id: str) -> JobRecord | None:
        """Return a job's record, None where there is none."""
        return _read(await self._redis.get(f"{JOB}{job_id}")) if is_job_id(job_id) else None

    async def find_many(self, job_ids: Sequence[str]) -> list[JobRecord]:
        """Return the records of those jobs that have one."""
        return await self._find_all([job_id.encode() for job_id in job_ids])

    async def keep(self, job_id: str) -> None:
        """Begin a record's time anew: a job that waits for long still has one. It ends before the job's result does."""
        if self._expires_s:
            await self._redis.expire(f"{JOB}{job_id}", self._expires_s)

    async def list_jobs(self, caller: str, limit: int, before: float | None) -> list[JobRecord]:
        """Return a caller's jobs, the newest first.

        Args:
            caller: its name.
            limit: how many at most.
            before: only those that were created before this time, in seconds since 1970; None for all.
        """
        top = "+inf" if before is None else f"({before!r}"
        ids = await self._redis.zrevrangebyscore(f"{LIST}{caller}", top, "-inf", start=0, num=limit)
        return await self._find_all(ids)

    async def list_open(self, caller: str, kind: str) -> list[JobRecord]:
        """Return those of a caller's jobs of one kind that nobody has seen ended, the oldest first."""
        return await self._find_all(await self._redis.zrange(f"{OPEN}{kind}:{caller}", 0, -1))

    async def count_open(self, caller: str) -> int:
        """Return how many jobs of a caller nobody has seen ended."""
        pipeline = self._redis.pipeline(transaction=False)
        for kind in KINDS:
            pipeline.zcard(f"{OPEN}{kind}:{caller}")
        return sum(await pipeline.execute())

    async def open_ids(self, caller: str) -> list[str]:
        """Return the ids of those jobs."""
        pipeline = self._redis.pipeline(transaction=False)
        for kind in KINDS:
            pipeline.zrange(f"{OPEN}{kind}:{caller}", 0, -1)
        return [job_id.decode() for ids in await pipeline.execute() for job_id in ids]

    async def close(self, caller: str, job_ids: Sequence[str]) -> None:
        """Note that jobs have ended."""
        if not job_ids:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for kind in KINDS:
            pipeline.zrem(f"{OPEN}{kind}:{caller}", *job_ids)
        await pipeline.execute()

    async def claim_key(self, caller: str, key: str, digest: str, job_id: str) -> tuple[str, str] | None:
        """Note the job of an `Idempotency-Key`; return the id and the digest of an earlier request, if there was one.

        Args:
            caller: its name.
            key: what the caller sent.
            digest: of the request's content.
            job_id: of the job that is enqueued if there was none; `keep_key` has to follow then.
        """
        name = _once_key(caller, key)
        while not await self._redis.set(name, write_note(job_id, digest), nx=True, ex=PENDING_S):
            if (stored := await self._redis.get(name)) is not None:  # else it has expired between the two
                return read_note(stored)
        return None

    async def keep_key(self, caller: str, key: str) -> None:
        """Remember an `Idempotency-Key` for as long as a result is kept: its job is enqueued."""
        name = _once_key(caller, key)
        await (self._redis.expire(name, self._expires_s) if self._expires_s else self._redis.persist(name))

    async def release_key(self, caller: str, key: str) -> None:
        """Forget an `Idempotency-Key` whose job was not enqueued."""
        await self._redis.delete(_once_key(caller, key))

    async def _find_all(self, ids: Sequence[bytes]) -> list[JobRecord]:
        if not ids:
            return []
        stored = await self._redis.mget([f"{JOB}{job_id.decode()}" for job_id in ids])
        return [record for record in map(_read, stored) if record is not None]


def is_job_id(text: str) -> bool:
    """Return whether a text is the id of a job that the door has made."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _lists_of(record: JobRecord) -> tuple[str, str]:
    return f"{LIST}{record.caller}", f"{OPEN}{record.kind}:{record.caller}"


def _once_key(caller: str, key: str) -> str:
    return f"{ONCE}{caller}:{hash_of_key(key)}"


def _read(stored: bytes | None) -> JobRecord | None:
    return None if stored is None else JobRecord(**json.loads(stored))
