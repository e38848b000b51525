"""Read the text of an optimised HLO module: computations, instructions, shapes with their place in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r"T\((\d+),(\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
        dtype: as HLO names it.
        sizes: of its axes.
        layout: order of the axes, tiles and memory space, as the text has it; may be empty.
    """

    dtype: str
    sizes: tuple[int, ...]
    layout: str = ""

    @property
    def space(self) -> int:
        """The number of its memory space: 0 is the main memory, on a TPU the HBM; 1 is the VMEM."""
        found = _SPACE.search(self.layout)
        return int(found[1]) if found else 0

    @property
    def num_bytes(self) -> int:
        """Bytes as they lie in memory, with what fills the last tiles up."""
        sizes, tile = list(self.sizes), _TILE.search(self.layout)
        order = [int(axis) for axis in self.layout.partition(":")[0].split(",") if axis.isdigit()]
        if tile and len(order) >= 2:
            for axis, side in zip(order[:2], (int(tile[2]), int(tile[1])), strict=True):
                sizes[axis] = -(-sizes[axis] // side) * side
        return -(-math.prod(sizes) * _BITS.get(self.dtype, 8) // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: of its result.
        opcode: such as `fusion`.
        result: what it makes: the shapes of a tuple's parts, or the one shape.
        operands: names of what it takes.
        text: everything behind the operands.
        is_root: it is the computation's result.
        inside: what stands between the brackets; of a parameter its number.
    """

    name: str
    opcode: str
    result: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool
    inside: str

    @cached_property
    def called(self) -> dict[str, str]:
        """Names of computations by what they are to it: `calls`, `body`, `condition`."""
        return dict(_CALLED.findall(self.text))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Names of a conditional's computations."""
        if found := _BRANCHES.search(self.text):
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        return tuple(self.called[kind] for kind in ("true_computation", "false_computation") if kind in self.called)

    @property
    def trip_count(self) -> int | None:
        """How often a loop runs; None if the program does not know it."""
        found = _TRIPS.search(self.text)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Which operation of the traced program it is, with the scopes around it; empty if unknown."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """What the compiler estimates for it; 0 if it says nothing."""
        found = _CYCLES.search(self.text)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
        head: the first line.
        computations: by name.
        entry: the name of the main one.
    """

    head: str
    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse_module(text: str) -> Module:
    """Return the program that a text says.

    Raises:
        ValueError: the text is no whole HLO module.
    """
    if not text.startswith("HloModule ") or not text.rstrip().endswith("}"):
        raise ValueError("this is no whole HLO module: it must begin with `HloModule` and end with a bracket")
    head, _, rest = text.partition("\n")
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = ""
    for line in rest.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if (found := _INSTRUCTION.match(line)) is not None:
                instruction = _instruction(found, line[found.end() :])
                current[instruction.name] = instruction
        elif (found := _HEAD.match(line)) is not None:
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
    if not entry:
        raise ValueError("this HLO module has no ENTRY computation")
    return Module(head, computations, entry)


def shapes_in(text: str) -> tuple[Shape, ...]:
    """Return every array shape that a text names."""
    return tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), layout or "")
        for dtype, sizes, layout in _SHAPE.findall(text)
    )


def _instruction(found: re.Match[str], rest: str) -> Instruction:
    end = _closing(rest) if rest.startswith("(") else _first_space(rest)
    type_text, rest = rest[:end], rest[end:].lstrip()
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f"this HLO instruction has no operation: {rest[:80]!r}")
    start = opcode.end() - 1
    stop = start + _closing(rest[start:])
    inside = rest[start + 1 : stop - 1]
    return Instruction(
        found[2], opcode[1], shapes_in(type_text), tuple(_NAME.findall(inside)), rest[stop:], bool(found[1]), inside
    )


def _closing(text: str) -> int:
    """Return where the bracket that a text begins with has closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            return i + 1
    raise ValueError(f"this HLO text has an open bracket: {text[:80]!r}")


def _first_space(text: str) -> int:
    return text.index(" ")


def instructions(module: Module) -> Iterator[Instruction]:
    """Yield every instruction of a program."""
    for computation in module.computations.values():
        yield from computation.values()
