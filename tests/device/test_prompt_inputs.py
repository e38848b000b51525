"""How weighted prompts fill windows of tokens, in bounded time whatever they are."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sdtpu_worker.diffusion.prompt_inputs import Prompt, PromptInputs, read_prompts
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidRequest
from tests.support.tiny_configs import SHIPPED


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    """Give the shipped vocabulary, in which `red` and `a` are one token each."""
    return PromptTokenizer.from_folder(SHIPPED / "tokenizer", 77)


def read(tokenizer: PromptTokenizer, text: str, syntax: str = "weighted", most: int = 4) -> PromptInputs:
    return read_prompts(tokenizer, [Prompt("prompt", text)], syntax, most)


def lengths(tokenizer: PromptTokenizer, inputs: PromptInputs) -> list[int]:
    """Return how many tokens each window has between start and end."""
    return [list(ids[1:]).index(tokenizer.eos_id) for ids in inputs.ids[0, : inputs.counts[0]]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", [0]),
        ("()", [0]),
        ("red " * 75, [75]),
        ("red " * 76, [75, 1]),
        ("red " * 150, [75, 75]),
        ("red " * 70 + ", " + "red " * 10, [71, 10]),
        ("red " * 55 + ", " + "red " * 20, [56, 20]),
        ("red " * 54 + ", " + "red " * 21, [75, 1]),
        ("red " * 74 + ", red", [75, 1]),
        ("red " * 75 + ", red", [75, 2]),
        ("red BREAK a red", [1, 2]),
        ("BREAK red", [0, 1]),
        ("red BREAK", [1]),
        ("red BREAK BREAK red", [1, 0, 1]),
    ],
)
def test_windows_are_filled_as_the_web_ui_fills_them(tokenizer, text, wanted):
    inputs = read(tokenizer, text)
    assert lengths(tokenizer, inputs) == wanted
    assert inputs.ids.shape == inputs.weights.shape == (1, 4, 77)
    for ids, weights in zip(inputs.ids[0], inputs.weights[0], strict=True):
        end = list(ids[1:]).index(tokenizer.eos_id) + 1
        assert ids[0] == tokenizer.bos_id
        assert (ids[end + 1 :] == tokenizer.pad_id).all()
        assert (weights == 1).all()


def test_weights_lie_on_their_tokens_in_the_window_to_which_they_move(tokenizer):
    inputs = read(tokenizer, "red " * 70 + ", a (red:1.5) [a] " + "red " * 5)
    assert lengths(tokenizer, inputs) == [71, 8]
    assert (inputs.weights[0, 0] == 1).all()
    np.testing.assert_allclose(inputs.weights[0, 1, :5], [1, 1, 1.5, 1 / 1.1, 1], rtol=1e-6)


def test_a_plain_prompt_is_one_window_whatever_there_is_room_for(tokenizer):
    text = "(red:1.5) BREAK " * 40
    inputs = read(tokenizer, text, "plain")
    ids, truncated = tokenizer.encode([text])
    np.testing.assert_array_equal(inputs.ids[:, 0], ids)
    assert inputs.truncated
    assert truncated
    assert (inputs.counts == 1).all()
    assert (inputs.weights == 1).all()


@pytest.mark.parametrize(
    "text",
    ["(a:1.01)(b:1.02)" * 625, "&amp;amp;amp;" * 760, "é" * 10_000, "a" * 10_000, "\u0301" * 10_000, "漢" * 10_000,
     "ã‚" * 5000, "(a)b" * 2500, "a " * 5000, "<" * 10_000, "\n(a)" * 2500],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_the_longest_prompts_are_refused_in_bounded_time(tokenizer, text):
    started = time.process_time()
    with pytest.raises(
        InvalidRequest,
        match=r"at most 4 windows of 75 tokens \(sdtpu_prompt_windows\), got [0-9,]+ characters that need more",
    ):
        read(tokenizer, text)
    assert time.process_time() - started < 1
