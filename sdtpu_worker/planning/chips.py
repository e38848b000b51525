"""The chips that `sdtpu plan` knows, as data, and the names of their topologies."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from sdtpu_worker.errors import ConfigurationError

GIB = 2**30
_SUBLANES = 8


@dataclass(frozen=True)
class Chip:
    """One chip. libtpu describes each core of a v4 as a device, and every other chip as one; see `share`.

    Sources: FLOP/s and bandwidth are those of Google's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
    (cloud.google.com/tpu/docs); lanes are those of its page "TPU architecture". What programs can use of the memory is
    what libtpu 0.0.42 names when a program does not fit (of a v4, twice what it names for a core). The clock follows
    from FLOP/s = 2 x matrix units x lanes^2 x clock.

    Attributes:
        name: in topologies.
        hbm_bytes: of its memory, what programs can use.
        flops: at most, bfloat16, each second.
        hbm_bytes_per_s: of its memory's bandwidth.
        clock_hz: of its matrix units.
        lanes: sides of a matrix unit.
        host_chips: at most of a host.
        host_topology: of a whole host, what `--topology NAME` alone stands for.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bytes_per_s: float
    clock_hz: float
    lanes: int
    host_chips: int
    host_topology: str

    def padded_flops(self, m: int, k: int, n: int) -> int:
        """Return the FLOPs of an `(m, k)` matrix times a `(k, n)` one in the time that a matrix unit takes for it.

        One matrix lies in the unit, in tiles as large as the unit; rows of the other stream through, and the next tile
        is loaded meanwhile, which takes as long as `lanes` rows. The cheaper matrix to keep is kept.
        """

        def cost(rows: int, kept: int) -> int:
            return 2 * max(_fill(rows, _SUBLANES), self.lanes) * _fill(k, self.lanes) * _fill(kept, self.lanes)

        return min(cost(m, n), cost(n, m))

    def share(self, part: float) -> Chip:
        """Return a part of the chip as if it were one, for a libtpu that describes each of its cores as a device."""
        return replace(
            self,
            hbm_bytes=int(self.hbm_bytes * part),
            flops=self.flops * part,
            hbm_bytes_per_s=self.hbm_bytes_per_s * part,
        )


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.5 * GIB), 275e12, 1228e9, 1.05e9, 128, 4, "2x2x1"),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 1.5e9, 128, 8, "2x4"),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 1.75e9, 128, 4, "2x2x1"),
        Chip("v6e", int(31.25 * GIB), 918e12, 1640e9, 1.75e9, 256, 8, "2x4"),
    )
}


@dataclass(frozen=True)
class Topology:
    """The chips of one host.

    Attributes:
        chip: their kind.
        layout: such as `2x4`.
    """

    chip: Chip
    layout: str

    @property
    def name(self) -> str:
        """As libtpu and `--topology` have it."""
        return f"{self.chip.name}:{self.layout}"

    @property
    def num_chips(self) -> int:
        """How many there are."""
        return math.prod(map(int, self.layout.split("x")))


def parse_topology(text: str) -> Topology:
    """Return what `--topology` names: a chip and its layout, or a chip alone for a whole host.

    Raises:
        ConfigurationError: there is no such chip, the layout is none, or it is no part of a host.
    """
    name, _, layout = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise ConfigurationError(
            f"--topology must begin with one of {', '.join(CHIPS)}, as in v5e:2x4 or v6e, got {text!r}"
        )
    layout = layout or chip.host_topology
    axes = chip.host_topology.count("x") + 1
    if not re.fullmatch(r"[1-9]\d?(x[1-9]\d?)*", layout) or layout.count("x") + 1 != axes:
        raise ConfigurationError(
            f"--topology must give {axes} numbers for {name}, as in {name}:{chip.host_topology}, got {text!r}"
        )
    topology = Topology(chip, layout)
    if topology.num_chips > chip.host_chips:
        raise ConfigurationError(
            f"--topology must be the chips of one host, of {name} at most {chip.host_chips}, got {text!r} with"
            f" {topology.num_chips}: every host runs a worker of its own; name one host, and give --load for how many"
        )
    whole = chip.host_topology.split("x")
    if any(int(size) % int(part) for size, part in zip(whole, layout.split("x"), strict=True)):
        raise ConfigurationError(
            f"--topology must be a host of {name} or a part of one, whose chips lie {chip.host_topology}, such as"
            f" {name}:{chip.host_topology} or {name}:{'x'.join('1' * axes)}, got {text!r}"
        )
    return topology


def _fill(size: int, whole: int) -> int:
    return -(-size // whole) * whole
