"""A Flax module seen as a plain function of plain parameters.

Modules are written in NNX, which nests attributes and lists as PyTorch does: the path to a parameter is the name of the
tensor in a PyTorch checkpoint. Nothing outside `models/` knows that. It sees a flat dict of arrays by tensor name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx


class Network:
    """A module without its parameters. Calls are pure, so they can be traced; any thread.

    Args:
        make: makes the module; it is only ever run abstractly, so it computes nothing and takes no memory.

    Attributes:
        shapes: by tensor name, the shape of a parameter in the layout of this package (`layers.py`).
    """

    def __init__(self, make: Callable[[], nnx.Module]) -> None:
        self._graph, state = nnx.split(nnx.eval_shape(make))
        self._paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}
        self.shapes: dict[str, tuple[int, ...]] = {
            ".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)
        }

    def __call__(self, params: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Run the module.

        Args:
            params: by tensor name, all those of `shapes`.
            *args: of the method.
            method: of the module.
            **kwargs: of the method.

        Raises:
            KeyError: a parameter is missing.
        """
        state = nnx.from_flat_state([(path, nnx.Param(params[name])) for name, path in self._paths.items()])
        return getattr(nnx.merge(self._graph, state), method)(*args, **kwargs)


def parameter(*shape: int) -> nnx.Param:
    """Return a parameter of this shape; its values come with each call of the network."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))
