"""What diffusers' and transformers' tensors are called in the original repositories' files (CompVis, Stability AI).

Each rule goes from a model's own name to the original one. The number of layers of a block, which the original
numbering needs because it counts through all blocks, is read off the model's names. So every model of the kind is
covered, and a LoRA under the original names uses the same rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple


class Original(NamedTuple):
    """Where a tensor is in an original file.

    Attributes:
        name: without the prefix of its part.
        third: it is this third of the rows: OpenCLIP keeps queries, keys and values in one tensor.
        transposed: it is stored as (in, out).
    """

    name: str
    third: int | None = None
    transposed: bool = False


_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_BLOCK = re.compile(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MID = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_OPENCLIP_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def original_unet_names(names: Collection[str]) -> dict[str, Original]:
    """Return the original names of a conditional UNet's tensors; names that are none of its tensors are left out."""
    down, up = _count_resnets(names, "down"), _count_resnets(names, "up")
    with_attention = {int(match[2]) for match in map(_UNET_BLOCK.match, names)
                      if match and (match[1], match[3]) == ("up", "attentions")}  # fmt: skip

    def rename(name: str) -> str | None:
        match = _UNET_BLOCK.fullmatch(name)
        if match is None:
            return _replace_start(name, _UNET_ENDS, _UNET_RESNET)
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if side == "down":
            index = 1 + sum(down[:block]) + block  # a downsampler after each block, and `conv_in` first
            place = f"input_blocks.{index + (down[block] if kind == 'downsamplers' else layer)}"
        else:
            index = sum(up[:block])
            place = f"output_blocks.{index + (up[block] - 1 if kind == 'upsamplers' else layer)}"
        if kind == "resnets":
            return f"{place}.0.{_replace_start(rest, _UNET_RESNET) or rest}"
        if kind == "attentions":
            return f"{place}.1.{rest}"
        if kind == "downsamplers":
            return f"{place}.0.op.{rest.removeprefix('conv.')}"
        return f"{place}.{2 if block in with_attention else 1}.{rest}"

    return _collect(names, rename)


def original_vae_names(names: Collection[str]) -> dict[str, Original]:
    """Return the original names of an AutoencoderKL's tensors; names that are none of its tensors are left out."""
    last = max((int(match[2]) for match in map(_VAE_BLOCK.match, names) if match), default=0)

    def rename(name: str) -> str | None:
        if match := _VAE_BLOCK.fullmatch(name):
            block = int(match[2]) if match[1] == "encoder.down" else last - int(match[2])
            kind = {"resnets": f"block.{match[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[match[3]]
            return f"{match[1]}.{block}.{kind}.{match[5].replace('conv_shortcut', 'nin_shortcut')}"
        if match := _VAE_MID.fullmatch(name):
            number = int(match[3]) + 1
            if match[2] == "resnets":
                return f"{match[1]}.mid.block_{number}.{match[4].replace('conv_shortcut', 'nin_shortcut')}"
            return f"{match[1]}.mid.attn_{number}.{_replace_start(match[4], _VAE_ATTENTION)}"
        return name.replace("conv_norm_out", "norm_out")

    return _collect(names, rename)


def original_openclip_names(names: Collection[str]) -> dict[str, Original]:
    """Return the original names of a text encoder's tensors that OpenCLIP trained; other names are left out."""
    found = {}
    for name in names:
        short = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            found[name] = Original("text_projection", transposed=True)
        elif short in _OPENCLIP_ENDS:
            found[name] = Original(_OPENCLIP_ENDS[short])
        elif match := _OPENCLIP_BLOCK.fullmatch(short):
            place = f"transformer.resblocks.{match[1]}"
            if match[2] in _OPENCLIP_LAYER:
                found[name] = Original(f"{place}.{_OPENCLIP_LAYER[match[2]]}.{match[3]}")
            else:
                third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(match[2])
                found[name] = Original(f"{place}.attn.in_proj_{match[3]}", third)
    return found


def original_clip_names(names: Collection[str]) -> dict[str, Original]:
    """Return the original names of CLIP-L's tensors: they are transformers' own."""
    return {name: Original(name if name.startswith("text_") else f"text_model.{name}") for name in names}


def _collect(names: Collection[str], rename: Callable[[str], str | None]) -> dict[str, Original]:
    renamed = {name: rename(name) for name in names}
    return {name: Original(other) for name, other in renamed.items() if other is not None}


def _count_resnets(names: Collection[str], side: str) -> list[int]:
    layers: dict[int, int] = {}
    for match in map(_UNET_BLOCK.match, names):
        if match and (match[1], match[3]) == (side, "resnets"):
            layers[int(match[2])] = max(layers.get(int(match[2]), 0), int(match[4]) + 1)
    return [layers.get(block, 0) for block in range(max(layers, default=-1) + 1)]


def _replace_start(name: str, starts: dict[str, str], rest_starts: dict[str, str] | None = None) -> str | None:
    """Return the name with its first modules renamed, and then those after them, or None."""
    for start, other in starts.items():
        if name.startswith(f"{start}."):
            rest = name[len(start) + 1 :]
            return f"{other}.{_replace_start(rest, rest_starts or {}) or rest}"
    return None
