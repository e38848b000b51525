"""Who is in which slot of the devices, as the ticks say; and the thread that publishes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from redis.exceptions import RedisError

from sdtpu_worker.aggregator.plan import Lane, Plan
from sdtpu_worker.contract.slot_report import SLOTS_TTL_S, OccupiedSlot, SlotReport, slots_key
from sdtpu_worker.delivery.deliveries import Deliveries
from sdtpu_worker.device_loop.engine_info import EngineInfo
from sdtpu_worker.device_loop.submission import Submission

logger = logging.getLogger(__name__)

_LOOK_EVERY_S, _PUBLISH_EVERY_S = 0.5, 5.0
"""Seconds between two looks, and after which a report is published again though nothing has changed."""


class SlotView:
    """The slot of each job, learnt from the plans of the ticks that ended. `on_tick` belongs to the loop's thread."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}

    def on_tick(self, plan: Plan) -> None:
        """Take note of the jobs that got a slot in a tick."""
        for device, phases in enumerate(plan.devices):
            for phase in phases:
                if phase.insert is not None:
                    slot, task_id = phase.insert
                    self._places[task_id] = device, slot
        for place in plan.resumed:
            self._places[place.task_id] = place.device, place.slot

    def report(self, info: EngineInfo, lost: Sequence[int], held: Iterable[Submission]) -> SlotReport:
        """Return which jobs are in which slots. Any thread.

        Args:
            info: of the engine.
            lost: devices that get no job any more.
            held: the jobs that the worker holds.
        """
        lanes = {each.job.task_id: each.job.lane for each in held if each.has_slot}
        occupied = sorted(
            OccupiedSlot(device, slot, _size(lanes[task_id]), task_id)
            for task_id, (device, slot) in self.places(lanes.keys()).items()
        )
        sizes = tuple(map(_size, info.resolutions))
        return SlotReport(info.num_devices, info.slots_per_device, sizes, tuple(lost), tuple(occupied))

    def places(self, held: Collection[str]) -> dict[str, tuple[int, int]]:
        """Return `(device, slot)` of those jobs that have had one, by task id; forget all other jobs. Any thread.

        Args:
            held: the task ids of the jobs that the worker holds.
        """
        found = self._places.copy()
        for task_id in found.keys() - held:
            self._places.pop(task_id, None)
        return {task_id: place for task_id, place in found.items() if task_id in held}


class SlotReporter:
    """Publishes slot reports in a thread of its own, when they change and every few seconds.

    Args:
        read: returns the report as it is now, as text.
        publish: puts it into Redis.
    """

    def __init__(self, read: Callable[[], str], publish: Callable[[str], object]) -> None:
        self._read, self._publish = read, publish
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sdtpu-slot-reports", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the thread; the last report expires."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        published, due_at = "", 0.0
        while not self._stopping.wait(_LOOK_EVERY_S):
            text = self._read()
            if text == published and time.monotonic() < due_at:
                continue
            try:
                self._publish(text)
            except (RedisError, OSError) as exc:  # pages then show this worker's slots as they were, and soon none
                logger.debug("the slot report of this worker could not be published: %s", exc)
                continue
            published, due_at = text, time.monotonic() + _PUBLISH_EVERY_S


def report_slots(read: Callable[[], SlotReport], deliveries: Deliveries, queue: str, host: str) -> SlotReporter:
    """Publish a worker's slots from now on; return what does.

    Args:
        read: returns the report as it is now.
        deliveries: of the worker, with its client of Redis.
        queue: `sdtpu_queue`.
        host: the worker's name.
    """
    key = deliveries.keys.prefix + slots_key(queue, host)

    def publish(text: str) -> None:
        deliveries.client.set(key, text, ex=SLOTS_TTL_S)

    reporter = SlotReporter(lambda: read().to_json(), publish)
    reporter.start()
    return reporter


def _size(lane: Lane) -> str:
    height, width = lane
    return f"{height}x{width}"
