"""What a device worker changes in the Python process is undone."""

from __future__ import annotations

import gc

import pytest

from sdtpu_worker.worker.process_changes import pause_collection


def test_the_collector_rests_and_goes_on_also_after_an_error():
    def fail_to_import() -> None:
        with pause_collection():
            assert not gc.isenabled()
            raise ImportError("no jax")

    assert gc.isenabled()
    with pytest.raises(ImportError, match="no jax"):
        fail_to_import()
    assert gc.isenabled()


def test_a_collector_that_somebody_turned_off_stays_off():
    gc.disable()
    try:
        with pause_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
