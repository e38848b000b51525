"""Take out of a loop's body what it makes of the parameters alone, and do that once, before the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

_MOST_GROWTH = 2
"""An operation that makes more than so many times the numbers it takes stays in the loop, where it is fused."""
_RESHAPES = {"reshape", "broadcast_in_dim", "squeeze", "expand_dims"}
"""If the result of one came from outside the loop, with axes of one, XLA would bring it back to what it was."""


def hoist(function: Callable[..., Any], fixed: Any, *args: Any) -> Callable[..., Any]:
    """Return a function of `args` that is `function(fixed, *args)`; what needs `fixed` alone is computed now, once.

    XLA moves operations out of a loop too, but none that makes more bytes than it takes: a cast of a norm's weight to
    float32, or the columns of a projection that are brought to whole tiles, it does again in every step.

    Args:
        function: can be traced. What it closes over counts as an argument.
        fixed: a tree of arrays.
        *args: trees of arrays; what is returned takes others of the same shapes.
    """
    traced, out_shape = jax.make_jaxpr(function, return_shape=True)(fixed, *args)
    flat_fixed, flat_args = jax.tree.leaves(fixed), jax.tree.leaves(args)
    early, late, kept = _divide(traced.jaxpr, len(flat_fixed))
    first = ClosedJaxpr(traced.jaxpr.replace(eqns=early, outvars=kept), traced.consts)
    made = jaxpr_as_fun(first)(*flat_fixed, *flat_args)
    then = ClosedJaxpr(
        traced.jaxpr.replace(eqns=late, constvars=[*traced.jaxpr.constvars, *kept]), [*traced.consts, *made]
    )
    out_tree = jax.tree.structure(out_shape)

    def run(*args: Any) -> Any:
        return jax.tree.unflatten(out_tree, jaxpr_as_fun(then)(*flat_fixed, *jax.tree.leaves(args)))

    return run


def _divide(jaxpr: Any, num_fixed: int) -> tuple[list[JaxprEqn], list[JaxprEqn], list[Any]]:
    """Divide a function's operations into those before the loop and those in it.

    Operations on nothing but literals are in both: a constant is cheaper to make again than to keep. So are those that
    only name axes anew, which cost nothing in the loop.

    Returns:
        Both, and the variables that the first make for the others.
    """
    known, constant = set(jaxpr.invars[:num_fixed]), set[Any]()
    early, late = list[JaxprEqn](), list[JaxprEqn]()
    made = list[Any]()
    for each in jaxpr.eqns:
        needs = _variables(each.invars)
        if needs <= constant and not each.effects:
            constant.update(each.outvars)
            early.append(each)
            late.append(each)
        elif needs <= known | constant and not each.effects and not _grows(each):
            known.update(each.outvars)
            early.append(each)
            if each.primitive.name in _RESHAPES:
                late.append(each)
            else:
                made += each.outvars
        else:
            late.append(each)
    wanted = _variables(jaxpr.outvars).union(*(_variables(each.invars) for each in late))
    return early, late, [each for each in made if each in wanted]


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {each for each in atoms if not isinstance(each, Literal)}


def _grows(equation: JaxprEqn) -> bool:
    taken, made = (sum(math.prod(each.aval.shape) for each in side) for side in (equation.invars, equation.outvars))
    return made > _MOST_GROWTH * taken
