"""Prompts as token ids: CLIP's byte-level BPE, in bounded time and memory whatever the text is.

A prompt is mended as `ftfy.fix_text` mends it, cut into words by CLIP's pattern, and each word is split by the
checkpoint's merges in the native code of `tokenizers`, which lets other threads run meanwhile and remembers nothing.
Ids are those of transformers' `CLIPTokenizer`.

What would let a text choose how long that takes is bounded. Lines, and pieces of very long ones, are mended one after
the other, only until there are as many ids as count. A piece that needs more than `_MOST_ROUNDS` rounds of mending
(`&amp;amp;amp;…`) is taken as it is then. Of more than `_MOST_MARKS` combining marks in a row the rest is dropped: to
bring them into their canonical order takes the square of their number.
"""

from __future__ import annotations

import copy
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex
from ftfy.fixes import unescape_html
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sdtpu_worker.diffusion.json_files import read_json
from sdtpu_worker.errors import InvalidCheckpoint

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would start a thread per core, for one prompt at a time

DEFAULT_LENGTH = 77
_SHORTEST, _LONGEST = 3, 100_000  # a start, something and an end; anything larger stands for "no limit"
_MOST_MERGES = 49_152 - 256 - 2  # of CLIP's vocabulary; files may have more, which are not used
_MOST_ROUNDS = 4
_MOST_LINES = 500
_MOST_CHARACTERS = 2560
"""How many characters are mended at a time: more than 77 of CLIP's longest tokens (32 characters) have."""
_MOST_MARKS = 64
_START, _END = "<|startoftext|>", "<|endoftext|>"
_DEFAULTS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}

_WORD = regex.compile(
    rf"{re.escape(_START)}|{re.escape(_END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)
_TOO_MANY_MARKS = regex.compile(rf"(?<!\p{{M}})(\p{{M}}{{{_MOST_MARKS}}})\p{{M}}+")
_FIXES = ftfy.TextFixerConfig(unescape_html=False, normalization=None, explain=False)
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_BYTES = {byte: 256 + i for i, byte in enumerate(byte for byte in range(256) if byte not in _VISIBLE)}
"""The characters that stand for bytes which Latin-1 does not show; all other bytes stand for themselves."""
ALPHABET = (*map(chr, sorted(_VISIBLE)), *(chr(_BYTES[byte]) for byte in sorted(_BYTES)))
"""The characters of all bytes, in the order of CLIP's vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint's tokenizer files say.

    Attributes:
        ids: by token; those that end a word end in `</w>`.
        merges: pairs of tokens, the first to be merged first.
        added: ids by token of those that are looked for in the raw text, before anything else.
        lone: those of `added` that count only between spaces.
        special: the tokens of `_DEFAULTS` that this checkpoint has.
        length: ids of a prompt, with start and end; None if the files do not say.
    """

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Mapping[str, int]
    lone: frozenset[str]
    special: Mapping[str, str]
    length: int | None

    @classmethod
    def from_folder(cls, folder: Path, pad_token: str | None = None) -> Vocabulary:
        """Read `vocab.json` and `merges.txt`, else `tokenizer.json`, with the configs beside them.

        Raises:
            InvalidCheckpoint, OSError, ValueError, KeyError, TypeError, AttributeError: a file is missing or says
                something else.
        """
        config = _read_if_there(folder / "tokenizer_config.json")
        added: dict[str, int] = {}
        lone: set[str] = set()
        if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
            ids: Any = read_json(folder / "vocab.json")
            lines = (folder / "merges.txt").read_text(encoding="utf-8").strip().split("\n")
            pairs: Any = (line.split() for line in lines[1 : 1 + _MOST_MERGES])  # the first one is a version
        else:
            whole = _read_if_there(folder / "tokenizer.json")
            ids = whole["model"]["vocab"]
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in whole["model"]["merges"])
            for facts in whole.get("added_tokens") or ():
                _add(added, lone, facts["id"], facts)
        if (decoder := config.get("added_tokens_decoder")) is not None:
            for index, facts in decoder.items():
                _add(added, lone, int(index), facts)
        else:  # files of older versions
            config |= _read_if_there(folder / "special_tokens_map.json")
            for token, index in _read_if_there(folder / "added_tokens.json").items():
                _add(added, lone, index, {"content": token})
        if pad_token is not None:
            config["pad_token"] = pad_token
        special = {name: _text(config.get(name) or default) for name, default in _DEFAULTS.items()}
        for token in (*special.values(), *map(_text, config.get("additional_special_tokens") or ())):
            if token not in added and token not in ids:
                raise ValueError(f"the special token {token!r} is not in its vocabulary")
            added.setdefault(token, ids.get(token))
        merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
        return cls(ids, merges, added, frozenset(lone), special, _length(config.get("model_max_length")))


class PromptTokenizer:
    """CLIP's tokenizer; may be used from many threads at a time.

    Args:
        vocabulary: of the checkpoint.
        most: how many positions the text encoder has.

    Attributes:
        length: ids of a prompt, with start, end and padding.
        bos_id, eos_id, pad_id: of the start, the end and the padding.
        comma_id: of a comma that stands alone; None if the vocabulary has none.
        vectors: by the first id of a word that stands for several vectors, how many ids it has.
    """

    def __init__(self, vocabulary: Vocabulary, most: int) -> None:
        self.length = min(vocabulary.length or DEFAULT_LENGTH, most)
        if self.length < _SHORTEST:
            raise ValueError(f"prompts must have at least {_SHORTEST} tokens, got {self.length}")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self.bos_id, self.eos_id, self.pad_id, unknown = (vocabulary.added[vocabulary.special[name]] for name in names)
        self.comma_id = vocabulary.ids.get(",</w>")
        self.vectors: Mapping[int, int] = {}
        self._several: Sequence[Sequence[int]] = ()
        self._added = vocabulary.added
        self._longest = max(len(token.removesuffix("</w>")) for token in vocabulary.ids)
        self._literal = {token: vocabulary.ids.get(token, unknown) for token in (_START, _END)}
        self._added_pattern = "|".join(
            rf"(?<![^ ]){re.escape(token)}(?![^ ])" if token in vocabulary.lone else re.escape(token)
            for token in sorted(filter(None, vocabulary.added), key=len, reverse=True)
        )
        self._pattern = re.compile(self._added_pattern)
        unk = vocabulary.special["unk_token"]
        self._bpe = Tokenizer(
            BPE(
                vocab=dict(vocabulary.ids),
                merges=list(vocabulary.merges),
                end_of_word_suffix="</w>",
                unk_token=unk if unk in vocabulary.ids else None,
                cache_capacity=0,  # by default it keeps the last 10,000 words
            )
        )

    @classmethod
    def from_folder(cls, folder: Path, most: int, pad_token: str | None = None) -> PromptTokenizer:
        """Read a checkpoint's folder `tokenizer`.

        Args:
            folder: with the vocabulary and its configs.
            most: how many positions the text encoder has.
            pad_token: what prompts are filled up with, instead of what the configs say.

        Raises:
            InvalidCheckpoint: a file is missing or cannot be used.
        """
        try:
            return cls(Vocabulary.from_folder(folder, pad_token), most)
        except Exception as exc:  # `tokenizers` raises bare ones
            raise InvalidCheckpoint(f"{folder}: the tokenizer cannot be used: {type(exc).__name__}: {exc}") from exc

    def with_words(self, words: Mapping[str, Sequence[int]]) -> PromptTokenizer:
        """Return a tokenizer for which some words stand for ids of their own.

        A word counts in any case of its letters, and where no letter or digit joins it; the longest comes first.

        Args:
            words: the ids by word, each id once.
        """
        if not words:
            return self
        longest_first = sorted(words, key=len, reverse=True)
        patterns = map(_alone, longest_first)
        other = copy.copy(self)
        other._several = [words[word] for word in longest_first]
        other.vectors = {ids[0]: len(ids) for ids in other._several}
        other._pattern = re.compile("|".join([f"(?i:{'|'.join(patterns)})", self._added_pattern]))
        return other

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, bool]:
        """Return token ids, `(len(prompts), length) int32`, and whether any prompt had to be cut."""
        rows, truncated = np.full((len(prompts), self.length), self.pad_id, np.int32), False
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self.ids(prompt, self.length - 1)
            truncated |= len(ids) > self.length - 2
            whole = [self.bos_id, *ids[: self.length - 2], self.eos_id]
            row[: len(whole)] = whole
        return rows, truncated

    def ids(self, prompt: str, most: int) -> list[int]:
        """Return the first ids between start and end, at most so many."""
        parts, fewest = list[int | str](), 0
        for part in self._parts(prompt):
            parts.append(part)
            fewest += 1 if isinstance(part, int) else math.ceil(len(part) / self._longest)
            if fewest >= most:
                break
        runs = [(is_word, list(run)) for is_word, run in groupby(parts, key=lambda part: isinstance(part, str))]
        words: Any = [run for is_word, run in runs if is_word]
        split = iter(self._bpe.encode_batch_fast(words, is_pretokenized=True, add_special_tokens=False))
        ids: list[Any] = []
        for is_word, run in runs:
            ids += next(split).ids if is_word else run
        return ids[:most]

    def _parts(self, prompt: str) -> Iterator[int | str]:
        """Yield ids of added tokens, and words in the alphabet of the merges."""
        end = 0
        for match in self._pattern.finditer(prompt):
            yield from self._words(prompt[end : match.start()])
            if match.lastindex:
                yield from self._several[match.lastindex - 1]
            else:
                yield self._added[match[0]]
            end = match.end()
        yield from self._words(prompt[end:])

    def _words(self, text: str) -> Iterator[int | str]:
        for line in _mended_lines(text):
            for match in _WORD.finditer(" ".join(line.split()).lower()):
                if (literal := self._literal.get(match[0])) is not None:
                    yield literal
                else:
                    yield match[0].encode().decode("latin-1").translate(_BYTES)


def _mended_lines(text: str) -> Iterator[str]:
    """Yield what `ftfy.fix_text` makes of a text, line by line."""
    entities = True
    lines = text.split("\n", _MOST_LINES)  # what is left over after so many counts as one line
    for i, line in enumerate(lines):
        entities = entities and "<" not in line  # then it is taken for HTML, from here on
        if line.strip(" \t\r"):
            for piece in _pieces(line + "\n" if i + 1 < len(lines) else line):
                yield _mend(piece, entities)


def _pieces(line: str) -> Iterator[str]:
    """Yield a line, cut after a space if it is very long and has one there."""
    start = 0
    while len(line) - start > _MOST_CHARACTERS:
        end = line.rfind(" ", start + _MOST_CHARACTERS // 2, start + _MOST_CHARACTERS) + 1
        end = end or start + _MOST_CHARACTERS
        yield line[start:end]
        start = end
    yield line[start:]


def _mend(line: str, entities: bool) -> str:
    for _ in range(_MOST_ROUNDS):
        before = line
        if entities:
            line = unescape_html(line)
        line = ftfy.fix_text_segment(line, _FIXES)
        line = unicodedata.normalize("NFC", _TOO_MANY_MARKS.sub(r"\1", line))
        if line == before:
            break
    return line


def _alone(word: str) -> str:
    """Return a pattern with a group for a word that no letter or digit joins."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return f"{before}({re.escape(word)}){after}"


def _add(added: dict[str, int], lone: set[str], index: int, facts: Mapping[str, Any]) -> None:
    added[facts["content"]] = index
    if facts.get("single_word"):
        lone.add(facts["content"])


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text(token: Any) -> str:
    """Return a special token's text: configs have it plain or with attributes."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"a special token must be a string, got {type(text).__name__}")
    return text


def _length(given: Any) -> int | None:
    is_limit = isinstance(given, int | float) and not isinstance(given, bool) and _SHORTEST <= given <= _LONGEST
    return int(given) if is_limit else None
