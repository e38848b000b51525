"""Draw the pictures of `tests/support/adapter_cases.py` with PyTorch's pipelines: goldens of jobs with LoRAs.

Run from the repository with the oracle's virtual environment (README.md beside this file) and peft; it takes 20 seconds
on one core and writes `tests/device/golden/adapters.npz`: `pixels` (cases, 8, 8, 3) uint8.

    python -m tools.oracle.adapters

Each LoRA is loaded by the pipeline's own reader in its layout, and weighted with `set_adapters`.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from tests.support import adapter_cases as pictures
from tools.oracle.golden import write_pictures
from tools.oracle.names import name_in_files
from tools.oracle.pictures import make_parts
from tools.oracle.pipelines import to_uint8


def main() -> None:
    """Draw all pictures and write the file."""
    initial = f"initial {pictures.SEED}"
    write_pictures("adapters.npz", lambda noise: [draw(case, noise[initial]) for case in pictures.cases()])


def draw(case: pictures.Case, initial: np.ndarray) -> np.ndarray:
    """Return the picture of a case, `(8, 8, 3) uint8`."""
    parts = make_parts(case.model)
    vars(parts["text_encoder"]).pop("text_model", None)  # or the reader of LoRAs takes it for one of transformers 4
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        part: {name_in_files(name): tuple(tensor.shape) for name, tensor in parts[part].named_parameters()}
        for part in ("unet", "text_encoder", "text_encoder_2")
        if part in parts
    }
    scheduler = getattr(diffusers, case.scheduler["_class_name"]).from_config(case.scheduler)
    is_xl = case.model == "xl"
    make = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    pipeline: Any = make(**parts, scheduler=scheduler, **({"add_watermarker": False} if is_xl else {}))
    pipeline.set_progress_bar_config(disable=True)
    for layout, _ in case.loras:
        tensors = {key: torch.from_numpy(array) for key, array in pictures.lora_tensors(layout, shapes).items()}
        pipeline.load_lora_weights(tensors, adapter_name=layout)
    pipeline.set_adapters([layout for layout, _ in case.loras], [weight for _, weight in case.loras])
    request = dict(case.request)
    if not request["negative_prompt"]:
        request.pop("negative_prompt")
    latents = torch.from_numpy(initial[None].copy())
    image = np.asarray(pipeline(**request, latents=latents, output_type="np").images[0])
    assert np.isfinite(image).all(), case
    return to_uint8(image)


if __name__ == "__main__":
    main()
