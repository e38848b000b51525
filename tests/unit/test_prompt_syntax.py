"""Weighted prompts as A1111's web UI reads them, and whatever else somebody may write."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtpu_worker.contract.prompt_syntax import MAX_WEIGHT, Piece, read_weighted
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.errors import InvalidRequest

BREAK = Piece("", breaks=True)
UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("", []),
        ("()", []),
        ("a (red) fox", [("a ", 1), ("red", UP), (" fox", 1)]),
        ("a ((red)) fox", [("a ", 1), ("red", UP**2), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", DOWN), (" fox", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("(red : 1.3 )", [("red ", 1.3)]),
        ("(red:.5)(fox:2.)", [("red", 0.5), ("fox", 2)]),
        ("(red:-1.5)(fox:+2)", [("red", -1.5), ("fox", 2)]),
        ("(a (b:2) [c]:1.5)", [("a ", 1.5), ("b", 3), (" ", 1.5), ("c", 1.5 * DOWN)]),
        ("((a:2)b)", [("a", 2 * UP), ("b", UP)]),
        ("(a:0)", [("a", 0)]),
        ("[(a)]", [("a", 1)]),
        ("([a)]", [("a", 1)]),
        (r"\(a\) \[b\] \\c", [(r"(a) [b] \c", 1)]),
        (r"(a\:1.3)", [("a", 1.3)]),
        (r"a\b", [("ab", 1)]),
        ("a\\", [("a", 1)]),
        ("(a", [("a", UP)]),
        ("a [b (c", [("a ", 1), ("b ", DOWN), ("c", 1)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("(a:1.3", [("a:1.3", UP)]),
        ("a: b", [("a: b", 1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:1e400)", [("a:1e400", UP)]),
        ("(a:nan)", [("a:nan", UP)]),
        ("(a:inf)", [("a:inf", UP)]),
        ("(a:\u0661)", [("a:\u0661", UP)]),
        ("[a:b]", [("a:b", DOWN)]),
        ("a | b", [("a | b", 1)]),
        ("a:0.5] b", [("a:0.5] b", 1)]),
        ("a BREAK b", [("a", 1), BREAK, ("b", 1)]),
        ("BREAK", [BREAK]),
        ("BREAK BREAK", [BREAK, BREAK]),
        ("aBREAK BREAKb break", [("aBREAK BREAKb break", 1)]),
        ("(a BREAK b:1.2)", [("a", 1.2), BREAK, ("b", 1.2)]),
    ],
)
def test_a_prompt_is_read_as_the_web_ui_reads_it(prompt, wanted):
    pieces = read_weighted("prompt", prompt)
    expected = [part if isinstance(part, Piece) else Piece(*part) for part in wanted]
    assert [(piece.text, piece.breaks) for piece in pieces] == [(piece.text, piece.breaks) for piece in expected]
    assert [piece.weight for piece in pieces] == pytest.approx([piece.weight for piece in expected])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("(a:1.2.3)", r"prompt must have numbers as weights, like \(word:1.3\), got '1.2.3'"),
        ("(a:.)", "got '.'"),
        ("(a:100.1)", "prompt must have weights from -100 to 100, got 100.1 for 'a'"),
        ("(a:" + "9" * 400 + ")", "got inf for 'a'"),
        ("((a:99):2)", "got 198 for 'a'"),
        ("(" * 60 + "a", "write a smaller number or fewer brackets"),
        ("(((a:" + "9" * 400 + "):0):1)", "got nan for 'a'"),
        ("[a:b:0.5]", r"without ':0.5\]': prompts cannot change between steps"),
        ("[a:10]", "prompts cannot change between steps"),
        ("[a|b]", r"without '\|': words cannot alternate between steps"),
        ("a fox <lora:pixel:0.8>", "without '<lora:pixel:0.8>': LoRAs are named in the parameter loras"),
        ("a fox AND a dog", "joined with AND"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_it_is(prompt, text):
    with pytest.raises(InvalidRequest, match=text):
        read_weighted("prompt", prompt)


@pytest.mark.parametrize(
    "prompt",
    ["(" * 100_000, "[" * 50_000 + "a" + "]" * 50_000, ")" * 20_000, "(" * 10_000 + "a" + ")" * 10_000, "([" * 10_000,
     "\\" * 20_000, ":" * 20_000, "BREAK " * 4000, "(a:" * 7000, "(a" * 1400 + ":1.001)" * 1000, "<" * 20_000,
     "<lora:" * 4000, ":1" * 10_000, ":1 " * 7000, " " * 20_000 + "a", ":" + " " * 20_000, ":" + "1" * 20_000,
     "(a:1" + " " * 20_000, "BREAK" * 4000],
    ids=lambda prompt: prompt[:8],
)  # fmt: skip
def test_no_prompt_takes_long(prompt):
    """The longest that a request may have is half of most of these."""
    started = time.process_time()
    try:
        pieces = read_weighted("prompt", prompt)
    except InvalidRequest:
        pieces = []
    assert all(-MAX_WEIGHT <= piece.weight <= MAX_WEIGHT for piece in pieces)
    assert time.process_time() - started < 5


_SIGNS = st.sampled_from(
    ["(", ")", "[", "]", ":", "\\", "|", "BREAK", " ", "a", "1.3", "-2", ".", "1e400", ":1.3)", "\n"]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.lists(_SIGNS, max_size=40).map("".join), st.text(max_size=40)))
def test_any_text_is_read_or_refused(prompt):
    try:
        pieces = read_weighted("prompt", prompt)
    except InvalidRequest:
        return
    for piece in pieces:
        assert piece.breaks == (not piece.text)
        assert -MAX_WEIGHT <= piece.weight <= MAX_WEIGHT
    assert all(set(piece.text) <= set(prompt) for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_characters="()[]\\:|<"), max_size=40).filter(
        lambda t: "BREAK" not in t and "AND" not in t
    )
)
def test_a_text_without_signs_is_itself(prompt):
    assert read_weighted("prompt", prompt) == ([Piece(prompt)] if prompt else [])


def test_a_request_reads_its_prompts_at_the_client():
    asked: dict[str, Any] = {"prompt": "a (fox:1.2)", "prompt_syntax": "weighted"}
    request = GenerationRequest(**asked)
    assert request.options() == {"prompt_syntax": "weighted"}
    assert GenerationRequest("a (fox:1.2.3) AND").options() == {}
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        with pytest.raises(InvalidRequest, match=f"^{name} must have weights from -100 to 100, got 200"):
            GenerationRequest(**{**asked, name: "a (fox:200)"})
    with pytest.raises(InvalidRequest, match="prompt_syntax must be one of plain, weighted, got 'a1111'"):
        GenerationRequest("a fox", prompt_syntax="a1111")
