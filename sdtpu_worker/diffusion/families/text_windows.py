"""Prompts in windows: what a text encoder makes of each, with weights, and what a slot keeps of them.

Shapes: W windows that a prompt may have, L tokens of a window, E features, `rows` as in `Family.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdtpu_worker.diffusion.families.family import WINDOWS, Arrays
from sdtpu_worker.models.prompt_windows import Context, PromptWindows

Encode = Callable[[Arrays], tuple[jax.Array, Any]]
"""Makes of one window of each row, by name `(rows, …)`, states `(rows, L, E)`, and a tree of arrays `(rows, …)`."""


def window_shapes(most: int, length: int, width: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of what a slot keeps of a row's prompt.

    Args:
        most: W.
        length: L.
        width: E.
        dtype: of the states.
    """
    shapes = {"context": jax.ShapeDtypeStruct((length, width), dtype)}
    if most > 1:
        shapes["further_context"] = jax.ShapeDtypeStruct((most - 1, length, width), dtype)
        shapes[WINDOWS] = jax.ShapeDtypeStruct((), jnp.int32)
    return shapes


def context_of(conditioning: Arrays) -> Context:
    """Return what the pixels attend to, of what slots keep: by name `(R, …)`."""
    if WINDOWS not in conditioning:
        context: jax.Array = conditioning["context"]
        return context
    return PromptWindows(conditioning["context"], conditioning["further_context"], conditioning[WINDOWS])


def encode_windows(encode: Encode, windows: Mapping[str, jax.Array], counts: jax.Array | None) -> tuple[Arrays, Any]:
    """Encode as many windows as the longest of a job's rows has.

    Args:
        encode: the text encoders.
        windows: what they take, by name `(rows, W, …)`.
        counts: `(rows,) int32`, the windows of each row; None where W is 1.

    Returns:
        What a slot keeps of it (see `window_shapes`), zeros for windows that a row does not have; and the other
        result of `encode`, of the first windows.
    """
    if counts is None:
        context, rest = encode({name: leaf[:, 0] for name, leaf in windows.items()})
        return {"context": context}, rest
    most = next(iter(windows.values())).shape[1]

    def window(number: Any) -> Arrays:
        take = jax.lax.dynamic_index_in_dim
        return {name: take(leaf, number, axis=1, keepdims=False) for name, leaf in windows.items()}

    def add(number: jax.Array, before: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        context, rest = encode(window(number))
        own = jnp.where((number < counts)[:, None, None], context, 0)
        first = jax.tree.map(lambda old, new: jnp.where(number == 0, new, old), before[1], rest)
        return jax.lax.dynamic_update_index_in_dim(before[0], own, number, axis=0), first

    shape, rest = jax.eval_shape(lambda: encode(window(0)))
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    contexts, rest = jax.lax.fori_loop(0, counts.max(), add, (jnp.zeros((most, *shape.shape), shape.dtype), nothing))
    kept = {"context": contexts[0], "further_context": contexts[1:].swapaxes(0, 1), WINDOWS: counts}
    return kept, rest


def weigh(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply each token's state by its weight, and bring each window back to the mean that it had.

    That is what A1111's web UI calls emphasis "Original". A window whose weights are all 1 stays as it is, bit for bit.

    Args:
        states: `(rows, L, E)`, of a text encoder.
        weights: `(rows, L) float32`.
    """
    weighted = states.astype(jnp.float32) * weights[..., None]
    before, after = (each.astype(jnp.float32).mean((1, 2), keepdims=True) for each in (states, weighted))
    restored = weighted * jnp.where(after == 0, 1, before / after)
    is_weighted = (weights != 1).any(axis=1)[:, None, None]
    return jnp.where(is_weighted, restored.astype(states.dtype), states)
