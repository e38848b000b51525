"""Which LoRAs lie where: whatever the plans do, a job finds its own until it leaves its slot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.diffusion.adapter_bank import AdapterBank, num_entries
from sdtpu_worker.diffusion.adapters import AdapterLayout, JobAdapters
from sdtpu_worker.diffusion.sharding import make_mesh

LANES, DEVICES, SLOTS, PHASES = ((8, 8), (16, 16)), 2, 2, 3
ENTRIES = num_entries(len(LANES), SLOTS, PHASES)
LAYOUT = AdapterLayout(1, jnp.float32, {"unet": {"to_q.weight": (1, 1)}})


def combination(number: int) -> JobAdapters:
    return JobAdapters(
        np.array([1, number], np.uint32), LAYOUT.zeros(lambda shape, dtype: np.full(shape, number, dtype), (1,))
    )


def empty() -> Any:
    return LAYOUT.zeros(leading=(DEVICES * ENTRIES,))


def fill(bank: Any, entry: Any, stack: Any) -> Any:
    for device, number in enumerate(np.asarray(entry)):
        if number >= 0:
            bank["unet"]["1x1"].down[device * ENTRIES + number] = np.asarray(stack["unet"]["1x1"].down[device])
    return bank


def lies_at(bank: AdapterBank, device: int, entry: int) -> float:
    return float(bank.arrays["unet"]["1x1"].down[device * ENTRIES + entry, 0, 0, 0])


def job(number: int) -> Any:
    return SimpleNamespace(adapters=combination(number) if number else None)


tick = st.tuples(
    st.sampled_from(LANES),
    st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 30)), max_size=DEVICES * PHASES),
    st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 30)), max_size=DEVICES),
)


@given(ticks=st.lists(tick, max_size=30))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_job_finds_its_loras_until_another_job_has_its_slot(devices, ticks):
    bank: Any = AdapterBank(LAYOUT, ENTRIES, make_mesh(devices[:DEVICES]), empty, fill)
    holds: dict[tuple[Any, int, int], tuple[int, int]] = {}
    for lane, inserts, resumes in ticks:
        phases: list[list[Phase]] = [[] for _ in range(DEVICES)]
        jobs, snapshots, resumed = {}, {}, []
        for device, (slot, number) in enumerate(resumes):
            resumed.append(Place(f"resumed {device}", device, slot))
            snapshots[f"resumed {device}"] = job(number)
        for i, (slot, number) in enumerate(inserts):
            phases[i % DEVICES].append(Phase(insert=(slot, f"job {i}")))
            jobs[f"job {i}"] = job(number)
        plan = Plan(lane, tuple(map(tuple, phases)), resumed=tuple(resumed))
        entries = bank.place(plan, jobs, snapshots)
        replaced = {(lane, place.device, place.slot) for place in resumed}
        for (its_lane, device, slot), (entry, number) in holds.items():
            if (its_lane, device, slot) not in replaced:  # also of a job that leaves its slot within this tick
                assert lies_at(bank, device, entry) == number
        for place, entry in entries.items():
            number = (snapshots | jobs)[place.task_id].adapters
            number = 0 if number is None else int(number.digest[1])
            assert lies_at(bank, place.device, entry) == number
            assert (entry == 0) == (number == 0)
            holds[lane, place.device, place.slot] = entry, number
