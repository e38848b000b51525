"""Names of tensors in files, from the names that today's libraries give them in memory."""

from __future__ import annotations

import re

_TEXT_MODEL = re.compile(r"embeddings\.|final_layer_norm\.|encoder\.layers\.\d+\.(self_attn|mlp|layer_norm)")


def name_in_files(name: str) -> str:
    """Return the name that a tensor has in people's files.

    Since its fifth release transformers leaves one level out of the names of a text encoder and of a vision model.
    """
    if _TEXT_MODEL.match(name):
        return f"text_model.{name}"
    if name.startswith("vision_model.") and not name.startswith("vision_model.vision_model."):
        return f"vision_model.{name}"
    return name
