"""What work cost at an earlier start: a start that compiles nothing need not measure it again.

It takes as long as everything else of such a start. The policy corrects costs with every tick anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.cache import COMPILER_VARIABLES
from sdtpu_worker.diffusion.families.family import Family
from sdtpu_worker.diffusion.kept_programs import code_digest, machine_facts
from sdtpu_worker.diffusion.preparation import format_size
from sdtpu_worker.kept_files import write_whole

logger = logging.getLogger(__name__)


class SavedCosts:
    """The file of an engine's costs.

    Args:
        folder: of the compile cache.
        fingerprints: by lane, what the pixels of the engine depend on.
        family: its model.
        devices: its devices.
    """

    def __init__(
        self, folder: Path, fingerprints: Mapping[Lane, str], family: Family, devices: list[jax.Device]
    ) -> None:
        self._lanes, self._num_devices = tuple(fingerprints), len(devices)
        facts = [sorted(fingerprints.items()), code_digest(family), len(devices), devices[0].device_kind]
        facts += [machine_facts(devices[0]), os.cpu_count(), [os.environ.get(name) for name in COMPILER_VARIABLES]]
        self._path = folder / f"costs-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"

    def load(self) -> dict[Lane, TickCosts] | None:
        """Return the costs by lane; None if the file is missing, or is none of this engine."""
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            costs = {lane: TickCosts.from_json(saved[format_size(lane)]) for lane in self._lanes}
            if all(each.num_devices == self._num_devices and _is_sound(each) for each in costs.values()):
                return costs
            reason = "a number in it is none that was measured on these devices"
        except FileNotFoundError:
            return None
        except Exception as exc:  # half a file, another kind of file, no permission
            reason = f"{type(exc).__name__}: {exc}"
        logger.warning("the costs in %s cannot be used, and are measured again: %s", self._path, reason)
        return None

    def save(self, costs: Mapping[Lane, TickCosts]) -> None:
        """Save costs for later starts; a file that cannot be written costs a line and the next start some seconds."""
        try:
            text = json.dumps({format_size(lane): each.to_json() for lane, each in costs.items()})
            write_whole(self._path, text.encode())
        except OSError as exc:
            logger.warning("the costs of work could not be saved, so the next start measures them again: %s", exc)


def _is_sound(costs: TickCosts) -> bool:
    values = [costs.overhead_s, *map(costs.slowdown, range(1, costs.num_devices + 1))]
    cost = costs.cost
    values += [cost.step_s, cost.insert_s, cost.decode_s, cost.picture_s, cost.adapter_s, *cost.control_s]
    values += [cost.window_s, cost.window_insert_s]
    return all(math.isfinite(value) and value >= 0 for value in values) and cost.step_s > 0
