"""What speaks against each device: jobs that failed there, and had their image from another device afterwards.

The same request gives the same pixels on every device. So a job that fails on one device and not on another was not at
fault: the first device did something wrong, at least once.
"""

from __future__ import annotations

from collections import defaultdict

MOST_STRIKES = 3
"""A device is lost when this many different jobs failed on it that succeeded elsewhere."""
FORGIVEN_AFTER = 100
"""Images in a row with which a device makes up for the jobs that failed on it: bits flip by chance, too."""


class DeviceRecords:
    """Counts the strikes of every device; owned by the loop's thread."""

    def __init__(self) -> None:
        self._strikes: defaultdict[int, set[str]] = defaultdict(set)  # task ids by device
        self._images: defaultdict[int, int] = defaultdict(int)  # since the last strike

    def strike(self, device: int, task_id: str) -> None:
        """Note that a job failed on a device and succeeded on another one."""
        self._strikes[device].add(task_id)
        self._images[device] = 0

    def well_done(self, device: int) -> None:
        """Note that a device made an image."""
        self._images[device] += 1
        if self._images[device] >= FORGIVEN_AFTER:
            self._strikes.pop(device, None)

    def struck_out(self) -> set[int]:
        """Return the devices with too many strikes."""
        return {device for device, task_ids in self._strikes.items() if len(task_ids) >= MOST_STRIKES}
