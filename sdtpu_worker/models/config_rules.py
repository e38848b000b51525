"""Rules for a model's config: a key is honoured, held to some values, irrelevant with a reason, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdtpu_worker.errors import InvalidCheckpoint

Kind = Literal["honoured", "only", "irrelevant"]


@dataclass(frozen=True)
class Rule:
    """What is done with one key.

    Attributes:
        kind: `honoured`: the model follows the value; `only`: some values of it; `irrelevant`: it changes nothing.
        text: the values that are allowed; for an irrelevant key the reason.
        accepts: whether a value is allowed.
    """

    kind: Kind
    text: str
    accepts: Callable[[Any], bool]


Rules = Mapping[str, Rule]


def check(raw: Mapping[str, Any], rules: Rules, what: str) -> dict[str, Any]:
    """Check a config and return the part of it that a model follows.

    Args:
        raw: of a JSON file.
        rules: by key.
        what: which config, for the error.

    Raises:
        InvalidCheckpoint: a key is not in the rules, or has a value that its rule does not allow.
    """
    for key, value in raw.items():
        rule = rules.get(key)
        if rule is None:
            raise InvalidCheckpoint(
                f"{what}: {key} = {value!r} is not supported: this worker does not know the key, so it cannot do what"
                f" it asks for; known are {', '.join(sorted(rules))}"
            )
        if not rule.accepts(value):
            raise InvalidCheckpoint(f"{what}: {key} must be {rule.text}, got {value!r}")
    return {key: value for key, value in raw.items() if rules[key].kind != "irrelevant"}


def irrelevant(reason: str) -> Rule:
    """Return the rule of a key whose value changes nothing here."""
    return Rule("irrelevant", reason, lambda value: True)


def only(*values: Any) -> Rule:
    """Return the rule of a key that is followed for some values alone."""
    return Rule("only", _listed(values), lambda value: _is_in(value, values))


def one_of(*values: Any) -> Rule:
    """Return the rule of a key that is followed, and has no other values."""
    return Rule("honoured", _listed(values), lambda value: _is_in(value, values))


def flag() -> Rule:
    """Return the rule of a switch."""
    return Rule("honoured", "true or false", lambda value: isinstance(value, bool))


def number(text: str = "a number", above: float | None = None, null: bool = False) -> Rule:
    """Return the rule of a finite number, at least `above` if that is given, or null if allowed."""

    def accepts(value: Any) -> bool:
        if value is None:
            return null
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < float("inf") and (above is None or value > above)

    return Rule("honoured", text, accepts)


def count(least: int = 1, null: bool = False) -> Rule:
    """Return the rule of a whole number, or null if allowed."""
    return Rule("honoured", _or_null(f"a whole number from {least}", null), lambda v: _is_count(v, least, null))


def counts(depth: int = 0, least: int = 1, null: bool = False) -> Rule:
    """Return the rule of whole numbers: one for all blocks, or a list; `depth` says how many levels of lists."""

    def accepts(value: Any, levels: int) -> bool:
        if isinstance(value, list | tuple):
            return levels > 0 and len(value) > 0 and all(accepts(item, levels - 1) for item in value)
        return _is_count(value, least, False)

    text = f"a whole number from {least}, or a list with one for each block"
    text += ", each a number or a list for the block's layers" if depth > 1 else ""
    return Rule("honoured", _or_null(text, null), lambda v: (v is None and null) or accepts(v, depth))


def list_of(text: str, accepts: Callable[[Any], bool]) -> Rule:
    """Return the rule of a list that is not empty."""
    return Rule(
        "honoured",
        f"a list of {text}",
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(accepts(item) for item in v),
    )


def names(*allowed: str) -> Rule:
    """Return the rule of a list of names out of some."""
    return list_of(f"names, each {_listed(allowed)}", lambda item: item in allowed)


def _is_in(value: Any, values: Sequence[Any]) -> bool:
    # 1 == True in Python, but a config that says true for a number means something else.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _is_count(value: Any, least: int, null: bool) -> bool:
    if value is None:
        return null
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _listed(values: Sequence[Any]) -> str:
    return " or ".join("null" if value is None else repr(value) for value in values)


def _or_null(text: str, null: bool) -> str:
    return f"{text}, or null" if null else text
