"""Record what diffusers makes of LoRAs: `tests/device/golden/loras.json.gz`.

Tiny PyTorch pipelines with weights that a name's checksum draws load a LoRA in each layout and fuse it. The golden
file has the shapes, and of every fused weight its product with a drawn array: the test draws the same.

    python -m tools.oracle.loras      # 60 s, see README.md for the environment; needs peft as well
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtpu_worker.diffusion.loading.original_names import original_unet_names

GOLDEN = Path(__file__).parents[2] / "tests" / "device" / "golden" / "loras.json.gz"
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8,
        "attention_head_dim": 2, "layers_per_block": 2}  # fmt: skip
SD = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
XL = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
      "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 56, "transformer_layers_per_block": 2}  # fmt: skip
TEXT = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 8}  # fmt: skip


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array that a name stands for."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def make_pipeline(xl: bool) -> Any:
    """Return a tiny pipeline with drawn weights."""
    unet = UNet(**UNET, **(XL if xl else SD))
    text = CLIPTextModel(CLIPTextConfig(**TEXT))
    parts = {"unet": unet, "vae": AutoencoderKL(block_out_channels=(4,), norm_num_groups=4), "text_encoder": text}
    for part, model in (("unet", unet), ("text_encoder", text)):
        state = model.state_dict()
        model.load_state_dict(
            {name: torch.tensor(draw(f"{part}.{name}", tuple(value.shape))) if value.is_floating_point() else value
             for name, value in state.items()}
        )  # fmt: skip
    parts["scheduler"] = DDIMScheduler()
    if xl:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer=None, tokenizer_2=None)
    return StableDiffusionPipeline(
        **parts, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def pair(module_: torch.nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of a module's down and up."""
    out, inner, *kernel = module_.weight.shape
    return (rank, inner, *kernel), (out, rank, *[1] * len(kernel))


def kohya(unet: Any, xl: bool) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a LoCon file as kohya's tools write it, for the UNet."""
    originals = original_unet_names(list(unet.state_dict()))
    keys: dict[str, tuple[int, ...]] = {}
    for number, (name, layer) in enumerate(weighted(unet)):
        path = originals[f"{name}.weight"].name.removesuffix(".weight") if xl else name
        flat = "lora_unet_" + path.replace(".", "_")
        down, up = pair(layer, 1 + number % 3)
        keys |= {f"{flat}.alpha": (), f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    return keys


def weighted(model: Any) -> list[tuple[str, Any]]:
    """Return the linear and convolution layers by name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]


def peft(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a LoRA of attentions in the UNet and the text encoder, as PEFT names them."""
    keys: dict[str, tuple[int, ...]] = {}
    for part in ("unet", "text_encoder"):
        for name, layer in weighted(getattr(pipeline, part)):
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "fc1")):
                down, up = pair(layer, 2)
                keys |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return keys


def processors(pipeline: Any) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a LoRA as diffusers wrote it with attention processors."""
    keys: dict[str, tuple[int, ...]] = {}
    for name, layer in weighted(pipeline.unet):
        attention, _dot, last = name.removesuffix(".0").rpartition(".")
        if last in ("to_q", "to_k", "to_v", "to_out"):
            down, up = pair(layer, 2)
            start = f"unet.{attention}.processor.{last}_lora"
            keys |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    return keys


def lora_tensors(keys: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the drawn tensors of a LoRA; every alpha is 2, as diffusers 0.42 ignores those of single attentions."""
    return {key: torch.tensor(2.0 if key.endswith(".alpha") else draw(key, shape)) for key, shape in keys.items()}


def fused(pipeline: Any, keys: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the shapes of the models and, by weight, its product with a drawn array after a merge at 0.7."""
    models = {part: getattr(pipeline, part) for part in ("unet", "text_encoder")}
    shapes = {part: {name: list(value.shape) for name, value in model.state_dict().items()
                     if value.is_floating_point()} for part, model in models.items()}  # fmt: skip
    pipeline.load_lora_weights(lora_tensors(keys))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    products = {}
    for part, model in models.items():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                products[f"{part}.{name}"] = float(np.vdot(value.numpy(), draw(f"check {name}", tuple(value.shape))))
    return {"keys": keys, "shapes": shapes, "products": products}


def main() -> None:
    """Write the golden file."""
    golden: dict[str, Any] = {}
    for name, xl in (("kohya", False), ("kohya_xl", True), ("peft", False), ("processors", False)):
        pipeline = make_pipeline(xl)
        makers = {"peft": peft, "processors": processors}
        keys = makers[name](pipeline) if name in makers else kohya(pipeline.unet, xl)
        golden[name] = fused(pipeline, keys)
        print(name, len(keys))
    GOLDEN.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))


if __name__ == "__main__":
    main()
