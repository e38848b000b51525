"""The matrix multiplications of a traced function: what a matrix unit has to do, whatever computes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

Matmuls = Counter[tuple[int, int, int]]
"""How often each `(m, k, n)` occurs: an `(m, k)` matrix times a `(k, n)` one.

A convolution counts as one multiplication for each place of its kernel, with its input channels as k.
"""


def count_matmuls(function: Callable[..., Any], *args: Any) -> Matmuls:
    """Trace a function, and count its matrix multiplications; of a conditional, the dearest branch.

    Args:
        function: a pure function of arrays.
        *args: its arguments, or their shapes.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> Matmuls:
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
            branches = [_count(branch.jaxpr) for branch in params["branches"]]
            found.update(max(branches, key=_size))
        else:
            times = _repeats(name, params)
            for inner in _inner(params):
                for shape, count in _count(inner).items():
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
