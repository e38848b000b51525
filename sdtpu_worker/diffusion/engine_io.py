"""What goes into the engine and comes out of it: a calibration, a dispatched tick, a decoded image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from sdtpu_worker.aggregator.costs import TickCosts
from sdtpu_worker.aggregator.plan import Lane, Plan
from sdtpu_worker.diffusion.programs import Decoded
from sdtpu_worker.diffusion.sharding import by_device
from sdtpu_worker.diffusion.snapshot import JobSnapshot


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` saw when it ran an engine's programs.

    Attributes:
        costs: what work costs, by lane.
        reference_images: by lane, the `(height, width, 3) uint8` pixels that every device must draw again to prove
            after a failure that it works.
        preview_colours: by lane, the `(C + 1, 3) float32` map from latents to colours; empty without previews.
        lost_devices: devices that drew another reference image than most devices.
    """

    costs: Mapping[Lane, TickCosts]
    reference_images: Mapping[Lane, np.ndarray]
    preview_colours: Mapping[Lane, np.ndarray]
    lost_devices: frozenset[int] = frozenset()


@dataclass(frozen=True)
class DecodedImage:
    """The image of one job.

    Attributes:
        pixels: `(height, width, 3) uint8`.
        finite: the latents and the pixels had no NaN and no infinity; if not, the pixels are no image.
    """

    task_id: str
    device: int
    slot: int
    pixels: np.ndarray
    finite: bool


class Tick:
    """A dispatched plan; the devices may still work on it.

    Attributes:
        parked: by task id, the snapshots of the jobs that the plan parks; on the host after `wait`.
        previews: by task id, small images, `(h, w, 3) uint8` of the latents' size; empty until `wait` has returned.
        done_at: `time.monotonic()` when the devices were done; None until `wait` knows.
    """

    def __init__(
        self, plan: Plan, decoded: Decoded, parked: Mapping[str, JobSnapshot], previews: jax.Array | None = None
    ) -> None:
        self.plan, self.parked, self._decoded = plan, parked, decoded
        self.previews: dict[str, np.ndarray] = {}
        self.done_at: float | None = None
        self._previews = by_device(previews) if previews is not None else {}
        for place in plan.previews:
            self._previews[place.device].copy_to_host_async()
        self._wanted = plan.decoded()
        self._shards: Mapping[int, jax.Array] = {}
        if self._wanted:
            decoded.finite.copy_to_host_async()
            devices = {image.device for image in self._wanted}
            self._shards = {i: shard for i, shard in by_device(decoded.pixels).items() if i in devices}
            for shard in self._shards.values():
                shard.copy_to_host_async()

    def wait(self) -> list[DecodedImage]:
        """Block until the devices are done, and return the images that the tick decoded.

        Raises:
            Exception: what the device program raised.
        """
        jax.block_until_ready(self._decoded)
        self.done_at = time.monotonic()
        for snapshot in self.parked.values():
            _ = snapshot.state
        self.previews = {place.task_id: np.asarray(self._previews[place.device])[0] for place in self.plan.previews}
        if not self._wanted:
            return []
        finite = np.asarray(self._decoded.finite)
        shards = {device: np.asarray(shard) for device, shard in self._shards.items()}
        return [
            DecodedImage(task_id, device, slot, shards[device][0, phase], bool(finite[device, phase]))
            for device, phase, slot, task_id in self._wanted
        ]
