"""One job's whole state off the devices, to resume on any device of any worker with the same configuration."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jaxlib
import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") known
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.adapters import JobAdapters, digest_of
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.families.family import WINDOWS
from sdtpu_worker.diffusion.memory import bytes_per_device
from sdtpu_worker.diffusion.preparation import PreparedJob
from sdtpu_worker.diffusion.slots import Geometry, Slots
from sdtpu_worker.errors import SnapshotMismatch
from sdtpu_worker.models.image_kernel_table import CONVOLUTION_TABLE, PROJECTION_TABLE, SUMS_TABLE
from sdtpu_worker.models.kernel_table import DENSE_TABLE, KEYS_TABLE, TABLE

_SAMPLE_BYTES = 4096
_HEAD_BYTES = 64
_HEAD = re.compile(rb"([0-9a-f]{1,40}) ([0-9]{1,6}) ([0-9]{1,6})")


@dataclass(frozen=True)
class JobSnapshot:
    """A job in the middle of its denoising.

    Attributes:
        fingerprint: of the configuration that it was made in; see `fingerprint_of`.
        lane: its resolution.
        arrays: `Slots` of `(1, …)` arrays, on their way from the device or on the host.
        adapters: the job's LoRAs, which its bytes only name by their digest; None for a job without.
    """

    fingerprint: str
    lane: Lane
    arrays: Slots
    adapters: JobAdapters | None = None

    @functools.cached_property
    def state(self) -> Slots:
        """The state as host arrays; waits for the copy from the device."""
        return jax.tree.map(np.asarray, self.arrays)

    @property
    def step(self) -> int:
        """How many steps the job has taken."""
        return int(self.state.step[0])

    @property
    def finite(self) -> bool:
        """Whether the latents and their history have no NaN and no infinity; waits for the copy from the device."""
        return bool(np.isfinite(self.state.latents).all() and np.isfinite(self.state.history).all())

    def check(self, fingerprint: str) -> None:
        """Make sure that the snapshot was made by a configuration.

        Raises:
            SnapshotMismatch: another configuration made it; the job has to start anew.
        """
        if self.fingerprint != fingerprint:
            raise SnapshotMismatch(
                f"the snapshot was made by another configuration (its fingerprint is {self.fingerprint}, this engine's"
                f" {fingerprint}): start the job anew"
            )

    def check_job(self, job: PreparedJob) -> None:
        """Make sure that the snapshot is of this job: its coefficients, guidance, key, LoRAs, windows and steps are.

        Bytes that somebody forged can then choose only latents, their history and encoded prompts.

        Raises:
            SnapshotMismatch: the snapshot is of another job, or of a step that the job does not have.
        """
        state, num_steps = self.state, job.num_steps
        is_of_job = (
            self.lane == job.lane
            and state.num_steps[0] == num_steps
            and state.guidance_scale[0] == np.float32(job.guidance_scale)
            and state.guidance_rescale[0] == np.float32(job.guidance_rescale)
            and state.image_guidance_scale[0] == np.float32(job.image_guidance_scale)
            and np.array_equal(state.key_data[0], job.key_data)
            and np.array_equal(state.table[0], job.table)
            and self._has_mask_of(job)
            and self._has_controls_of(job)
            and self._has_adapters_of(job)
            and self._has_windows_of(job)
        )
        if not is_of_job:
            raise SnapshotMismatch("the snapshot is of a job with other parameters: start the job anew")
        if not 0 <= self.step <= num_steps:
            raise SnapshotMismatch(f"the snapshot is at step {self.step} of {num_steps}: start the job anew")

    def _has_mask_of(self, job: PreparedJob) -> bool:
        """Return whether a slot that keeps a part of an image keeps the part that the job's mask leaves alone."""
        picture = self.state.picture
        if picture is None or not picture.kept.any():
            return True
        if job.mask is None:
            return False
        factor = job.mask.shape[0] // picture.kept.shape[1]
        return np.array_equal(picture.kept[0], ~job.mask[::factor, ::factor])

    def _has_controls_of(self, job: PreparedJob) -> bool:
        """Return whether a slot asks the ControlNets that the job asks, as strongly and in the same rows."""
        controls = self.state.controls
        if controls is None:
            return not job.controls
        found = {
            number: (scale, first, end)
            for number, (scale, first, end) in enumerate(
                zip(*(leaf[0].tolist() for leaf in (controls.scale, controls.first, controls.end)), strict=True)
            )
            if scale
        }
        return found == {each.number: (float(np.float32(each.scale)), each.first, each.end) for each in job.controls}

    def _has_adapters_of(self, job: PreparedJob) -> bool:
        """Return whether a slot uses the job's LoRAs; where they lay in its device's bank does not matter."""
        adapters = self.state.adapters
        if adapters is None:
            return job.adapters is None
        return np.array_equal(adapters.digest[0], digest_of(job.adapters))

    def _has_windows_of(self, job: PreparedJob) -> bool:
        """Return whether the prompts that a slot keeps have as many windows as the job's."""
        kept = self.state.conditioning.get(WINDOWS)
        return kept is None or np.array_equal(kept[0], job.inputs[WINDOWS])

    def to_bytes(self) -> bytes:
        """Return the snapshot compressed: a line with fingerprint and lane, then the leaves of `Slots` in order."""
        head = f"{self.fingerprint} {self.lane[0]} {self.lane[1]}\n".encode()
        body = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(self.state))
        return zlib.compress(head + body, level=1)

    @classmethod
    def from_bytes(cls, data: bytes, layouts: Mapping[Lane, Slots]) -> JobSnapshot:
        """Read what `to_bytes` wrote, from bytes that may come from anybody.

        Args:
            data: the bytes; they are inflated to no more than the size of the largest layout.
            layouts: the shapes and dtypes of a state, by lane; see `layout_of`.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot of one of these lanes.
        """
        sizes = {lane: [bytes_per_device(leaf) for leaf in jax.tree.leaves(layout)] for lane, layout in layouts.items()}
        most = _HEAD_BYTES + max(map(sum, sizes.values()), default=0)
        inflate = zlib.decompressobj()
        try:
            head, _, body = inflate.decompress(data, most).partition(b"\n")
        except zlib.error as exc:
            raise SnapshotMismatch(f"these {len(data):,} bytes are not a snapshot: {exc}: start the job anew") from exc
        facts = _HEAD.fullmatch(head)
        lane = (int(facts[2]), int(facts[3])) if facts else None
        is_whole = inflate.eof and not inflate.unused_data
        if facts is None or lane not in sizes or not is_whole or sum(sizes[lane]) != len(body):
            raise SnapshotMismatch(
                f"these {len(data):,} bytes are not a snapshot of any resolution served here: start the job anew"
            )
        leaves, start = [], 0
        shapes, structure = jax.tree.flatten(layouts[lane])
        for leaf, size in zip(shapes, sizes[lane], strict=True):
            leaves.append(np.frombuffer(body, leaf.dtype, math.prod(leaf.shape), start).reshape(leaf.shape))
            start += size
        return cls(facts[1].decode(), lane, jax.tree.unflatten(structure, leaves))


def layout_of(geometry: Geometry) -> Slots:
    """Return the `(1, …)` shapes and dtypes of one job's state."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), geometry.empty_states())


def fingerprint_of(checkpoint: Checkpoint, lane: Lane, geometry: Geometry, device_kind: str) -> str:
    """Return a digest of what two engines must share to draw the same pixels: model, dtype, sizes, devices, versions.

    XLA compiles the same program for simulated devices otherwise when the process has more of them, so their number
    counts too. Of every parameter the digest covers both ends, not each byte: gigabytes would take seconds.
    """
    digest = hashlib.blake2b(digest_size=16)
    facts: list[Any] = [jax.__version__, jaxlib.__version__, device_kind, jax.local_device_count()]
    facts += [str(checkpoint.dtype), lane, geometry.slots_per_device, geometry.decode_tile]
    facts += [geometry.adapters and (geometry.adapters.rank, geometry.adapter_entries)]
    facts += [geometry.attention, TABLE, DENSE_TABLE, KEYS_TABLE, CONVOLUTION_TABLE, SUMS_TABLE, PROJECTION_TABLE]
    facts += [_json(checkpoint.schedule.config), _json(checkpoint.family.facts()), checkpoint.loras]
    facts += [checkpoint.embeddings]
    digest.update(repr(facts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.params):
        array = np.asarray(leaf).reshape(-1)
        ends = array[: _SAMPLE_BYTES // array.itemsize], array[-(_SAMPLE_BYTES // array.itemsize) :]
        digest.update(jax.tree_util.keystr(path).encode() + repr(leaf.shape).encode())
        for end in ends:
            digest.update(end.tobytes())
    return digest.hexdigest()


def _json(config: Mapping[str, Any]) -> str:
    """Return the plain values of a config, and of the configs in it; the rest (paths, classes) differs by process."""
    plain = (str, int, float, bool, list, tuple, Mapping, type(None))

    def only_plain(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = ((str(name), each) for name, each in value.items() if isinstance(each, plain))
        return {name: only_plain(each) for name, each in named if not name.startswith("_")}

    return json.dumps(only_plain(config), sort_keys=True, default=str)
