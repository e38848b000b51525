"""The jobs of callers: enqueued, looked at, waited for, cancelled, listed. Every API of the door stands on this."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.cancel import cancel_job
from sdtpu_worker.config import result_expires_s
from sdtpu_worker.contract.queues import SENT_AT_HEADER, TASK_NAME
from sdtpu_worker.contract.request import LISTED, PICTURES, GenerationRequest, draw_seed
from sdtpu_worker.errors import InvalidRequest, SdtpuError, StorageError
from sdtpu_worker.images.bring import bring_pictures
from sdtpu_worker.images.decode import named_image
from sdtpu_worker.images.store import read_image_bytes
from sdtpu_worker.redaction import brief
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.celery_threads import CeleryThreads
from sdtpu_worker.web.job_records import JobRecord, JobRecords, is_job_id
from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.job_states import make_states
from sdtpu_worker.web.keeper import Keeper
from sdtpu_worker.web.parameters import OPTIONS, check_expires, without_options
from sdtpu_worker.web.problems import Refusal
from sdtpu_worker.web.redis_client import make_client
from sdtpu_worker.web.watch import Watch

if TYPE_CHECKING:
    from celery import Celery

DATA_START, JOB_START = "data:", "job:"

logger = logging.getLogger(__name__)

_STAND_IN = "store:picture"
"""In place of a picture while the other parameters are checked."""


class Jobs:
    """The jobs behind one Celery app. Belongs to one event loop; its connections open on first use.

    Args:
        app: the client's app.
        threads: for what would block the event loop; None for threads of its own.
        keeper: keeps jobs, too; None where nothing does.

    Attributes:
        redis: a client of the result backend's Redis, or of the broker's where results are kept elsewhere.
        records: what the door keeps of the jobs.
        threads: for what would block the event loop.
        expires_s: seconds after which results expire; None for never.

    Raises:
        ConfigurationError: the app has no Redis for the records, or no results that can be read.
    """

    def __init__(self, app: Celery, threads: CeleryThreads | None = None, keeper: Keeper | None = None) -> None:
        self.app, self._keeper = app, keeper
        self.redis: Any = make_client(app)  # whose types leave open whether replies are text or bytes
        self.expires_s = result_expires_s(app.conf)
        self.records = JobRecords(self.redis, self.expires_s)
        self.threads = threads or CeleryThreads(app)
        self._states = make_states(app, self.redis, self.threads)
        self._in_background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the connections, after what still runs in the background."""
        await asyncio.gather(*self._in_background, return_exceptions=True)
        await self._states.feed.close()
        self.threads.close()
        await self.redis.aclose()
        await self.redis.connection_pool.disconnect()

    async def ping(self) -> None:
        """Return if Redis answers.

        Raises:
            RedisError: it does not.
        """
        await self.redis.ping()

    async def make_records(self, caller: Caller, given: Sequence[Mapping[str, Any]], kind: str) -> list[JobRecord]:
        """Return the records of jobs that are not enqueued yet, with their parameters checked and pictures stored.

        Args:
            caller: whose jobs they are.
            given: of each job the parameters of `generate`, with `tenant`, `priority` and `expires`; all start from the
                same pictures: bytes, data URIs, or `job:ID` for the picture of another job of the caller's.
            kind: which API the jobs came by.

        Raises:
            InvalidRequest: a parameter is not allowed.
            Refusal: 404, a job whose picture is meant is not the caller's; 503, a picture cannot be stored.
        """
        for each in given:
            stand_ins = {name: _STAND_IN for name in PICTURES if each.get(name) is not None}
            GenerationRequest.parse((), without_options({**each, **stand_ins}))
        pictures = await self._bring_pictures(caller, given[0])
        return [self._make_record(caller, {**each, **pictures}, kind) for each in given]

    async def _bring_pictures(self, caller: Caller, given: Mapping[str, Any]) -> dict[str, Any]:
        """Store the pictures that a caller sends; return what names them. A URI of a caller's own is never taken."""
        pictures: dict[str, Any] = {}
        for name in PICTURES:
            value = given.get(name)
            if name in LISTED and isinstance(value, list):
                pictures[name] = [await self._find_picture(caller, name, each) for each in value]
            elif value is not None:
                pictures[name] = await self._find_picture(caller, name, value)
        try:
            return await self.threads.call(bring_pictures, self.app, pictures) if pictures else {}
        except StorageError as exc:
            text = "the picture cannot be stored now; try again later"
            raise Refusal(503, "StorageError", text, headers={"Retry-After": "5"}, hidden=str(exc)) from exc

    async def _find_picture(self, caller: Caller, name: str, value: Any) -> bytes | str:
        """Return a picture that a caller sends, or the URI of one of its own jobs'."""
        if isinstance(value, bytes) or (isinstance(value, str) and value.startswith(DATA_START)):
            return value
        if not isinstance(value, str) or not value.startswith(JOB_START):
            raise InvalidRequest(
                f"{name} must be a data URI (data:image/png;base64,…), or job:ID of a job of yours that has succeeded,"
                f" got {brief(value)}"
            )
        record = await self.find(caller, value.removeprefix(JOB_START))
        state = await self.read_state(record.id)
        if state.result is None:
            raise InvalidRequest(f"{name} must name a job that has succeeded, got one that is {state.status}")
        return named_image(state.result)[1].uri

    def _make_record(self, caller: Caller, given: Mapping[str, Any], kind: str) -> JobRecord:
        kwargs = without_options(given)
        GenerationRequest.parse((), kwargs)
        if kwargs.get("seed") is None:
            kwargs["seed"] = draw_seed()
        priority = caller.priority(given.get("priority"), self.app.conf.task_default_priority)
        options: dict[str, Any] = {"priority": priority}
        if given.get("expires") is not None:
            options["expires"] = check_expires(given["expires"])
        return JobRecord(caller.name, {**kwargs, **options}, kind)

    async def submit(self, caller: Caller, records: Sequence[JobRecord]) -> None:
        """Enqueue jobs, all or none of them.

        Args:
            caller: whose jobs they are.
            records: at least one.

        Raises:
            Refusal: 429, the caller has too many unfinished jobs; 503, too many requests wait.
            SdtpuError: what `generate.apply_async` raises; nothing stays enqueued.
        """
        if caller.max_jobs:
            await self._check_limit(caller, len(records))
        await self.records.add(records)
        sent: list[JobRecord] = []
        try:
            for record in records:
                sent.append(record)
                await self.threads.call(self._enqueue, caller, record)
        except BaseException as exc:
            if isinstance(exc, SdtpuError):  # it was not sent; after any other error it may have been
                sent.pop()
            self._run_later(self._withdraw(records, sent))
            raise

    def _enqueue(self, caller: Caller, record: JobRecord) -> None:
        kwargs = without_options(record.parameters)
        tenant = caller.tenant(kwargs.pop("tenant", None))
        options = {name: record.parameters[name] for name in OPTIONS if name in record.parameters}
        options["headers"] = {SENT_AT_HEADER: record.created_at}  # by which its place in the queue is found
        if tenant is not None:
            kwargs["tenant"] = tenant

        def send(**more: Any) -> None:
            self.app.tasks[TASK_NAME].apply_async((), kwargs, task_id=record.id, **options, **more)

        if self._keeper is None:
            send()
        else:
            self._keeper.enqueue(record, send)

    async def _withdraw(self, records: Sequence[JobRecord], sent: Sequence[JobRecord]) -> None:
        for record in sent:
            await self.cancel(record)
        await self.records.remove(records)

    async def _check_limit(self, caller: Caller, more: int) -> None:
        """Check that a caller may have more unfinished jobs; those that have ended are found when it comes to that."""
        count = await self.records.count_open(caller.name)
        if count + more > caller.max_jobs:
            ids = await self.records.open_ids(caller.name)
            states = await self.read_states(ids)
            ended = [job_id for job_id, state in zip(ids, states, strict=True) if state.has_ended]
            await self.records.close(caller.name, ended)
            count = len(ids) - len(ended)
        if count + more > caller.max_jobs:
            raise Refusal(
                429, "TooManyJobs",
                f"the key {caller.name!r} may have {caller.max_jobs:,} unfinished jobs, and has {count:,}; wait for"
                " some to end, or cancel them",
                headers={"Retry-After": "5"},
            )  # fmt: skip

    async def find(self, caller: Caller, job_id: str) -> JobRecord:
        """Return the record of a caller's job.

        Raises:
            Refusal: 404, there is none; the answer is the same for a job of somebody else.
        """
        record = await self.records.find(job_id)
        if record is None and self._keeper is not None and is_job_id(job_id):
            record = await self.threads.call(self._keeper.find, job_id)
        if record is None or record.caller != caller.name:
            raise Refusal(404, "NoSuchJob", f"you have no job {job_id!r:.60}; results expire {self._expiry_words()}")
        return record

    async def find_by_token(self, job_id: str, token: str) -> JobRecord:
        """Return the record of a job whose picture may be read with this token.

        Raises:
            Refusal: 404, there is none.
        """
        record = await self.records.find(job_id)
        if record is None or not hmac.compare_digest(record.image_token.encode(), token.encode(errors="replace")):
            raise Refusal(404, "NoSuchPicture", "there is no picture at this address, or it has expired")
        return record

    async def read_states(self, job_ids: Sequence[str]) -> list[JobState]:
        """Return the states of jobs as they are now."""
        return await self._states.read(job_ids) if job_ids else []

    async def read_state(self, job_id: str) -> JobState:
        """Return the state of a job as it is now; what the door keeps of an unfinished job stays for longer."""
        state = (await self.read_states([job_id]))[0]
        if not state.has_ended:
            await self.records.keep(job_id)
        return state

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Watch]:
        """Watch a job for the block; its first state is that at the beginning, whatever it is."""
        async with self._states.feed.watch(job_id) as watch:
            yield watch

    async def wait(
        self, records: Sequence[JobRecord], timeout_s: float, on_state: Callable[[int, JobState], None] | None = None
    ) -> list[JobState] | None:
        """Wait until jobs have ended; return their states, or None when the time is over first.

        Args:
            records: the jobs.
            timeout_s: seconds, for all of them together.
            on_state: called with a job's number and each state of it.
        """
        ends: list[JobState] = []
        try:
            async with asyncio.timeout(timeout_s), AsyncExitStack() as stack:
                watches = [await stack.enter_async_context(self.watch(record.id)) for record in records]
                for number, watch in enumerate(watches):
                    while True:
                        state = await watch.next_state()
                        assert state is not None
                        if on_state is not None:
                            on_state(number, state)
                        if state.has_ended:
                            ends.append(state)
                            break
        except TimeoutError:
            return None
        await self.records.close(records[0].caller, [record.id for record in records])
        return ends

    async def cancel(self, record: JobRecord) -> JobState:
        """Take a job out of the queue or off its slot; return its state, which is its end."""
        state = await self.read_state(record.id)
        if not state.has_ended:
            await self.threads.call(cancel_job, self.app, record.id)
            state = await self.read_state(record.id)
        await self.records.close(record.caller, [record.id])
        return state

    def cancel_later(self, records: Sequence[JobRecord]) -> None:
        """Cancel jobs whose caller has gone, in the background."""
        for record in records:
            self._run_later(self.cancel(record))

    async def read_image(self, state: JobState) -> bytes:
        """Return the encoded picture of a job that has succeeded.

        Raises:
            StorageError: it is gone, or its store cannot be read.
        """
        assert state.result is not None
        return await self.threads.call(read_image_bytes, state.result, self.app)

    def _run_later(self, work: Any) -> None:
        task = asyncio.ensure_future(_logged(work))
        self._in_background.add(task)
        task.add_done_callback(self._in_background.discard)

    def _expiry_words(self) -> str:
        return f"after {self.expires_s:,} s" if self.expires_s else "never"


async def _logged(work: Any) -> None:
    try:
        await work
    except Exception as exc:
        logger.warning("a job could not be cancelled: %s", exc)
