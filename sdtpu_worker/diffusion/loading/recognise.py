"""Say what a file of weights looks like, from the names and shapes of its tensors: for error texts."""

from __future__ import annotations

import re

from sdtpu_worker.diffusion.loading.tensors import Shapes

# What a name proves, the more telling first.
_SIGNS = (
    (r"lora_(unet|te\d?)_|.*\.lora_(A|B|up|down)\.|.*_lora\.(up|down)\.|.*\.(hada_w1_a|lokr_w1)",
     "a LoRA, which goes into sdtpu_loras_merged"),
    (r"control_model\.|(.*\.)?controlnet_cond_embedding\.|input_hint_block\.", "a ControlNet"),
    (r".*motion_modules\.", "AnimateDiff"),
    (r"(model\.diffusion_model\.)?double_blocks\.|.*single_transformer_blocks\.", "Flux"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r".*transformer_blocks\.\d+\.attn\.add_k_proj\.", "Stable Diffusion 3"),
    (r".*(cap_embedder|adaLN_modulation)\.", "another diffusion transformer"),
    (r"(encoder\.block\.0\.layer|shared)\.", "a T5 text encoder"),
    (r"(down_blocks|clip_txt_mapper).*channelwise|clip_txt_mapper\.", "Stable Cascade"),
)  # fmt: skip
_CONTEXT = {768: "1.x", 1024: "2.x", 2048: "XL", 1280: "XL refiner"}
_CHANNELS = {8: " for image instructions (8 input channels)", 9: " for inpainting (9 input channels)"}
_CLIP = {768: "CLIP-L (Stable Diffusion 1.x, XL's first)", 1024: "OpenCLIP-H (Stable Diffusion 2.x)",
         1280: "OpenCLIP-bigG (XL's second)"}  # fmt: skip


def describe_family(shapes: Shapes) -> str:
    """Return words for what has tensors of these names and stored (PyTorch) shapes, like `Stable Diffusion XL`."""
    for pattern, family in _SIGNS:
        sign = re.compile(pattern)
        if any(sign.match(name) for name in shapes):
            return family
    return _describe_unet(shapes) or _describe_text_encoder(shapes) or _describe_vae(shapes) or "nothing known"


def _describe_unet(shapes: Shapes) -> str | None:
    context = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        return None
    entry = ("conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight")
    first = next((shapes[name] for name in entry if name in shapes), ())
    version = _CONTEXT.get(context[1], f"with a context of {context[1]}") if len(context) == 2 else "of another kind"
    return f"Stable Diffusion {version}{_CHANNELS.get(first[1], '') if len(first) == 4 else ''}"


def _describe_text_encoder(shapes: Shapes) -> str | None:
    names = ("token_embedding.weight",)
    tokens = next((shape for name, shape in shapes.items() if name.endswith(names)), None)
    if tokens is None or len(tokens) != 2:
        return "a vision model" if any(name.endswith("patch_embedding.weight") for name in shapes) else None
    return f"the text encoder {_CLIP.get(tokens[1], f'of width {tokens[1]}')}"


def _describe_vae(shapes: Shapes) -> str | None:
    if any(re.match(r"(first_stage_model\.|vae\.)?decoder\.(mid|up)", name) for name in shapes):
        return "a VAE"
    return None
