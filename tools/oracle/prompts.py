"""Draw the pictures of `tests/support/weighted_cases.py` with PyTorch: weighted prompts and textual inversion.

Run from the repository with the oracle's virtual environment (README.md beside this file); it takes 20 seconds on one
core and writes `tests/device/golden/prompts.npz`: `pixels` (cases, 8, 8, 3) uint8.

    python -m tools.oracle.prompts

The words of textual inversion are added by the pipelines' own `load_textual_inversion`. Weighted prompts are read here,
apart from the project's code and for well-formed ones alone, as A1111's web UI documents them: windows of 75 tokens are
encoded one by one with transformers' models, and the pipelines get the states of all windows as `prompt_embeds`. Where
the two prompts of a picture have different numbers of windows, the UNet gets a mask beside them.
"""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from tests.support import weighted_cases as pictures
from tests.support.tiny_configs import SHIPPED
from tools.oracle.golden import write_pictures
from tools.oracle.pictures import make_parts
from tools.oracle.pipelines import to_uint8

_ROOM, _BACK = 75, 20
Weighted = list[tuple[str, float] | None]
"""Texts with weights; None where a new window begins."""
Window = list[tuple[int, float]]


def main() -> None:
    """Draw all pictures and write the file."""
    initial = f"initial {pictures.SEED}"
    write_pictures("prompts.npz", lambda noise: [draw(case, noise[initial]) for case in pictures.cases()])


def draw(case: pictures.Case, initial: np.ndarray) -> np.ndarray:
    """Return the picture of a case, `(8, 8, 3) uint8`."""
    is_xl = case.model == "xl"
    parts = make_parts(case.model)
    if is_xl:
        parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")  # for it gets words of its own
    scheduler = getattr(diffusers, case.scheduler["_class_name"]).from_config(case.scheduler)
    make = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    pipeline: Any = make(**parts, scheduler=scheduler, **({"add_watermarker": False} if is_xl else {}))
    pipeline.set_progress_bar_config(disable=True)
    _add_words(pipeline, case.model)
    request = dict(case.request)
    if request.pop("prompt_syntax", "plain") == "weighted":
        request = _with_states(pipeline, request, is_xl)
    elif not request["negative_prompt"]:
        request.pop("negative_prompt")
    latents = torch.from_numpy(initial[None].copy())
    image = np.asarray(pipeline(**request, latents=latents, output_type="np").images[0])
    assert np.isfinite(image).all(), case
    return to_uint8(image)


def _add_words(pipeline: Any, model: str) -> None:
    for word in pictures.WORDS:
        for part, width in pictures.WIDTHS[model].items():
            pipeline.load_textual_inversion(
                {word: torch.from_numpy(pictures.vectors(word, part, width))},
                token=word,
                text_encoder=getattr(pipeline, part),
                tokenizer=getattr(pipeline, part.replace("text_encoder", "tokenizer")),
            )


def _with_states(pipeline: Any, request: dict[str, Any], is_xl: bool) -> dict[str, Any]:
    """Return a request with the states of its prompts in place of the prompts."""
    skip = request.pop("clip_skip", 0)
    firsts = request.pop("prompt"), request.pop("negative_prompt")
    seconds = request.pop("prompt_2", firsts[0]), request.pop("negative_prompt_2", firsts[1])
    made = []
    for number, texts in enumerate(zip(firsts, seconds, strict=True)):
        states, pooled = _encode(pipeline, texts, (skip, 0)[number], is_xl)
        is_nothing = number == 1 and is_xl and not any(texts)
        made.append((states * 0, pooled * 0) if is_nothing else (states, pooled))
    longest = max(states.shape[1] for states, _ in made)
    mask = torch.zeros(2, longest)
    filled = []
    for row, (states, _) in enumerate(made):
        mask[1 - row, : states.shape[1]] = 1  # the negative prompt comes first in the batch
        filled.append(torch.nn.functional.pad(states, (0, 0, 0, longest - states.shape[1])))
    _give_mask(pipeline.unet, mask)
    request |= {"prompt_embeds": filled[0], "negative_prompt_embeds": filled[1]}
    if is_xl:
        request |= {"pooled_prompt_embeds": made[0][1], "negative_pooled_prompt_embeds": made[1][1]}
    return request


def _give_mask(unet: torch.nn.Module, mask: torch.Tensor) -> None:
    forward = unet.forward

    def masked(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        its = mask if len(sample) == 2 else mask[1:]
        return forward(sample, *args, **kwargs, encoder_attention_mask=its)

    unet.forward = masked  # the pipeline does not pass a mask on


def _encode(pipeline: Any, texts: tuple[str, str], skip: int, is_xl: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of all windows, `(1, windows * 77, width)`, and the first window's pooled one."""
    parts = [(pipeline.tokenizer, pipeline.text_encoder, texts[0])]
    if is_xl:
        parts.append((pipeline.tokenizer_2, pipeline.text_encoder_2, texts[1]))
    every = [_windows(_read(pipeline.maybe_convert_prompt(text, tokenizer)), tokenizer) for tokenizer, _, text in parts]
    count = max(map(len, every))
    encoded, pooled = [], torch.zeros(1)
    for (tokenizer, encoder, _), windows in zip(parts, every, strict=True):
        states = []
        for number in range(count):
            window = windows[number] if number < len(windows) else []
            spare = _ROOM - len(window)
            ids = [tokenizer.bos_token_id, *(token for token, _ in window), tokenizer.eos_token_id]
            out = encoder(torch.tensor([ids + [tokenizer.pad_token_id] * spare]), output_hidden_states=True)
            if is_xl:
                state = out.hidden_states[-2 - skip]
                pooled = out[0] if encoder is pipeline.text_encoder_2 and number == 0 else pooled
            else:
                state = encoder.text_model.final_layer_norm(out.hidden_states[-1 - skip])
            weights = torch.tensor([1.0, *(weight for _, weight in window), *[1.0] * (spare + 1)])
            emphasised = state * weights[None, :, None]
            states.append(emphasised * (state.mean() / emphasised.mean()))
        encoded.append(torch.cat(states, dim=1))
    return torch.cat(encoded, dim=-1), pooled


def _read(prompt: str) -> Weighted:
    """Return the texts of a well-formed prompt: brackets are closed in the order in which they were opened."""
    texts: list[tuple[str, float] | None] = []
    opened: list[tuple[str, int]] = []
    rest = prompt
    while rest:
        if match := re.match(r"\\([()\[\]\\])", rest):
            texts.append((match[1], 1.0))
        elif match := re.match(r"[(\[]", rest):
            opened.append((match[0], len(texts)))
        elif opened and (match := re.match(r":(-?[0-9.]+)\)|\)|\]", rest)):
            bracket, first = opened.pop()
            factor = float(match[1]) if match[1] else 1.1 if bracket == "(" else 1 / 1.1
            texts[first:] = [text and (text[0], text[1] * factor) for text in texts[first:]]
        elif match := re.match(r"\s*BREAK\b\s*", rest):
            texts.append(None)
        else:
            match = re.match(r".[^\\()\[\]: ]*", rest)
            assert match is not None
            texts.append((match[0], 1.0))
        rest = rest[match.end() :]
    return _joined(texts)


def _joined(texts: Weighted) -> Weighted:
    found: Weighted = []
    for text in texts:
        if text and found and found[-1] and found[-1][1] == text[1]:
            found[-1] = (found[-1][0] + text[0], text[1])
        else:
            found.append(text)
    return found


def _windows(texts: Weighted, tokenizer: Any) -> list[Window]:
    """Return the tokens of every window with their weights, without start and end."""
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    base = tokenizer.convert_tokens_to_ids(min(pictures.WORDS))
    windows: list[Window] = [[]]
    for text in texts:
        if text is None:
            windows.append([])
            continue
        ids = tokenizer(text[0], add_special_tokens=False, truncation=False).input_ids
        while ids:
            count = 1
            if ids[0] >= base and "_" not in (token := tokenizer.convert_ids_to_tokens(ids[0])):
                count = pictures.WORDS[token]
            taken, ids = [(token_id, text[1]) for token_id in ids[:count]], ids[count:]
            window = windows[-1]
            if len(window) + count > _ROOM:
                commas = [i for i, (token_id, _) in enumerate(window) if token_id == comma]
                moves = count == 1 and taken[0][0] != comma and commas and _ROOM - commas[-1] <= _BACK
                first = commas[-1] + 1 if moves else len(window)
                windows.append(window[first:])
                del window[first:]
            windows[-1] += taken
    return windows if windows[-1] or len(windows) == 1 else windows[:-1]


if __name__ == "__main__":
    main()
