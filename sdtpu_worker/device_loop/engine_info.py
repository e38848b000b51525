"""The facts of an engine, which it says of itself once it is made."""

from __future__ import annotations

from dataclasses import dataclass

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.contract.request import DEFAULT_STEPS
from sdtpu_worker.contract.served import Served


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is: facts that are fixed when it has compiled its programs.

    Attributes:
        model: the checkpoint's name, as results report it.
        default_sampler: the sampler of a request that names none.
        dtype: of the parameters and the computation, such as `bfloat16`.
        platform: `tpu`, `gpu` or `cpu`.
        device_kind: the accelerator's name.
        num_devices: devices of this host.
        slots_per_device: rows of one device's batch.
        phases_per_tick: the most phases that a device runs in one tick.
        resolutions: the lanes that have programs.
        load_s, trace_s, compile_s: seconds that loading kept programs took, and tracing and compiling the others.
        kept_programs: programs that an earlier start kept, which were only loaded.
        cache_hits, cache_misses: of the others, those that came from the persistent compilation cache, and the rest.
        default_steps: denoising steps of a request that names none.
        loras: `(name, weight)` of those that are merged into the model; jobs may name more.
        serves: what jobs may ask for; None for an engine that does not say.
    """

    model: str
    default_sampler: str
    dtype: str
    platform: str
    device_kind: str
    num_devices: int
    slots_per_device: int
    phases_per_tick: int
    resolutions: tuple[Lane, ...]
    load_s: float = 0.0
    trace_s: float = 0.0
    compile_s: float = 0.0
    kept_programs: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    default_steps: int = DEFAULT_STEPS
    loras: tuple[tuple[str, float], ...] = ()
    serves: Served | None = None

    @property
    def num_slots(self) -> int:
        """Slots of one resolution over all devices."""
        return self.num_devices * self.slots_per_device
