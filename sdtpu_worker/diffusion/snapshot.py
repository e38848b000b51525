"""One job's whole state off the device: to wait for another slot, on any device of any process like this one."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jaxlib
import ml_dtypes  # noqa: F401  makes np.dtype("bfloat16") known
import numpy as np

from sdtpu_worker.aggregator.plan import Lane
from sdtpu_worker.diffusion.checkpoint import Checkpoint
from sdtpu_worker.diffusion.programs import SlotState
from sdtpu_worker.errors import SnapshotMismatch

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class JobSnapshot:
    """A job in the middle of its denoising.

    Attributes:
        fingerprint: of the configuration that it was made in; see `fingerprint_of`.
        lane: its resolution.
        arrays: a `SlotState` of `(1, …)` arrays, on their way from the device or on the host.
    """

    fingerprint: str
    lane: Lane
    arrays: SlotState

    @functools.cached_property
    def state(self) -> SlotState:
        """The state as host arrays; waits for the copy from the device."""
        return SlotState(*map(np.asarray, self.arrays))

    @property
    def step(self) -> int:
        """How many steps the job has taken."""
        return int(self.state.step[0])

    def check(self, fingerprint: str) -> None:
        """Make sure that it fits a configuration.

        Raises:
            SnapshotMismatch: it was made in another one; the job has to start anew.
        """
        if self.fingerprint != fingerprint:
            raise SnapshotMismatch(
                f"the snapshot was made by another configuration (its fingerprint is {self.fingerprint}, this engine's"
                f" {fingerprint}): start the job anew"
            )

    def to_bytes(self) -> bytes:
        """Return it compressed; rows of the table that are never read are left out."""
        state = self.state._replace(table=self.state.table[:, : int(self.state.num_steps[0])])
        head = {
            "fingerprint": self.fingerprint,
            "lane": self.lane,
            "table_rows": self.state.table.shape[1],
            "arrays": [[leaf.dtype.name, leaf.shape] for leaf in state],
        }
        body = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in state)
        return zlib.compress(json.dumps(head).encode() + b"\n" + body, level=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> JobSnapshot:
        """Rebuild what `to_bytes` gave.

        Raises:
            SnapshotMismatch: the bytes are not a snapshot.
        """
        try:
            head, body = zlib.decompress(data).split(b"\n", 1)
            facts, leaves, start = json.loads(head), [], 0
            for name, shape in facts["arrays"]:
                dtype, count = np.dtype(name), int(np.prod(shape))
                leaves.append(np.frombuffer(body, dtype, count, start).reshape(shape))
                start += count * dtype.itemsize
            state = SlotState(*leaves)
            missing = facts["table_rows"] - state.table.shape[1]
            state = state._replace(table=np.pad(state.table, ((0, 0), (0, missing), (0, 0))))
            return cls(facts["fingerprint"], tuple(facts["lane"]), state)
        except (zlib.error, ValueError, KeyError, TypeError) as exc:
            raise SnapshotMismatch(f"these {len(data):,} bytes are not a snapshot: start the job anew") from exc


def fingerprint_of(checkpoint: Checkpoint, lane: Lane, slots_per_device: int, device_kind: str) -> str:
    """Return what must be equal for two engines to give the same pixels: model, dtype, sizes, device, versions.

    Of every parameter the ends count, not each byte: gigabytes would take seconds.
    """
    digest = hashlib.blake2b(digest_size=16)
    facts: list[Any] = [jax.__version__, jaxlib.__version__, device_kind, str(checkpoint.dtype), lane, slots_per_device]
    facts += [_plain(checkpoint.schedule.config), _plain(checkpoint.unet.config), _plain(checkpoint.vae.config)]
    digest.update(repr(facts).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(checkpoint.params):
        array = np.asarray(leaf).reshape(-1)
        ends = array[: _SAMPLE_BYTES // array.itemsize], array[-(_SAMPLE_BYTES // array.itemsize) :]
        digest.update(jax.tree_util.keystr(path).encode() + repr(leaf.shape).encode())
        for end in ends:
            digest.update(end.tobytes())
    return digest.hexdigest()


def _plain(config: Mapping[str, Any]) -> str:
    """Return a config's plain values; the rest (paths, classes) differs between processes."""
    plain = (str, int, float, bool, list, tuple, type(None))
    return json.dumps(
        {name: value for name, value in config.items() if isinstance(value, plain) and not name.startswith("_")},
        sort_keys=True,
        default=str,
    )
