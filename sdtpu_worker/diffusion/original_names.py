"""Names of tensors in the layout of Stable Diffusion's original code, which single files and many LoRAs have.

The original UNet numbers its blocks in one row; today's names say which block and which layer of it. So a name follows
from the number of layers per block. All other parts are renamed word by word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}  # fmt: skip
_VAE_WORDS = {
    "mid.block_1": "mid_block.resnets.0", "mid.attn_1": "mid_block.attentions.0", "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


class _Blocks(NamedTuple):
    """How many residual blocks each block has on the way down and up, and which of the latter have attention."""

    down: list[int]
    up: list[int]
    attending: set[int]


def unet_names(shapes: Iterable[str]) -> dict[str, str]:
    """Return by original name today's name of every tensor of a UNet.

    Args:
        shapes: today's names.
    """
    names = list(shapes)
    blocks = _Blocks(
        _resnets_per_block(names, "down_blocks"),
        _resnets_per_block(names, "up_blocks"),
        {int(match[1]) for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))},
    )
    return {_original_unet_name(name, blocks): name for name in names}


def _resnets_per_block(names: Iterable[str], blocks: str) -> list[int]:
    found: dict[int, int] = {}
    for name in names:
        if match := re.match(rf"{blocks}\.(\d+)\.resnets\.(\d+)\.", name):
            found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
    return [found[i] for i in sorted(found)]


def _original_unet_name(name: str, blocks: _Blocks) -> str:
    for original, today in _UNET_ENDS.items():
        if name.startswith(f"{today}."):
            return original + _inner(name.removeprefix(today))
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..*)", name)
    if match is None:
        return name
    direction, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if direction == "down":
        start = 1 + sum(count + 1 for count in blocks.down[:block])
        if kind == "downsamplers":
            return f"input_blocks.{start + blocks.down[block]}.0.op{rest.removeprefix('.conv')}"
        return f"input_blocks.{start + layer}.{int(kind == 'attentions')}{_inner(rest)}"
    start = sum(blocks.up[:block])
    if kind == "upsamplers":
        return f"output_blocks.{start + blocks.up[block] - 1}.{1 + (block in blocks.attending)}{rest}"
    return f"output_blocks.{start + layer}.{int(kind == 'attentions')}{_inner(rest)}"


def _inner(rest: str) -> str:
    for original, today in _RESNET.items():
        if rest.startswith(f".{today}."):
            return f".{original}{rest.removeprefix('.' + today)}"
    return rest


def autoencoder_name(name: str, num_blocks: int) -> str:
    """Return the original name of a tensor of an autoencoder.

    Args:
        name: today's name.
        num_blocks: on the way down, and so on the way up.
    """
    for original, today in _VAE_WORDS.items():
        name = name.replace(today, original) if original != "norm_out" else name.replace("conv_norm_out", "norm_out")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", r"down.\1.downsample.conv", name)

    def upwards(match: re.Match[str]) -> str:
        return f"up.{num_blocks - 1 - int(match[1])}.{'block.' + match[3] if match[2] == 'resnets' else 'upsample'}"

    name = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", upwards, name)
    if "attn_1." in name:
        head, _, tail = name.partition("attn_1.")
        for original, today in _VAE_ATTENTION.items():
            if tail.startswith(f"{today}."):
                return f"{head}attn_1.{original}{tail.removeprefix(today)}"
    return name


def open_clip_name(name: str) -> str | None:
    """Return today's name of a tensor of an OpenCLIP text encoder; None for one of several in one, or of none.

    The projections of query, key and value are one tensor there: `attn.in_proj_weight` and `attn.in_proj_bias`.
    """
    if name in _OPEN_CLIP_ENDS:
        return _OPEN_CLIP_ENDS[name]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    inner = _OPEN_CLIP_LAYER.get(match[2]) if match else None
    return f"text_model.encoder.layers.{match[1]}.{inner}.{match[3]}" if match and inner else None
