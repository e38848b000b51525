"""What the Pallas kernels of a compiled program take: the compiler estimates its own operations, but not them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtpu_worker.planning.chips import Chip
from sdtpu_worker.planning.hlo import shapes_in

_TARGET = 'custom_call_target="tpu_custom_call"'
_LONE = "lone_kernel"
"""The name of each kernel that is compiled by itself, as `diffusion.lone_kernels` gives it."""
_NAME = re.compile(rf'op_name="[^"]*?([\w.]+)(?:/{_LONE})?/pallas_call"')
_OPERANDS = "operand_layout_constraints={"
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_OF_WINDOWS = re.compile(r"^\w+_of_windows\(")
"""Kernels with code for one window of a prompt and code for all; the name is that of `models.attention.tpu_kernel`."""
_ADDRESS = re.compile(r"^\s*0x([0-9a-f]+)")
_SKIP = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_REGION = re.compile(r"region (\d+)\b")


@dataclass(frozen=True)
class Bundles:
    """The instruction bundles of one step of a kernel.

    Attributes:
        most: while all prompts have all windows.
        least: while all prompts have one; the same for kernels that look at no prompt.
    """

    most: int
    least: int


def dump_options(folder: Path) -> str:
    """Return the options of libtpu that make it write the instructions of kernels to a folder.

    Of those alone that are compiled by themselves: of all that it compiles, that would take it half as long again.
    """
    return (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        f" --xla_jf_dump_only_matching_hlo={_LONE}.1"
    )


def read_bundles(folder: Path) -> dict[str, Bundles]:
    """Return how many instruction bundles each kernel has, from what libtpu wrote with `dump_options`."""
    found = {}
    for file in folder.glob("*schedule-analysis_final_bundles.txt"):
        text = file.read_text(encoding="utf-8", errors="replace")
        key, bundles = kernel_key(text), _BUNDLES.search(text)
        if key and bundles:
            total = int(bundles[1])
            of_one, of_all = _alternatives(file) if _OF_WINDOWS.match(key) else (0, 0)
            found[key] = Bundles(total - of_one, total - of_all)
    return found


def _alternatives(analysis: Path) -> tuple[int, int]:
    """Return the bundles of a kernel's code for one window, and of that for all windows.

    The compiler makes of it two stretches, each behind a branch over it, and the second begins where the first ends.

    Args:
        analysis: the kernel's file of the schedule; its instructions lie beside it.

    Returns:
        Zeros where there are no instructions, or no such stretches: all bundles then count.
    """
    files = list(analysis.parent.glob(f"{analysis.name.partition('-00-')[0]}-*-final_bundles.txt"))
    lines = [line for file in files if file != analysis for line in file.read_text(errors="replace").splitlines()]
    skips, ends = dict[str, int](), dict[int, int]()
    for line in lines:
        if address := _ADDRESS.match(line):
            place = int(address[1], 16)
            ends |= {skips.pop(name): place for name in _REGION.findall(line) if name in skips}
            skips |= dict.fromkeys(_SKIP.findall(line), place)
    pairs = [(end - start, ends[end] - end) for start, end in ends.items() if end in ends]
    return max(pairs, key=sum, default=(0, 0))


def kernel_key(text: str) -> str | None:
    """Return a kernel's name and the shapes of its operands, from the text of the call; None if it is no kernel.

    A program may call a kernel often, and the compiler compiles it once, so that this, not the name of the call, says
    which one it is. `matmul_counts.collecting_kernels` of the tracing side has the same keys.
    """
    name = _NAME.search(text) if _TARGET in text else None
    if name is None:
        return None
    shapes = shapes_in(text.partition(_OPERANDS)[2].partition("}}")[0])
    operands = ", ".join(f"{each.dtype}[{','.join(map(str, each.sizes))}]" for each in shapes)
    return f"{name[1]}({operands})"


class KernelCycles:
    """Says how many cycles a kernel takes.

    A kernel runs its instruction bundles once for each step of its grid, one bundle in a cycle at best. Nor can it be
    faster than the matrix unit.

    Args:
        kernels: by their keys `steps`, and `matmuls` of all steps as lists `[m, k, n, times]`; `matmuls_of_one_window`
            while all prompts have one.
        bundles: by their keys; may lack some, or all before code is generated.
        chip: the target.
    """

    def __init__(self, kernels: Mapping[str, Mapping[str, Any]], bundles: Mapping[str, Bundles], chip: Chip) -> None:
        self._kernels, self._bundles = kernels, bundles
        self._flops_per_cycle, self._chip = chip.flops / chip.clock_hz, chip

    def __call__(self, text: str, has_windows: bool) -> int:
        """Return the cycles of the kernel that is called in the text of an instruction; 0 if nothing is known.

        Args:
            text: of the call.
            has_windows: all prompts have all windows; otherwise one.
        """
        key = kernel_key(text) or ""
        if not self._bundles or key not in self._kernels:
            return 0
        facts, bundles = self._kernels[key], self._bundles.get(key, Bundles(0, 0))
        matmuls = facts["matmuls" if has_windows else "matmuls_of_one_window"]
        of_matrix_unit = int(_padded_flops(matmuls, self._chip) / self._flops_per_cycle)
        of_instructions: int = facts["steps"] * (bundles.most if has_windows else bundles.least)
        return max(of_instructions, of_matrix_unit)


def _padded_flops(matmuls: Sequence[Sequence[int]], chip: Chip) -> int:
    return sum(chip.padded_flops(m, k, n) * times for m, k, n, times in matmuls)
