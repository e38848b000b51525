"""`sdtpu_slots_per_device = auto`: the cost curve decides, once."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.diffusion import slot_count
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.failures import is_out_of_memory
from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.diffusion.slot_count import choose_slots_per_device, saved_choice_file
from sdtpu_worker.diffusion.start import make_warm_engine
from sdtpu_worker.errors import ConfigurationError


class Bench:
    """Makes engines whose step of all slots takes what a curve says; `made` counts them."""

    def __init__(self, step_ms: dict[int, float]) -> None:
        self.step_ms, self.made = step_ms, []

    def __call__(self, slots: int) -> Any:
        self.made.append(slots)
        if slots not in self.step_ms:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")
        costs = {(64, 64): TickCosts(8, Cost(self.step_ms[slots] / 1000))}
        return SimpleNamespace(costs=costs, info=SimpleNamespace(num_devices=8, slots_per_device=slots))


@pytest.mark.parametrize(
    ("step_ms", "best"),
    [
        ({1: 20, 2: 24, 4: 34, 8: 60}, 8),  # a device that is far from full
        ({1: 20, 2: 26, 4: 50, 8: 100}, 2),  # full from two on
        ({1: 20, 2: 39.5, 4: 79}, 1),  # full with one: more would only delay every job
        ({1: 20, 2: 24}, 2),  # no saved_choice for four
    ],
)
def test_the_fewest_slots_with_the_best_rate_are_chosen(tmp_path, step_ms, best):
    saved_choice = tmp_path / "slots.json"
    assert choose_slots_per_device(Bench(step_ms), saved_choice).info.slots_per_device == best
    again = Bench(step_ms)
    assert choose_slots_per_device(again, saved_choice).info.slots_per_device == best
    assert again.made == [best], "the choice is kept for good"
    assert json.loads(saved_choice.read_text())["slots_per_device"] == best


KEPT = '{"slots_per_device": 2, "seconds_per_image_step": {}}\n'


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "{",
        KEPT[:30],
        "7",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        "\xff",
        "9" * 5000,
        '{"slots_per_device": %s}' % ("9" * 5000),
        *(KEPT.replace("2", value) for value in ("0", "3", "-1", "1e400", "NaN", '"2"', "true", "2.0", "[2]", "64")),
    ],
    ids=lambda kept: "",
)
def test_a_choice_that_cannot_be_read_is_measured_anew_and_kept_again(tmp_path, caplog, kept):
    """A file half-written by a start that was killed ended every later start."""
    saved_choice = tmp_path / "slots.json"
    saved_choice.write_bytes(kept.encode("latin-1"))
    assert choose_slots_per_device(Bench({1: 20, 2: 24, 4: 34, 8: 60}), saved_choice).info.slots_per_device == 8
    assert caplog.text.count("cannot be read, so it is measured again") == 1
    assert json.loads(saved_choice.read_text())["slots_per_device"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["slots.json"]
    saved_choice.write_text(KEPT)
    assert choose_slots_per_device(Bench({2: 24}), saved_choice).info.slots_per_device == 2


def test_a_choice_that_cannot_be_kept_is_only_a_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    curve: dict[int, float] = {1: 20, 2: 24, 4: 34, 8: 60}
    for saved_choice in (tmp_path / "file" / "slots.json", tmp_path / "folder", tmp_path / "missing" / "slots.json"):
        caplog.clear()
        assert choose_slots_per_device(Bench(curve), saved_choice).info.slots_per_device == 8
        assert caplog.text.count("the next start measures it again") == 1
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("No space left")))
    assert choose_slots_per_device(Bench(curve), tmp_path / "folder" / "slots.json").info.slots_per_device == 8
    assert list((tmp_path / "folder").iterdir()) == [], "nothing half-written stays"


def test_a_start_that_is_killed_as_it_writes_leaves_the_choice_as_it_was(tmp_path, monkeypatch):
    saved_choice = tmp_path / "slots.json"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        choose_slots_per_device(Bench({1: 20, 2: 24, 4: 34, 8: 60}), saved_choice)
    assert not saved_choice.exists()


def test_a_failure_that_is_not_about_memory_is_not_hidden():
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        choose_slots_per_device(Bench({}), None)

    def broken(slots: int) -> Any:
        if slots > 1:
            raise ValueError("a bug")
        return Bench({1: 20})(1)

    with pytest.raises(ValueError, match="a bug"):
        choose_slots_per_device(broken, None)


@pytest.mark.slow
def test_real_engines_are_measured_and_the_choice_is_found_again(
    random_checkpoint, devices, compile_cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(slot_count, "CANDIDATES", (1, 2))  # each is compiled
    checkpoint = load_checkpoint(str(random_checkpoint))
    made = []

    def make(slots: int) -> Engine:
        made.append(slots)
        return make_warm_engine(checkpoint, devices[:2], slots, None, compile_cache)

    saved_choice = saved_choice_file(tmp_path, checkpoint, devices[0], None)
    first = choose_slots_per_device(make, saved_choice)
    assert first.info.slots_per_device in made
    made.clear()
    assert choose_slots_per_device(make, saved_choice).info.slots_per_device == first.info.slots_per_device
    assert made == [first.info.slots_per_device]


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_before_and_after_compiling(
    random_checkpoint, devices, monkeypatch
):
    checkpoint = load_checkpoint(str(random_checkpoint))
    needed = bytes_per_device(checkpoint.params)
    for limit, parts in ((needed - 1, r"\(parameters 0\.00\)"), (needed + 1, r"parameters .*, slots .*working memory")):
        monkeypatch.setattr("sdtpu_worker.diffusion.memory.device_memory", lambda device, limit=limit: limit)
        with pytest.raises(
            ConfigurationError, match=rf"out of memory.* GiB .*{parts}.*sdtpu_slots_per_device"
        ) as caught:
            Engine(checkpoint, devices[:1])
        assert is_out_of_memory(caught.value), "so that `auto` takes fewer slots"
    monkeypatch.setattr("sdtpu_worker.diffusion.memory.device_memory", lambda device: 2**30)
    Engine(checkpoint, devices[:1])
