"""Count what an optimised program moves through the HBM, part by part of a tick."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from sdtpu_worker.planning.hlo import Instruction, Module, Shape, instructions

HBM = 0
_MOVES_NOTHING = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all", "partition-id", "replica-id",
    "opt-barrier", "add-dependency", "async-update", "domain",
}  # fmt: skip
_NAMES_ONLY = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
"""Custom calls by which the compiler renames or reserves memory; they move nothing."""
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNEL = "tpu_custom_call"
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|send|recv)(-start)?"
)
_PHASES = re.compile(r"^jit\(\w+\)/(shard_map/)?while$")
"""The loop over phases; of a single device JAX leaves the scope of the sharding out."""
_STEPS = re.compile(r"/advance/(cond/\w+/)?while$")
_OPTION = re.compile(r"/(windows|control)/cond$")
"""Conditionals of what only some jobs ask for; the names are those of `models.prompt_windows` and `denoising`."""
_OPTIONS, _NONE = frozenset({"windows", "control"}), frozenset[str]()
_ALL = _OPTIONS | {"other"}
_READS_A_PART = {"slice", "dynamic-slice", "gather"}


@dataclass
class Work:
    """What a part of a program does, once.

    Attributes:
        hbm_bytes: read and written.
        cycles: as the compiler estimates; 0 before code is generated. Kernels are not in it.
        kernel_cycles: of the Pallas kernels, as `kernels.KernelCycles` has them; 0 before code is generated.
        kernels: how many Pallas kernels run.
        loops_of_unknown_length: that were counted as if they ran once.
    """

    hbm_bytes: int = 0
    cycles: int = 0
    kernel_cycles: int = 0
    kernels: int = 0
    loops_of_unknown_length: int = 0

    def add(self, other: Work, times: int = 1) -> None:
        """Add another's work, so many times; -1 takes it away."""
        self.hbm_bytes += other.hbm_bytes * times
        self.cycles += other.cycles * times
        self.kernel_cycles += other.kernel_cycles * times
        self.kernels += other.kernels * times
        self.loops_of_unknown_length += other.loops_of_unknown_length * times


@dataclass
class TickWork:
    """The parts of a tick: what runs once for each tick and phase, and what for each insert, step and decode.

    Attributes:
        tick: outside the loop over phases.
        phase: in each phase, besides the next three.
        insert, step, decode: each time; those of jobs without pictures, ControlNets and long prompts.
        picture: what an insert does besides for a job with pictures.
        windows: what a step does besides while prompts have several windows: kernels with all windows of all prompts;
            where conditionals stand for them, these, with the loop over the windows counted once.
        control: what a step does besides for jobs that ask all ControlNets.
    """

    tick: Work = field(default_factory=Work)
    phase: Work = field(default_factory=Work)
    insert: Work = field(default_factory=Work)
    picture: Work = field(default_factory=Work)
    step: Work = field(default_factory=Work)
    decode: Work = field(default_factory=Work)
    windows: Work = field(default_factory=Work)
    control: Work = field(default_factory=Work)


class Traffic:
    """Counts a program's work.

    A fusion reads its operands and writes its results once; of an operand of which it uses a slice, it reads the slice,
    and of a buffer that it changes in place, it writes what it changes. What lies in VMEM costs nothing.

    Args:
        module: the optimised program.
        kernel_cycles: says of the text of a kernel's call how many cycles it takes, with all windows of all prompts or
            with the first alone.
    """

    def __init__(self, module: Module, kernel_cycles: Callable[[str, bool], int] = lambda text, has_windows: 0) -> None:
        self._module = module
        self._kernel_cycles = kernel_cycles
        self._done: dict[tuple[str, frozenset[str]], Work] = {}

    @cached_property
    def collectives(self) -> dict[str, int]:
        """How many operations move data between devices, by kind."""
        found = Counter(kind[1] for each in instructions(self._module) if (kind := _COLLECTIVE.fullmatch(each.opcode)))
        return dict(found)

    @cached_property
    def aliased(self) -> int:
        """How many results take the place of an argument."""
        table = self._module.head.partition("input_output_alias={")[2].partition("entry_computation_layout")[0]
        return len(re.findall(r"\{[\d, ]*\}: \(", table))

    @property
    def argument_bytes(self) -> int:
        """Bytes of the arguments as they lie in memory."""
        entry = self._module.computations[self._module.entry].values()
        return sum(_in_hbm(each.result) for each in entry if each.opcode == "parameter")

    def total(self) -> Work:
        """Return the work of the whole program, with each loop of unknown length run once."""
        return self._of(self._module.entry)

    def tick(self) -> TickWork:
        """Return the work of a tick's parts.

        Raises:
            ValueError: the program is no tick: the scopes of `diffusion.programs` are not in it.
        """
        found = TickWork()
        for instruction in self._module.computations[self._module.entry].values():
            if instruction.opcode == "while" and _PHASES.search(instruction.op_name):
                self._phase(instruction.called["body"], found, found.phase)
            else:
                found.tick.add(self._one(instruction, self._module.entry))
        if not found.step.hbm_bytes or not found.decode.hbm_bytes:
            raise ValueError("this program is no tick: it has no loop over phases, or none over steps in it")
        return found

    def _phase(self, name: str, found: TickWork, here: Work) -> None:
        for instruction in self._module.computations[name].values():
            of = instruction.op_name
            if instruction.opcode == "while" and _STEPS.search(of):
                body = instruction.called["body"]
                found.step.add(self._of(body, _OPTIONS))
                for option, part in (("windows", found.windows), ("control", found.control)):
                    part.add(self._of(body, _OPTIONS - {option}))
                    part.add(self._of(body, _OPTIONS), -1)
            elif instruction.opcode == "conditional" and of.endswith("/insert/cond"):
                dearest = self._dearest(instruction.branches)
                branch = max(instruction.branches, key=lambda name: self._of(name).hbm_bytes)
                found.insert.add(self._of(branch, _ALL))
                found.picture.add(dearest)
                found.picture.add(self._of(branch, _ALL), -1)
            elif instruction.opcode == "conditional" and of.endswith("/decode/cond"):
                found.decode.add(self._dearest(instruction.branches))
            elif instruction.opcode == "conditional" and self._has_steps(instruction.branches):
                for branch in instruction.branches:
                    self._phase(branch, found, here)
            else:
                here.add(self._one(instruction, name))

    def _has_steps(self, branches: Iterable[str]) -> bool:
        inner = (each for branch in branches for each in self._module.computations[branch].values())
        return any(each.opcode == "while" and "/advance/" in each.op_name for each in inner)

    def _of(self, name: str, cheap: frozenset[str] = _NONE) -> Work:
        """Return the work of a computation.

        Args:
            name: of it.
            cheap: the kinds of conditionals of which the cheapest branch counts, and not the dearest; see `_kind`. With
                `windows` kernels look at the first window of each prompt alone.
        """
        if (name, cheap) not in self._done:
            found = Work()
            for instruction in self._module.computations[name].values():
                found.add(self._one(instruction, name, cheap))
            self._done[name, cheap] = found
        return self._done[name, cheap]

    def _dearest(self, branches: Iterable[str]) -> Work:
        return max((self._of(branch) for branch in branches), key=_size)

    def _one(self, instruction: Instruction, where: str, cheap: frozenset[str] = _NONE) -> Work:
        """Return the work of one instruction of a computation."""
        opcode, found = instruction.opcode, Work(cycles=instruction.cycles)
        if opcode in _MOVES_NOTHING or opcode.endswith("-done"):
            return Work()
        if opcode == "while":
            trips = instruction.trip_count
            found.add(self._of(instruction.called["body"], cheap), 1 if trips is None else trips)
            found.loops_of_unknown_length += trips is None
        elif opcode == "conditional":
            choose = min if _kind(instruction) in cheap else max
            found.add(choose((self._of(branch, cheap) for branch in instruction.branches), key=_size))
        elif opcode == "call":
            found.add(self._of(instruction.called["to_apply"], cheap))
        elif opcode == "async-start":
            found.add(self._of(instruction.called["calls"], cheap))
        elif opcode == "custom-call" and (target := _TARGET.search(instruction.text)) and target[1] in _NAMES_ONLY:
            return Work()
        elif opcode == "copy-start":
            found.hbm_bytes = _in_hbm(instruction.result[:2])
        else:
            if f'"{_KERNEL}"' in instruction.text:
                found.kernels, found.kernel_cycles = 1, self._kernel_cycles(instruction.text, "windows" not in cheap)
            found.hbm_bytes = self._bytes(instruction, where)
        return found

    def _bytes(self, instruction: Instruction, where: str) -> int:
        computation = self._module.computations[where]
        operands = [computation[name].result for name in instruction.operands if name in computation]
        opcode, result = instruction.opcode, instruction.result
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        if opcode.endswith("-start"):
            # Once code is generated, the text has `slice-start` for an `async-start` that calls a slice. Its result is
            # the operands, what the operation makes, and a context.
            first = sum(map(len, operands))
            opcode, result = opcode.removesuffix("-start"), result[first : first + 1]
        if opcode in _READS_A_PART:
            return _in_hbm(result) + _bytes_of(result) * (bool(operands) and _is_in_hbm(operands[0]))
        if opcode == "dynamic-update-slice":
            return _in_hbm(operands[1]) + _bytes_of(operands[1]) * _is_in_hbm(result)
        return _in_hbm(result) + sum(map(_in_hbm, operands))

    def _fusion_bytes(self, fusion: Instruction, operands: list[tuple[Shape, ...]]) -> int:
        inner = self._module.computations[fusion.called["calls"]]
        uses: dict[str, list[Instruction]] = {}
        for each in inner.values():
            for name in each.operands:
                uses.setdefault(name, []).append(each)
        parameters = {int(each.inside): each for each in inner.values() if each.opcode == "parameter"}
        read = 0
        for number, shapes in enumerate(operands):
            if _is_in_hbm(shapes) and number in parameters:
                read += min(_read_of(parameters[number], uses, inner), _bytes_of(shapes))
        root = next(each for each in inner.values() if each.is_root)
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = 0
        for part, shape in zip(parts, fusion.result, strict=False):
            if shape.space == HBM:
                written += min(_written_by(part, inner), shape.num_bytes)
        return read + written


def _read_of(parameter: Instruction, uses: dict[str, list[Instruction]], inner: dict[str, Instruction]) -> int:
    """Return the bytes that a fusion reads of one operand."""
    whole, read = _bytes_of(parameter.result), 0
    for use in uses.get(parameter.name, ()):
        if use.opcode in _READS_A_PART and use.operands[0] == parameter.name:
            read += _bytes_of(use.result)
        elif use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name:
            continue  # changed in place
        elif use.opcode == "bitcast":
            read += _read_of(use, uses, inner)
        else:
            return whole
    return min(read, whole)


def _written_by(part: Instruction, inner: dict[str, Instruction]) -> int:
    """Return the bytes that a fusion writes of one result."""
    while part.opcode == "bitcast" and part.operands[0] in inner:
        part = inner[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _bytes_of(inner[part.operands[1]].result)
    return _bytes_of(part.result)


def _kind(conditional: Instruction) -> str:
    """Return what a conditional is of: `windows`, `control`, or `other`."""
    found = _OPTION.search(conditional.op_name)
    return found[1] if found else "other"


def _size(work: Work) -> tuple[int, int]:
    return work.hbm_bytes, work.cycles


def _is_in_hbm(shapes: tuple[Shape, ...]) -> bool:
    return bool(shapes) and shapes[0].space == HBM


def _in_hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.num_bytes for shape in shapes if shape.space == HBM)


def _bytes_of(shapes: Iterable[Shape]) -> int:
    return sum(shape.num_bytes for shape in shapes)
