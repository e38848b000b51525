"""Make the tokenizer of the shipped checkpoint: CLIP's byte-level BPE, with merges learned from the caption grammar.

Every word of the grammar becomes one token; other text is split into shorter pieces, down to single bytes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from sdtpu_worker.diffusion.tokens import ALPHABET
from tools.embedded_checkpoint.scenes import COLOURS, SHAPES

WORDS = (
    *COLOURS,
    *SHAPES,
    *("a", "an", "and", "at", "background", "big", "bottom", "center", "in", "large", "left", "middle", "of", "on"),
    *("picture", "right", "small", "the", "tiny", "top"),
)
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77


def write_tokenizer(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and the configs that transformers' `CLIPTokenizer` reads, as ours does."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = ALPHABET
    merges = _learn_merges()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def _learn_merges() -> list[tuple[str, str]]:
    """Merge the most frequent neighbouring pair, again and again, until every word is one token."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    merges = []
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges
