"""A job's prompts as what a text encoder takes: windows of token ids, with a weight for each token.

A plain prompt is one window, cut where it is too long. A weighted one takes as many windows as it needs, which are
filled as A1111's web UI fills them: a word that does not fit begins the next window, together with what stands after
the last comma if that is not long ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sdtpu_worker.contract.prompt_syntax import Piece, read_weighted
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidRequest

_AFTER_COMMA = 20
"""How many tokens at most move to the next window with a word that does not fit, back to the last comma."""


class Prompt(NamedTuple):
    """The text of one row of a job's batch.

    Attributes:
        name: of the parameter that it comes from.
        text: of the prompt.
    """

    name: str
    text: str


@dataclass(frozen=True)
class PromptInputs:
    """What a text encoder takes of a job; W the most windows, L the tokens of one.

    Attributes:
        ids: `(rows, W, L) int32`; windows that a row does not have are empty prompts.
        weights: `(rows, W, L) float32`.
        counts: `(rows,) int32`, how many windows a row has.
        truncated: a plain prompt was cut.
    """

    ids: np.ndarray
    weights: np.ndarray
    counts: np.ndarray
    truncated: bool


@dataclass
class _Window:
    """Tokens of a window, without start and end."""

    ids: list[int]
    weights: list[float]


def read_prompts(tokenizer: PromptTokenizer, prompts: Sequence[Prompt], syntax: str, most: int) -> PromptInputs:
    """Return what a text encoder takes of a job's rows.

    Args:
        tokenizer: of the text encoder.
        prompts: of the rows.
        syntax: `plain` or `weighted`.
        most: how many windows a prompt may have.

    Raises:
        InvalidRequest: a prompt needs more windows, or is not written as the syntax allows.
    """
    rows = len(prompts)
    if syntax == "plain":
        ids, truncated = tokenizer.encode([prompt.text for prompt in prompts])
        empty, _ = tokenizer.encode([""] * rows)
        windows = np.stack([ids, *[empty] * (most - 1)], axis=1)
        return PromptInputs(windows, np.ones(windows.shape, np.float32), np.ones(rows, np.int32), truncated)
    ids = np.full((rows, most, tokenizer.length), tokenizer.pad_id, np.int32)
    ids[..., 0], ids[..., 1] = tokenizer.bos_id, tokenizer.eos_id
    weights, counts = np.ones(ids.shape, np.float32), np.ones(rows, np.int32)
    for row, prompt in enumerate(prompts):
        found = _fill_windows(tokenizer, read_weighted(*prompt), most)
        if len(found) > most:
            raise InvalidRequest(
                f"{prompt.name} must have at most {most} windows of {tokenizer.length - 2} tokens"
                f" (sdtpu_prompt_windows), got {len(prompt.text):,} characters that need more; shorten it"
            )
        counts[row] = len(found)
        for number, window in enumerate(found):
            end = 1 + len(window.ids)
            ids[row, number, 1 : end + 1] = [*window.ids, tokenizer.eos_id]
            weights[row, number, 1:end] = window.weights
    return PromptInputs(ids, weights, counts, truncated=False)


def _fill_windows(tokenizer: PromptTokenizer, pieces: Sequence[Piece], most: int) -> list[_Window]:
    """Return the windows of a weighted prompt, at least one; more than the most where it needs more, but not all.

    What follows after that is not read: so much text would take a second.
    """
    room = tokenizer.length - 2
    windows, window, comma = list[_Window](), _Window([], []), -1
    for piece in pieces:
        if len(windows) > most:
            return windows
        if piece.breaks:
            windows.append(window)
            window, comma = _Window([], []), -1
            continue
        ids, at = tokenizer.ids(piece.text, room * (most + 1) + 1), 0
        while at < len(ids):
            count = min(tokenizer.vectors.get(ids[at], 1), room)  # one, or all the vectors of an embedding
            if ids[at] == tokenizer.comma_id:
                comma = len(window.ids)
            elif len(window.ids) == room and comma >= 0 and room - comma <= _AFTER_COMMA:
                moved = _Window(window.ids[comma + 1 :], window.weights[comma + 1 :])
                windows.append(_Window(window.ids[: comma + 1], window.weights[: comma + 1]))
                window, comma = moved, -1
            if len(window.ids) + count > room:
                windows.append(window)
                window, comma = _Window([], []), -1
            window.ids += ids[at : at + count]
            window.weights += [piece.weight] * count
            at += count
    if window.ids or not windows:
        windows.append(window)
    return windows
