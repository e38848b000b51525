"""Prompts with weights, as users of A1111's web UI write them: `(word)`, `(word:1.3)`, `[word]`, `BREAK`.

| written | means |
|---|---|
| `(words)` | weight times 1.1 |
| `(words:1.3)` | weight times 1.3 |
| `[words]` | weight divided by 1.1 |
| `\\(`, `\\)`, `\\[`, `\\]`, `\\\\` | the character itself |
| `BREAK` | the rest begins a new window |

Brackets nest; one that is not closed counts to the end, and one that was not opened is text, as is what follows a colon
but is not made of digits (`(a:nan)`). What the web UI does with other signs is not served, and to take them for text
would draw something else: prompt editing (`[from:to:0.5]`), alternation (`[a|b]`), `<lora:name:0.8>` and `AND` are
refused. `BREAK` within brackets begins a new window too; the web UI takes it for text there.

Pure and linear in the length of the text, but for numbered brackets that lie in each other: these take the product of
both counts, at worst some hundredths of a second for the longest prompt.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import groupby

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.redaction import brief

PROMPT_SYNTAXES = ("plain", "weighted")
MAX_WEIGHT = 100.0
"""Weights go from minus this to this."""
_BRACKET = 1.1
_SIGN = re.compile(
    r"\\[\\()\[\]]?|[()\[]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|:\s*[+-]?[.\d]+\s*(?P<edit>\])|\]|\||[^\\()\[\]:|]+|:",
    re.ASCII,
)
_BREAK = re.compile(r"\bBREAK\b")
_LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_AND = re.compile(r"\bAND\b")


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        text: as it is to be read; "" where a new window begins.
        weight: of its tokens.
        breaks: a new window begins here, and nothing else is meant.
    """

    text: str
    weight: float = 1.0
    breaks: bool = False


@dataclass
class _Bracket:
    """A bracket, with the texts inside.

    Attributes:
        first, last: the numbers of the first text inside, and of the first behind it.
        power: how often it multiplies by 1.1; -1 divides.
        factor: that it multiplies by besides.
    """

    first: int
    last: int
    power: int = 0
    factor: float = 1.0


def read_weighted(name: str, prompt: str) -> list[Piece]:
    """Return the parts of a weighted prompt, without empty ones; neighbours differ in their weights.

    Args:
        name: of the parameter.
        prompt: its text.

    Raises:
        InvalidRequest: a weight is beyond the limits, or the text asks for what is not served.
    """
    for pattern, what in (
        (_LORA, "LoRAs are named in the parameter loras, not in the prompt"),
        (_AND, "prompts cannot be joined with AND; write `and` for the word"),
    ):
        if found := pattern.search(prompt):
            raise _not_served(name, found[0], what)
    texts, brackets = _read_brackets(name, prompt)
    weights = _weigh(len(texts), brackets)
    parts = ((weight, text) for text, weight in zip(texts, weights, strict=True) if text != "")
    pieces: list[Piece] = []
    for (breaks, weight), run in groupby(parts, key=lambda part: (part[1] is None, part[0])):
        if breaks:
            pieces += [Piece("", breaks=True) for _ in run]
        else:
            pieces.append(Piece("".join(text or "" for _, text in run), weight))
    for piece in pieces:
        if not -MAX_WEIGHT <= piece.weight <= MAX_WEIGHT:  # also of NaN
            raise InvalidRequest(
                f"{name} must have weights from -{MAX_WEIGHT:.0f} to {MAX_WEIGHT:.0f}, got {piece.weight:g} for"
                f" {brief(piece.text.strip())}; write a smaller number or fewer brackets"
            )
    return pieces


def _read_brackets(name: str, prompt: str) -> tuple[list[str | None], list[_Bracket]]:
    """Return a prompt's texts in order, None for `BREAK`, and its brackets."""
    texts: list[str | None] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    brackets: list[_Bracket] = []
    for match in _SIGN.finditer(prompt):
        sign = match[0]
        if sign in opened:
            opened[sign].append(len(texts))
        elif match["weight"] and opened["("]:
            brackets.append(_Bracket(opened["("].pop(), len(texts), factor=_number(name, match["weight"])))
        elif sign == ")" and opened["("]:
            brackets.append(_Bracket(opened["("].pop(), len(texts), 1))
        elif match["edit"] and opened["["]:
            raise _not_served(name, sign, "prompts cannot change between steps; write \\[ and \\] for the brackets")
        elif sign == "|" and opened["["]:
            raise _not_served(name, sign, "words cannot alternate between steps; write \\[ and \\] for the brackets")
        elif sign == "]" and opened["["]:
            brackets.append(_Bracket(opened["["].pop(), len(texts), -1))
        elif sign[0] == "\\":
            texts.append(sign[1:])
        else:
            before, *after = _BREAK.split(sign)
            texts.append(before.rstrip() if after else before)
            for number, text in enumerate(after, start=1):
                texts += [None, text.strip() if number < len(after) else text.lstrip()]
    for sign, power in (("(", 1), ("[", -1)):
        brackets += [_Bracket(first, len(texts), power) for first in opened[sign]]
    return texts, brackets


def _number(name: str, text: str) -> float:
    """Return a weight of digits and points.

    Raises:
        InvalidRequest: it is no number, such as `1.2.3`.
    """
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"{name} must have numbers as weights, like (word:1.3), got {brief(text)}") from None


def _weigh(count: int, brackets: list[_Bracket]) -> list[float]:
    """Return the weight of each of so many texts: the product of what the brackets around it say."""
    starts: list[list[_Bracket]] = [[] for _ in range(count + 1)]
    for bracket in brackets:
        if bracket.first < bracket.last:
            starts[bracket.first].append(bracket)
    ends = [0] * (count + 1)
    power, factors, weights = 0, list[_Bracket](), []
    for number in range(count):
        power -= ends[number]
        factors = [each for each in factors if each.last > number]
        for bracket in starts[number]:
            power += bracket.power
            ends[bracket.last] += bracket.power
            if bracket.factor != 1:
                factors.append(bracket)
        weights.append(math.prod((each.factor for each in factors), start=_power(power)))
    return weights


def _power(exponent: int) -> float:
    return math.inf if exponent > 1000 else _BRACKET**exponent


def _not_served(name: str, sign: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be without {brief(sign)}: {what}")
