"""Fit stored tensors to a model: whose tensor is whose, in which layout, and what is missing or too many."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from sdtpu_worker.diffusion.loading.recognise import describe_family
from sdtpu_worker.diffusion.loading.tensors import Shape, Shapes, StoredTensor, TensorSource, some
from sdtpu_worker.errors import InvalidCheckpoint
from sdtpu_worker.models.layout import pytorch_shape

# Tensors that are in people's files and that no model of ours has; anything else that is left over is an error.
_IGNORED = (
    (r"(.*\.)?position_ids", "a constant that old releases of transformers stored"),
    (r"model_ema\..*", "a moving average beside the weights themselves"),
)
_IGNORED_BY_TEXT_ENCODERS = (
    (r"(text_model\.)?text_projection\.weight|logit_scale", "of CLIP's training, for the pooled output"),
    (r"visual_projection\.weight|vision_model\..*", "a whole CLIP in the folder of its text encoder"),
)
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")


def fit(source: TensorSource, shapes: Shapes) -> dict[str, StoredTensor]:
    """Return the stored tensor of every parameter, in the order of `shapes` and with PyTorch's shape of it.

    Raises:
        InvalidCheckpoint: the text names what is missing, left over, of another shape or no floating-point number,
            and says what the file looks like.
    """
    found, extra = _assign(source, shapes)
    faults: dict[str, list[str]] = {"missing": [name for name in shapes if name not in found], "unexpected": extra}
    faults["of another shape"] = []
    faults["not floating point"] = []
    for name, tensor in found.items():
        wanted = pytorch_shape(name, shapes[name])
        if tensor.shape != wanted and not _differs_by_ones(tensor.shape, wanted):
            faults["of another shape"].append(f"{name} ({tensor.shape}, the config makes it {wanted})")
        if not is_float(tensor.dtype):
            faults["not floating point"].append(f"{name} ({tensor.dtype})")
    if any(faults.values()):
        text = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
        raise InvalidCheckpoint(
            f"{source.label}: the parameters do not fit the config ({text}); the file looks like"
            f" {describe_family(source.shapes)}; {source.remedy}"
        )
    return {name: _with_shape(found[name], pytorch_shape(name, shapes[name])) for name in shapes}


def _assign(source: TensorSource, shapes: Shapes) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors by the model's names, and the names of those that are left over."""
    found = {name: tensor for name, tensor in source.tensors.items() if name in shapes}
    is_text_encoder = any(name.endswith("token_embedding.weight") for name in shapes)
    ignored = [pattern for pattern, _reason in _IGNORED + (_IGNORED_BY_TEXT_ENCODERS if is_text_encoder else ())]
    extra = []
    for name, tensor in source.tensors.items():
        if name in shapes:
            continue
        ours = next((other for other in _other_names(name) if other in shapes and other not in found), None)
        if ours is not None:
            found[ours] = tensor
        elif not any(re.fullmatch(pattern, name) for pattern in ignored):
            extra.append(name)
    return found, extra


def _other_names(name: str) -> Iterator[str]:
    """Yield what else a tensor is called: old attentions, and prefixes that transformers 5 dropped."""
    yield _OLD_NAME.sub(lambda match: f".{_OLD_ATTENTION[match[1]]}.{match[2]}", name)
    for prefix in ("text_model.", "vision_model."):
        yield prefix + name
        yield name.removeprefix(prefix)


def _differs_by_ones(stored: Shape, wanted: Shape) -> bool:
    """Return whether one is a linear layer and the other the same as a 1×1 convolution."""
    return {len(stored), len(wanted)} == {2, 4} and (*stored, 1, 1)[:4] == (*wanted, 1, 1)[:4]


def _with_shape(tensor: StoredTensor, shape: Shape) -> StoredTensor:
    return tensor if tensor.shape == shape else tensor.changed(shape, lambda array: array.reshape(shape))


def is_float(dtype: np.dtype) -> bool:
    """Return whether a type is of floating-point numbers, those of ml_dtypes included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))
