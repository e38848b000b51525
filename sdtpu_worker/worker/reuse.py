"""Exact reuse in a worker: before a job gets a slot, an equal one's image answers it, or it waits for an equal one.

A job *enters* under its reuse key. There is an image: it is the job's too. There is none, and no job draws it: the job
takes the lead, and draws. Another job has the lead: this one follows it, without a slot, until there is an image or
the lead is free; then it enters again. Nobody waits for a job that waits itself, since only a job that draws leads.

Where anything is in the way (Redis does not answer, an image is gone, the lead is of a less urgent job, too many wait
already), the job runs as it would without reuse.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import PIL
from redis.exceptions import ResponseError

import sdtpu_worker
from sdtpu_worker.config import Config, result_expires_s
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.device_loop.protocols import ServableJob, ServingEngine
from sdtpu_worker.device_loop.submission import JobCancelled, JobHandedOver, JobOverdue
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.prompt_guard import describe
from sdtpu_worker.reuse.leads import Leads
from sdtpu_worker.reuse.ledger import HANDED_OVER_S, Ledger
from sdtpu_worker.reuse.notes import Lead, Pointer
from sdtpu_worker.reuse.reuse_key import Maker, reuse_key
from sdtpu_worker.reuse.stored_image import Drawn, ReadableStore, read_stored
from sdtpu_worker.worker.job_control import JobControl
from sdtpu_worker.worker.job_record import JobRecord
from sdtpu_worker.worker.reuse_turn import Entry, Turn

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
"""Seconds between two looks of a job that follows; the end of a leader on the same worker wakes it at once."""
_MOST_WAIT_S = 600.0
"""Then a job that follows runs by itself, whatever the lead says: it may be forged."""
_DISTRUST_S = 10.0
"""How long jobs run without asking after Redis did not answer one of them."""
_FEWEST_FOLLOWERS, _FOLLOWERS_PER_SLOT = 32, 4
_MOST_GONE = 3
"""Pointers to images that are gone, after which a job runs by itself."""
_DAY_S = 86_400.0
_SHARE_TO_SPARE, _MOST_TO_SPARE_S = 0.1, 60.0  # of its image's life that a pointer ends earlier


class Reuse:
    """Finds images of equal jobs; many threads may have a turn at the same time.

    Args:
        engine: says what decides a job's pixels.
        ledger: what the workers know of each other.
        store: this worker's image store.
        deliveries: the messages that this worker holds.
        across_tenants: whether tenants may have each other's images.
        expires_s: seconds after which stored images expire; None for never.
        progress_s: seconds between two states of a job that follows; 0 for none.
        most_followers: how many jobs may follow at the same time.
        count: called with the outcome of each turn, as in `operations.metric_table.REUSES`.
        devices_make_progress: whether the leads of this worker's jobs should stand.
    """

    def __init__(
        self,
        engine: ServingEngine,
        ledger: Ledger,
        store: ReadableStore,
        deliveries: Deliveries,
        *,
        across_tenants: bool = False,
        expires_s: float | None = None,
        progress_s: float = 0.0,
        most_followers: int = _FEWEST_FOLLOWERS,
        count: Callable[[str], None] = lambda outcome: None,
        devices_make_progress: Callable[[], bool] = lambda: True,
    ) -> None:
        self._pixels_of = engine.pixel_digests()
        self._ledger, self._store, self._deliveries = ledger, store, deliveries
        self._maker = Maker(f"sdtpu_worker {sdtpu_worker.__version__}, Pillow {PIL.__version__}", engine.info.model)
        self._across_tenants, self._life_s = across_tenants, expires_s or _DAY_S
        self._progress_s, self.most_followers, self._count = progress_s, most_followers, count
        self.leads = Leads(ledger, devices_make_progress)
        self._changed, self._following = threading.Condition(), 0
        self._asks_again_at = 0.0

    @contextlib.contextmanager
    def turn(
        self,
        job: ServableJob,
        request: GenerationRequest,
        text: Mapping[str, Any],
        control: JobControl,
        record: JobRecord,
        is_draining: Callable[[], bool],
        stage: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> Iterator[Turn]:
        """Give a prepared job its turn: it waits here while an equal one draws, and has the lead in the block.

        Args:
            job: as the engine prepared it.
            request: its request.
            text: the parameters that a PNG of it says.
            control: what its caller wants besides.
            record: of the job.
            is_draining: whether the worker takes no more jobs.
            stage: measures the part `reuse` of the job: finding an image, and waiting for one.

        Raises:
            JobCancelled, JobOverdue, JobHandedOver: as the device loop does, while the job waits.
        """
        group = "everybody" if self._across_tenants else f"tenant {control.tenant!r}"
        try:
            key = reuse_key(self._pixels_of(job), request, job.parameters, job.lane, self._maker, group)
        except TypeError:  # a value of a kind that nobody has thought of: no reason to fail the job
            logger.exception("task %s has no reuse key, so it is drawn", job.task_id)
            yield Turn()
            return
        entry = Entry(key, job, request.image_format, text, control, record)
        with stage("reuse"):
            found = self._find(entry, is_draining)
        is_handed_over, lead = False, entry.lead
        if entry.leads:
            self.leads.add(key, lead)
        try:
            yield Turn(found, lambda drawn, began_at: self._keep(entry, drawn, began_at))
        except JobHandedOver as end:
            is_handed_over = end.snapshot is not None
            raise
        finally:
            self.leads.remove(key, lead)
            if entry.leads:
                self._leave(entry, is_handed_over=is_handed_over)

    def _find(self, entry: Entry, is_draining: Callable[[], bool]) -> Drawn | None:
        """Return the image of an equal job, perhaps after waiting for it; None for a job that draws."""
        if time.monotonic() < self._asks_again_at:
            self._count("unknown")
            return None
        with contextlib.ExitStack() as aside:
            try:
                outcome, found = self._ask(entry, is_draining, aside)
            except (JobCancelled, JobOverdue, JobHandedOver):
                raise
            except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
                logger.warning("Redis could not be asked for an image to reuse, so task %s is drawn: %s",
                               entry.job.task_id, describe(exc))  # fmt: skip
                self._distrust(exc)
                outcome, found = "unknown", None
        self._count(outcome)
        return found

    def _ask(
        self, entry: Entry, is_draining: Callable[[], bool], aside: contextlib.ExitStack
    ) -> tuple[str, Drawn | None]:
        """Enter until something is decided; return the outcome, and the image of a job that need not draw."""
        until, publish = time.monotonic() + _MOST_WAIT_S, entry.publisher(self._progress_s)
        num_gone = 0
        while True:
            mine = entry.lead()
            pointer, other = self._ledger.enter(entry.key, mine)
            if pointer:
                if found := self._open(entry, pointer):
                    return ("waited" if entry.waits else "stored"), found
                self._count("gone")
                self._ledger.forget(entry.key, pointer)
                num_gone += 1
                if num_gone < _MOST_GONE:
                    continue
                return "beside", None  # what is there cannot be removed; this job's own pointer replaces it
            leader = Lead.from_bytes(other)
            if not other:
                entry.leads = True
                return ("took_over" if entry.waits else "drawn"), None
            if leader is None or not leader.serves(mine):
                if self._ledger.enter(entry.key, mine, take=True)[0]:
                    continue  # it has just been drawn
                entry.leads = True
                return "ahead", None
            if entry.control.snapshot is not None or time.monotonic() > until or not self._step_aside(entry, aside):
                return "beside", None
            entry.check_wanted(leader, is_draining)
            publish(leader)
            with self._changed:
                self._changed.wait(LOOK_EVERY_S)

    def _open(self, entry: Entry, data: bytes) -> Drawn | None:
        """Return the image that a pointer leads to; None if it cannot be used."""
        pointer = Pointer.from_bytes(data)
        if pointer is None:
            return None
        return read_stored(self._store, pointer, entry.image_format, entry.job.lane, entry.text)

    def _step_aside(self, entry: Entry, aside: contextlib.ExitStack) -> bool:
        """Have a job that begins to follow keep no other one from this worker; return False if too many follow."""
        if entry.waits:
            return True
        with self._changed:
            if self._following >= self.most_followers:
                return False
            self._following += 1
        entry.waits = True
        self._deliveries.aside.add(entry.job.task_id)
        self._deliveries.on_free()

        def step_back() -> None:
            self._deliveries.aside.discard(entry.job.task_id)
            with self._changed:
                self._following -= 1

        aside.callback(step_back)
        return True

    def _keep(self, entry: Entry, drawn: Drawn, began_at: float) -> None:
        """Have equal jobs find a job's stored image, for no longer than it is stored.

        Args:
            entry: the job.
            drawn: its image.
            began_at: `time.monotonic()` before it was stored.
        """
        spare_s = min(_MOST_TO_SPARE_S, _SHARE_TO_SPARE * self._life_s)
        life_s = self._life_s - spare_s - (time.monotonic() - began_at)
        if life_s > 0:
            pointer = Pointer.of(entry.job.task_id, drawn.data, drawn.nsfw, drawn.batch)
            self._leave(entry, pointer.to_bytes(), life_s)

    def _leave(self, entry: Entry, pointer: bytes = b"", life_s: float = 1.0, is_handed_over: bool = False) -> None:
        """Give up the lead, or keep it for the next worker; a failure is logged, and the lead expires."""
        if time.monotonic() < self._asks_again_at:
            return
        try:
            if is_handed_over:
                self._ledger.enter(entry.key, entry.lead(), life_s=HANDED_OVER_S)
            else:
                self._ledger.leave(entry.key, entry.token, pointer, life_s)
            entry.leads = False
        except Exception as exc:  # the driver's own errors, and those of a connection that could not even be made
            self._distrust(exc)
            logger.warning("Redis could not be told of the image of task %s: %s", entry.job.task_id, describe(exc))
        with self._changed:
            self._changed.notify_all()

    def _distrust(self, exc: Exception) -> None:
        """Have jobs run without asking for a while, unless Redis did answer: then only this one cannot be asked for."""
        if not isinstance(exc, ResponseError):
            self._asks_again_at = time.monotonic() + _DISTRUST_S


class NoReuse:
    """Stands where nothing is reused: every job draws."""

    most_followers = 0

    @contextlib.contextmanager
    def turn(self, *_: Any) -> Iterator[Turn]:
        """Give a turn in which nothing is found and nothing kept."""
        yield Turn()


def followers_for(num_slots: int) -> int:
    """Return how many jobs of a worker may follow at the same time: each has a thread."""
    return max(_FEWEST_FOLLOWERS, _FOLLOWERS_PER_SLOT * num_slots)


def refuse_reuse(config: Config) -> None:
    """Refuse what cannot work with a broker that is not Redis.

    Raises:
        ConfigurationError: reuse is on.
    """
    if config.reuse != "off":
        raise ConfigurationError(
            f"sdtpu_reuse must be off with a broker that is not Redis, got {config.reuse}: workers find each other's"
            " images there"
        )


@contextlib.contextmanager
def reusing(
    app: Any,
    config: Config,
    engine: ServingEngine,
    store: ReadableStore,
    deliveries: Deliveries | None,
    count: Callable[[str], None],
    devices_make_progress: Callable[[], bool],
) -> Iterator[Reuse | None]:
    """Give what `sdtpu_reuse` asks for, for the block; None where it is off.

    Args:
        app: the app, for its `result_expires`.
        config: the settings.
        engine: the worker's; its weights are read.
        store: the worker's image store.
        deliveries: the messages that the worker holds; None with a broker that is not Redis.
        count: adds to `sdtpu_reuse_total`.
        devices_make_progress: whether this worker's leads should stand.
    """
    if config.reuse == "off" or deliveries is None:
        yield None
        return
    reuse = Reuse(
        engine,
        Ledger(lambda: deliveries.client, deliveries.keys),
        store,
        deliveries,
        across_tenants=config.reuse == "across_tenants",
        expires_s=result_expires_s(app.conf),
        progress_s=config.progress_s,
        most_followers=followers_for(engine.info.num_slots),
        count=count,
        devices_make_progress=devices_make_progress,
    )
    reuse.leads.start()
    try:
        yield reuse
    finally:
        reuse.leads.close()
