"""One method of a result backend, replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced_method(backend: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have a backend call another function in place of one of its methods for the block.

    Args:
        backend: of this thread; other threads that share it notice.
        name: of the method.
        function: called in its place, without the backend.
    """
    before = vars(backend).get(name)
    setattr(backend, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(backend, name)
        else:
            setattr(backend, name, before)
