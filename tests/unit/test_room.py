"""The room itself: what its tests could not be trusted to notice."""

from __future__ import annotations

import importlib

import pytest


def test_no_test_of_this_room_can_load_jax():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("jax")
