"""The pictures of weighted prompts and of textual inversion, by PyTorch's pipelines and by the engine, as data.

`tools/oracle/prompts.py` draws them with torch and diffusers, `tests/device/test_prompts.py` with the engine. Nothing
here needs torch or JAX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tests.support.picture_cases import MODELS, SEED
from tests.support.pipeline_cases import DdimCase as Case
from tests.support.random_weights import random_tensor

__all__ = ["MODELS", "SEED", "Case"]

WINDOWS = 4
WORDS: Mapping[str, int] = {"<moodring>": 1, "inkstyle": 3}
"""The words with vectors of their own: how many each has."""
WIDTHS: Mapping[str, Mapping[str, int]] = {
    "sd": {"text_encoder": 32},
    "xl": {"text_encoder": 32, "text_encoder_2": 16},
}
_COLOURS = "red, green, blue, yellow, purple, orange, black, white, "
_WEIGHTED = (
    {"prompt": "a (red:1.4) circle"},
    {"prompt": "a ((red)) circle [on] a (blue (background:1.2):0.9)", "negative_prompt": "(black:1.3) [[star]]"},
    {"prompt": r"a \(red\) circle, (star:-0.8)", "clip_skip": 1},
    {"prompt": "a red circle BREAK (a green star:1.2) BREAK blue"},
    {"prompt": "a red circle", "negative_prompt": f"black star, {_COLOURS * 9}"},
    {"prompt": f"a circle, {_COLOURS * 6} on a (white:1.5) background", "negative_prompt": "(black:1.1)"},
    {"prompt": f"{'purple ' * 80} heart", "negative_prompt": "BREAK (black)", "clip_skip": 2},
    {"prompt": f"{_COLOURS * 4} (a yellow star on the left of an orange background and a purple ring, blue:1.3) up"},
    {"prompt": "a red circle", "guidance_scale": 1.0},
)
_WITH_WORDS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle in <moodring>"},
    {"prompt": "inkstyle circle on <moodring> background", "negative_prompt": "a black inkstyle"},
    {"prompt": "a (inkstyle:1.3) circle, <moodring>", "prompt_syntax": "weighted"},
    {"prompt": f"a circle, {'red ' * 69} inkstyle inkstyle (<moodring>:0.7)", "prompt_syntax": "weighted"},
)


def cases() -> list[Case]:
    """Return every case, in the order of the golden file."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    common = {"negative_prompt": "", "num_inference_steps": 6, "guidance_scale": 3.0}
    weighted = ({**request, "prompt_syntax": "weighted"} for request in _WEIGHTED)
    requests = [*weighted, *_WITH_WORDS]
    for model, request in itertools.product(("sd", "xl"), requests):
        yield Case(model, {**common, **request})
    second = {"prompt": "a (red:1.2) circle", "prompt_2": f"a star BREAK {_COLOURS}", "negative_prompt_2": "[black]"}
    yield Case("xl", {**common, **second, "prompt_syntax": "weighted"})


def vectors(word: str, part: str, width: int) -> np.ndarray:
    """Return the vectors of a word for a text encoder, `(n, width) float32`."""
    return random_tensor(f"{word} {part} embedding.weight", (WORDS[word], width))


def embedding_tensors(word: str, model: str) -> dict[str, np.ndarray]:
    """Return the tensors of a word's file."""
    widths = WIDTHS[model]
    if model == "xl":
        names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        return {names[part]: vectors(word, part, width) for part, width in widths.items()}
    rows = vectors(word, "text_encoder", widths["text_encoder"])
    return {word: rows[0]} if len(rows) == 1 else {"emb_params": rows}
