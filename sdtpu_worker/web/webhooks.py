"""Webhooks: a job that has ended is posted to the address that its caller named, signed, at least once.

The bodies are signed as Standard Webhooks has it, with `sdtpu_http_webhook_secret`. Only the origins that the operator
allows are posted to, and redirects are not followed. A sorted set in Redis has the jobs that are still to be posted, by
the time at which another door may take them over: the door that is at work on one moves that time on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from sdtpu_worker.errors import ConfigurationError, InvalidRequest
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_view import job_json
from sdtpu_worker.web.jobs import Jobs

logger = logging.getLogger(__name__)

HOOKS = "sdtpu:http:hooks"
BASE = "/v1/jobs"
"""Before the links in what is posted: a webhook does not know by which name its caller reaches the door."""
LEASE_S = 30.0
"""Seconds after which another door takes over what a door has not moved on."""
PAUSES_S = (1, 5, 30, 120, 600)
"""Seconds between two attempts."""
_TIMEOUT_S = 10.0
_MOST_THREADS = 4
_MOST_CHARACTERS = 2048
_AT_ONCE = 200


class Webhooks:
    """Posts the jobs of one door that have ended. Belongs to one event loop.

    Args:
        jobs: of the door.
        redis: a client of the result backend's Redis.
        origins: `sdtpu_http_webhook_origins`.
        secret: `sdtpu_http_webhook_secret`.

    Raises:
        ConfigurationError: there are origins, but no secret.
    """

    def __init__(
        self,
        jobs: Jobs,
        redis: Any,
        origins: Sequence[str],
        secret: str | None,
    ) -> None:
        if origins and not secret:
            raise ConfigurationError("sdtpu_http_webhook_origins needs sdtpu_http_webhook_secret: set it")
        self._jobs, self._redis, self._origins, self._secret = jobs, redis, tuple(origins), secret or ""
        self._executor = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="sdtpu-webhook")
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None

    def check(self, url: Any) -> str:
        """Return the address of a webhook.

        Raises:
            InvalidRequest: it is none, or the operator has not allowed its origin.
        """
        allowed = ", ".join(self._origins) or "none (sdtpu_http_webhook_origins)"
        try:
            parts = urlsplit(url if isinstance(url, str) else "")
            origin = f"{parts.scheme}://{parts.netloc}"
        except ValueError:
            origin = ""
        if not origin or origin not in self._origins or len(url) > _MOST_CHARACTERS or not url.isprintable():
            raise InvalidRequest(f"webhook must be an address of an allowed origin: {allowed}; got {url!r:.80}")
        return str(url)

    async def promise(self, record: JobRecord) -> None:
        """Note that a job is to be posted, before it is enqueued; `begin` follows."""
        await self._redis.zadd(HOOKS, {record.id: time.time() + LEASE_S})

    def begin(self, record: JobRecord) -> None:
        """Post a job when it has ended."""
        task = self._at_work[record.id] = asyncio.create_task(self._post_at_end(record))
        task.add_done_callback(lambda _: self._at_work.pop(record.id, None))
        self.start()

    def start(self) -> None:
        """Look after webhooks from now on, also those of doors that have died."""
        if self._origins and (self._keeper is None or self._keeper.done()):
            self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop; other doors take over what is left."""
        tasks = [*self._at_work.values(), *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._executor.shutdown(wait=False)

    async def _keep(self) -> None:
        """Move the time on of what is at work here, and take over what nobody is at work on."""
        while True:
            try:
                if self._at_work:
                    await self._redis.zadd(HOOKS, {job_id: time.time() + LEASE_S for job_id in self._at_work}, xx=True)
                due = await self._redis.zrangebyscore(HOOKS, "-inf", time.time(), start=0, num=_AT_ONCE)
                for job_id in (each.decode() for each in due):
                    await self._take_over(job_id)
            except (RedisError, OSError) as exc:
                logger.warning("webhooks are not looked after for now: %s", exc)
            await asyncio.sleep(LEASE_S / 3)

    async def _take_over(self, job_id: str) -> None:
        record = await self._jobs.records.find(job_id)
        if record is None or not record.webhook:
            await self._redis.zrem(HOOKS, job_id)
        elif job_id not in self._at_work:
            await self._redis.zadd(HOOKS, {job_id: time.time() + LEASE_S}, xx=True)
            self.begin(record)

    async def _post_at_end(self, record: JobRecord) -> None:
        state = None
        async with self._jobs.watch(record.id) as watch:
            while not (state and state.has_ended):
                state = await watch.next_state()
        body = json.dumps(job_json(record, state, BASE), separators=(",", ":")).encode()
        for pause_s in (*PAUSES_S, None):
            outcome = await asyncio.get_running_loop().run_in_executor(self._executor, self._post, record, body)
            if outcome is None or pause_s is None:
                break
            logger.info("the webhook of job %s is posted again in %g s: %s", record.id, pause_s, outcome)
            await asyncio.sleep(pause_s)
        if outcome is not None:
            logger.warning("the webhook of job %s was given up: %s", record.id, outcome)
        with contextlib.suppress(RedisError, OSError):  # else it is posted again, which its receiver has to expect
            await self._redis.zrem(HOOKS, record.id)

    def _post(self, record: JobRecord, body: bytes) -> str | None:
        """Post once; return what went wrong, None if nothing did. In a thread."""
        parts = urlsplit(self.check(record.webhook))  # the operator may have changed the origins meanwhile
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": "application/json", **sign(self._secret, record.id, int(time.time()), body)}
        try:
            with contextlib.closing(connect(parts.netloc, timeout=_TIMEOUT_S)) as connection:
                connection.request("POST", path, body, headers)
                status = connection.getresponse().status
        except (OSError, http.client.HTTPException, ValueError) as exc:
            return repr(exc)
        return None if 200 <= status < 300 else f"it was answered with {status}"


def sign(secret: str, message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the headers that let a receiver check who sent a body, and when.

    Args:
        secret: shared with the receiver.
        message_id: the same for each attempt.
        timestamp_s: seconds since 1970.
        body: what is sent.

    Source: Standard Webhooks 1.0 (standardwebhooks.com), symmetric signatures.
    """
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    digest = base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{digest}",
    }
