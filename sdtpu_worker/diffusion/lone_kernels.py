"""Kernels that are compiled by themselves, so that libtpu writes down their instructions and no others.

To write down what it makes takes libtpu half as long again as to make it, and a program's other operations are most of
it. It can keep to the instruction of one name, which each kernel of a program would have to have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

_NAME = "lone_kernel"
"""What the call is named in the program of each of them; `planning.kernels` looks for it."""


def compile_lone_kernels(equations: Iterable[Any], device: Any) -> None:
    """Compile each kernel as a program of its own, and leave the programs to nobody.

    Args:
        equations: calls of Pallas kernels, as `matmul_counts.KernelWork` has them.
        device: described, or real.
    """
    sharding = SingleDeviceSharding(device)
    for equation in equations:
        shapes = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype, sharding=sharding) for each in equation.invars]
        _program(equation).lower(*shapes).compile()


def _program(equation: Any) -> Any:
    def call(*operands: Any) -> Any:
        with jax.named_scope(equation.params["name"]), jax.named_scope(_NAME):
            return equation.primitive.bind(*operands, **equation.params)

    return jax.jit(call)
