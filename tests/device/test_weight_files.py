"""Files of weights that are broken, hostile or of another kind: one clear error each, and nothing is run."""

from __future__ import annotations

import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdtpu_worker.diffusion.loading.load import read_weights
from sdtpu_worker.diffusion.loading.part_files import open_part, open_weights
from sdtpu_worker.errors import InvalidCheckpoint

STEM = "diffusion_pytorch_model"


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "short": b"\0\0\0",
    "a header longer than the file": raw({}, length=100),
    "a header of exabytes": raw({}, length=2**63),
    "not JSON": raw(b"{"),
    "not text": raw(b"\xff\xfe"),
    "nested without end": raw(b"[" * 200_000),
    "a list": raw([]),
    "a number that is too long": raw(b'{"a": ' + b"9" * 10_000 + b"}"),
    "a name twice": raw(b'{"a": {}, "a": {}}'),
    "metadata that is a list": raw({"__metadata__": []}),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "more than the three keys": raw({"a": {**entry(), "more": 1}}, bytes(4)),
    "data beyond the end": raw({"a": entry()}, bytes(3)),
    "a huge shape": raw({"a": entry([2**40, 2**40])}, bytes(4)),
    "a huge shape that claims as much": raw({"a": entry([2**40], [0, 2**42])}, bytes(4)),
    "a negative shape": raw({"a": entry([-1], [4, 0])}, bytes(4)),
    "negative offsets": raw({"a": entry([1], [-4, 0])}, bytes(4)),
    "truths for numbers": raw({"a": entry([True])}, bytes(4)),
    "fractions for numbers": raw({"a": entry([1.0])}, bytes(4)),
    "too many axes": raw({"a": entry([1] * 33)}, bytes(4)),
    "an unknown type": raw({"a": entry(dtype="F4")}, bytes(4)),
    "a type that is a list": raw({"a": entry(dtype=["F32"])}, bytes(4)),
    "overlapping data": raw({"a": entry(), "b": entry()}, bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"a\.safetensors is not a complete weights file"):
        open_weights(tmp_path / "a.safetensors")


def test_data_that_is_not_aligned_is_read(tmp_path):
    value = np.array([1.5, -2.0], np.float32)
    (tmp_path / "a.safetensors").write_bytes(
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}} ', b"x" + value.tobytes())
    )
    read = read_weights(open_weights(tmp_path / "a.safetensors"), {"a": (2,)}, np.float32)
    np.testing.assert_array_equal(read["a"], value)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    source = open_weights(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidCheckpoint, match="is not a complete weights file"):
        read_weights(source, {"a": (100,)}, np.float32)


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt", "pth"])
def test_pickles_are_refused_with_the_remedy(tmp_path, suffix):
    (tmp_path / "unet").mkdir()
    path = tmp_path / "unet" / f"{STEM}.{suffix}"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(InvalidCheckpoint, match=rf"unet has no weights .*\(found {path.name}\).*safe_serialization"):
        open_part(tmp_path, "unet")
    with pytest.raises(InvalidCheckpoint, match=r"is not .safetensors; .* are pickles"):
        open_weights(path)


def test_other_files_under_a_good_name_say_what_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps({}, 4))
    with pytest.raises(InvalidCheckpoint, match="is a pickle, whatever its name says"):
        open_weights(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InvalidCheckpoint, match="is a pointer of Git LFS"):
        open_weights(path)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_cannot_name_other_files(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(InvalidCheckpoint, match=r"may only name \.safetensors files beside it"):
        open_weights(index)
