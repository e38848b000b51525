"""Slot reports: what workers publish of who is in which slot of their devices, for pages that show the device batch.

A report is in Redis under a key of its worker's own, and expires after a few seconds unless the worker publishes a new
one. It names jobs by their task ids alone; a front shows a caller which of them are its own, and no other id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdtpu_worker.contract.report_text import read_report
from sdtpu_worker.redaction import brief

logger = logging.getLogger(__name__)

SLOTS_TTL_S = 15
"""Seconds after which a slot report expires."""
MAX_SLOTS = 1024
"""How many occupied slots a report has; further ones are left out."""
MAX_DEVICES, MAX_SLOTS_PER_DEVICE, MAX_SIZES = 1024, 1024, 64
_MAX_BYTES, _MAX_CHARACTERS = 262_144, 256
_KEY_PREFIX = "sdtpu:load:slots:"


class OccupiedSlot(NamedTuple):
    """A slot with a job in it: the device, the slot of the device, the size of the job's image, the job's task id."""

    device: int
    slot: int
    size: str
    task_id: str


@dataclass(frozen=True)
class SlotReport:
    """The slots of one worker.

    Attributes:
        num_devices: devices of its host.
        slots_per_device: rows of one device's batch.
        sizes: the sizes that it serves ("512x512", height first), each with slots of its own; the checkpoint's first.
        lost: devices that get no job any more.
        occupied: the slots with a job.
    """

    num_devices: int
    slots_per_device: int
    sizes: tuple[str, ...]
    lost: tuple[int, ...] = ()
    occupied: tuple[OccupiedSlot, ...] = ()

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({**vars(self), "occupied": self.occupied[:MAX_SLOTS]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> SlotReport:
        """Return the report in a JSON text; fields that this version does not know are ignored.

        Raises:
            ValueError: the text is not a slot report, or a field is out of its bounds.
        """
        facts = read_report("a slot report", text, _MAX_BYTES)
        num_devices = _number("num_devices", facts.get("num_devices"), 1, MAX_DEVICES)
        per_device = _number("slots_per_device", facts.get("slots_per_device"), 1, MAX_SLOTS_PER_DEVICE)
        return cls(
            num_devices,
            per_device,
            tuple(_text("a size", size) for size in _list("sizes", facts.get("sizes"), MAX_SIZES)),
            tuple(_number("a lost device", each, 0, num_devices - 1) for each in _list("lost", facts.get("lost"))),
            tuple(_occupied(each, num_devices, per_device) for each in _list("occupied", facts.get("occupied"))),
        )


def slots_key(queue: str, host: str) -> str:
    """Return the key of a worker's slot report.

    Args:
        queue: `sdtpu_queue`.
        host: the worker's name, as in its load report.
    """
    return f"{_KEY_PREFIX}{queue}:{host}"


def living_slot_reports(hosts: Sequence[str], texts: Sequence[str | bytes | None]) -> Mapping[str, SlotReport]:
    """Return the reports that have not expired, by host; a text that is none is logged and left out.

    Args:
        hosts: the workers' names.
        texts: what is stored under the key of each.
    """
    reports = {}
    for host, text in zip(hosts, texts, strict=True):
        try:
            if text is not None:
                reports[host] = SlotReport.from_json(text)
        except ValueError as exc:
            logger.warning("the slot report of %s is left out: %s", host, exc)
    return reports


def _occupied(value: Any, num_devices: int, per_device: int) -> OccupiedSlot:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"an occupied slot must be device, slot, size and task id, got {brief(value)}")
    device, slot, size, task_id = value
    return OccupiedSlot(
        _number("a device", device, 0, num_devices - 1),
        _number("a slot", slot, 0, per_device - 1),
        _text("a size", size),
        _text("a task id", task_id),
    )


def _number(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low:,} to {high:,}, got {brief(value)}")
    return value


def _list(name: str, value: Any, most: int = MAX_SLOTS) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} must be a list of at most {most:,}, got {brief(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_CHARACTERS:
        raise ValueError(f"{name} must be a string of at most {_MAX_CHARACTERS} characters, got {brief(value)}")
    return value
