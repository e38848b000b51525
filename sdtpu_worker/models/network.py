"""A Flax module as a plain function of a flat dictionary of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import jax
from flax import nnx

from sdtpu_worker.models.layers import Adapter

Params = Mapping[str, jax.Array]


class Network:
    """A model without its parameters. Immutable; any thread.

    NNX, not Linen: it is where Flax goes, and its modules nest as PyTorch's do, so that the path of a parameter, joined
    with dots, is the name that PyTorch has for it and no table of names exists.

    Args:
        make: builds the module; it runs abstractly, so that no memory is taken, whatever the size.
    """

    def __init__(self, make: Callable[[], nnx.Module]) -> None:
        self._graph, state = nnx.split(nnx.eval_shape(make))
        variables = nnx.to_flat_state(state)
        self._paths = {".".join(map(str, path)): path for path, _ in variables}
        self._variables = {name: variable for name, (_, variable) in zip(self._paths, variables, strict=True)}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter in our layout, by PyTorch's name."""
        return {name: tuple(variable.shape) for name, variable in self._variables.items()}

    @cached_property
    def torch_axes(self) -> dict[str, tuple[int, ...]]:
        """For each parameter that PyTorch keeps in another layout the axes that `transpose` needs to make it ours."""
        axes = {name: variable.get_metadata().get("torch_axes") for name, variable in self._variables.items()}
        return {name: permutation for name, permutation in axes.items() if permutation is not None}

    @cached_property
    def torch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter in PyTorch's layout, by PyTorch's name."""
        shapes = dict(self.shapes)
        for name, axes in self.torch_axes.items():
            shapes[name] = tuple(self.shapes[name][axes.index(axis)] for axis in range(len(axes)))
        return shapes

    @cached_property
    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(int(variable.size) for variable in self._variables.values())

    def __call__(
        self,
        params: Params,
        *args: Any,
        method: str = "__call__",
        adapters: Mapping[str, Adapter] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model; can be traced.

        Args:
            params: an array for each name in `shapes`; others are left alone.
            *args: of the module's method.
            method: name of the method.
            adapters: by the name of a weight, of a `Linear` or of a `Conv` of 1 × 1, what is added to its layer.
            **kwargs: of the module's method.

        Raises:
            KeyError: a parameter is missing.
        """
        state = nnx.from_flat_state(
            [(path, self._variables[name].replace(params[name])) for name, path in self._paths.items()]
        )
        model = nnx.merge(self._graph, state)
        for name, adapter in (adapters or {}).items():
            self._layer(model, name).adapter = adapter
        return getattr(model, method)(*args, **kwargs)

    def _layer(self, model: Any, name: str) -> Any:
        """Return the layer of a model that has the parameter of this name."""
        for key in self._paths[name][:-1]:
            model = model[key] if isinstance(key, int) else getattr(model, key)
        return model
