"""Write what transformers' slow CLIP tokenizer makes of prompts: the golden ids of `tests/device/test_tokens.py`.

    python -m tools.oracle.tokens

Needs transformers before 5, which has ended the slow tokenizer, with tokenizers; see README.md.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from tests.support.prompt_cases import MORE_PROMPTS, PROMPTS, SAYS, mixtures, write_files, write_tokenizer

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "device" / "golden" / "tokens.json.gz"
MIXTURES = 500


def main() -> None:
    """Learn a tokenizer, run every case, and write one file."""
    merges, alphabet = learn()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokenizer"
        folder.mkdir()
        write_tokenizer(folder, merges, alphabet)
        own = CLIPTokenizer.from_pretrained(folder)
        shipped = CLIPTokenizer.from_pretrained(ROOT / "sdtpu_worker" / "checkpoint" / "tokenizer")
        golden: dict[str, Any] = {
            "merges": merges,
            "alphabet": alphabet,
            "prompts": [encode(own, prompt) for prompt in PROMPTS],
            "shipped": [encode(shipped, prompt) for prompt in PROMPTS],
            "mixtures": [encode(own, prompt) for prompt in mixtures(MIXTURES)],
            "configs": {says: run_config(folder, Path(name) / f"copy {i}", says) for i, says in enumerate(SAYS)},
        }
    GOLDEN.write_bytes(gzip.compress(json.dumps(golden).encode(), mtime=0))
    print(f"{len(merges)} merges, {GOLDEN.stat().st_size:,} bytes")


def learn() -> tuple[list[list[str]], list[str]]:
    """Return the merges and the alphabet of a tokenizer with thousands of merges: long words take long with many."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    draw = random.Random(0)
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprst", "aeiou")]
    texts = [" ".join(draw.choice(syllables) * draw.randint(1, 2) + draw.choice(syllables) for _ in range(20_000))]
    texts += [(ROOT / "README.md").read_text(encoding="utf-8").lower(), *(p.lower() for p in PROMPTS * 5)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges], sorted(alphabet)


def encode(tokenizer: Any, prompt: str, length: int = 77) -> list[Any]:
    """Return the ids of a prompt without its padding, cut to a length, and whether it was cut."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    truncated = len(ids) > length
    return [[*ids[: length - 1], ids[-1]] if truncated else ids, truncated]


def run_config(folder: Path, copy: Path, says: str) -> dict[str, Any]:
    """Return what a tokenizer with other files makes of the prompts; no special tokens mean the usual ones."""
    shutil.copytree(folder, copy)
    if says != "no special tokens":
        write_files(copy, says)
    tokenizer = CLIPTokenizer.from_pretrained(copy)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return {"special": special, "prompts": [encode(tokenizer, prompt) for prompt in MORE_PROMPTS]}


if __name__ == "__main__":
    main()
