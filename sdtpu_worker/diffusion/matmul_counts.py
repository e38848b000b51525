"""The matrix multiplications of a traced function: what a matrix unit has to do, whatever computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from sdtpu_worker.models.attention.tpu_kernel import OF_WINDOWS

Matmuls = Counter[tuple[int, int, int]]
"""How often each `(m, k, n)` occurs: an `(m, k)` matrix times a `(k, n)` one.

A convolution counts as one multiplication for each place of its kernel, with its input channels as k.
"""


class KernelWork(NamedTuple):
    """What is known of a Pallas kernel when it is traced.

    Attributes:
        steps: of its grid.
        matmuls: of all steps.
        matmuls_of_one_window: likewise, while all prompts have one window; the same for kernels that look at no prompt.
        equation: the call, as it was traced.
    """

    steps: int
    matmuls: Matmuls
    matmuls_of_one_window: Matmuls
    equation: Any


_collected: ContextVar[dict[str, KernelWork] | None] = ContextVar("collected kernels", default=None)


def count_matmuls(function: Callable[..., Any], *args: Any) -> Matmuls:
    """Trace a function, and count its matrix multiplications; of a conditional, the dearest branch.

    Args:
        function: a pure function of arrays.
        *args: its arguments, or their shapes.
    """
    return count_least_and_most(function, *args)[1]


def count_least_and_most(function: Callable[..., Any], *args: Any) -> tuple[Matmuls, Matmuls]:
    """Do the same with the cheapest branch of each conditional, and with the dearest; trace once."""
    # A function of its own each time: JAX keeps what it traced of one, whatever selection of kernels counted then.
    jaxpr = jax.make_jaxpr(lambda *arrays: function(*arrays))(*args).jaxpr
    if (collected := _collected.get()) is not None:
        collected.update(_kernels(jaxpr))
    return _count(jaxpr, min), _count(jaxpr, max)


@contextmanager
def collecting_kernels() -> Iterator[dict[str, KernelWork]]:
    """Collect the Pallas kernels of all functions that are counted inside the `with`.

    Yields:
        By a kernel's name and the shapes of its operands, as the TPU's compiler writes them, such as
        `convolution(bf16[1,64,64,512], f32[1,1,512])`: how many steps it has, the matrix multiplications of all,
        and its call. Of a branch inside a kernel the dearest counts.
    """
    found: dict[str, KernelWork] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def _kernels(jaxpr: Any) -> Iterator[tuple[str, KernelWork]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name != "pallas_call":
            for inner in _inner(equation.params):
                yield from _kernels(inner)
            continue
        operands = ", ".join(_hlo_shape(each.aval) for each in equation.invars)
        steps, name = math.prod(equation.params["grid_mapping"].grid), equation.params["name"]
        matmuls = _count_inside(equation, max)
        of_one_window = _count_inside(equation, min) if name.endswith(OF_WINDOWS) else matmuls
        yield f"{name}({operands})", KernelWork(steps, matmuls, of_one_window, equation)


def _hlo_shape(aval: Any) -> str:
    kinds = {"f": "f", "i": "s", "u": "u"}
    dtype = "bf16" if aval.dtype.name == "bfloat16" else f"{kinds[aval.dtype.kind]}{8 * aval.dtype.itemsize}"
    return f"{dtype}[{','.join(map(str, aval.shape))}]"


def _count(jaxpr: Any, choose: Callable[..., Matmuls]) -> Matmuls:
    found: Matmuls = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            left, right = (each.aval.shape for each in equation.invars)
            shape, times = _dot(left, right, params["dimension_numbers"])
            found[shape] += times
        elif name == "conv_general_dilated":
            shape, times = _convolution(equation)
            found[shape] += times
        elif name == "cond":
            branches = [_count(branch.jaxpr, choose) for branch in params["branches"]]
            found.update(choose(branches, key=_size))
        else:
            found.update(_count_inside(equation, choose))
    return found


def _count_inside(equation: Any, choose: Callable[..., Matmuls]) -> Matmuls:
    """Return the multiplications in all runs of what an equation has inside."""
    found: Matmuls = Counter()
    times = _repeats(equation.primitive.name, equation.params)
    for inner in _inner(equation.params):
        for shape, count in _count(inner, choose).items():
            found[shape] += count * times
    return found


def _size(matmuls: Mapping[tuple[int, int, int], int]) -> int:
    return sum(math.prod(shape) * count for shape, count in matmuls.items())


def _repeats(name: str, params: Any) -> int:
    """Return how often an equation runs what is in it: a loop of unknown length counts once."""
    if name == "scan":
        return int(params["length"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _inner(params: Any) -> Iterator[Any]:
    """Yield the jaxprs among an equation's parameters."""
    for value in params.values():
        for each in value if isinstance(value, list | tuple) else (value,):
            each = getattr(each, "jaxpr", each)  # of a closed one
            if hasattr(each, "eqns"):
                yield each


def _dot(left: tuple[int, ...], right: tuple[int, ...], numbers: Any) -> tuple[tuple[int, int, int], int]:
    (left_contracted, right_contracted), (left_batch, right_batch) = numbers
    batch = math.prod(left[axis] for axis in left_batch)
    k = math.prod(left[axis] for axis in left_contracted)
    m = math.prod(size for axis, size in enumerate(left) if axis not in (*left_contracted, *left_batch))
    n = math.prod(size for axis, size in enumerate(right) if axis not in (*right_contracted, *right_batch))
    return (m, k, n), batch


def _convolution(equation: Any) -> tuple[tuple[int, int, int], int]:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    out_features, in_features, *places = (kernel[axis] for axis in numbers.rhs_spec)
    rows = math.prod(out) // out[numbers.out_spec[1]]
    return (rows, in_features, out_features // groups), groups * math.prod(places)
