"""Prompts become the ids of transformers' slow CLIPTokenizer, in bounded time and memory whatever the text is."""

from __future__ import annotations

import gzip
import json
import random
import resource
import shutil
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdtpu_worker.contract.parameter_checks import MAX_PROMPT_CHARACTERS
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidCheckpoint
from tests.support.checkpoints import SHIPPED
from tests.support.prompt_cases import (
    END,
    MORE_PROMPTS,
    PROMPTS,
    SAYS,
    START,
    mixtures,
    write_config,
    write_files,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Give what `tools/oracle/tokens.py` wrote: a tokenizer with thousands of merges, and ids of the slow tokenizer."""
    return json.loads(gzip.decompress((Path(__file__).parent / "golden" / "tokens.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, golden["merges"], golden["alphabet"])
    assert len(golden["merges"]) > 3000
    return folder


def encode(tokenizer: PromptTokenizer, prompt: str) -> tuple[list[int], bool]:
    (row,), truncated = tokenizer.encode([prompt])
    return row.tolist(), truncated


def padded(tokenizer: PromptTokenizer, wanted: list[Any]) -> tuple[list[int], bool]:
    ids, truncated = wanted
    return [*ids, *[tokenizer.pad_id] * (77 - len(ids))], truncated


@pytest.fixture(scope="module")
def ours(folder) -> PromptTokenizer:
    return PromptTokenizer.from_folder(folder, 77)


# --- the same ids ---


@pytest.mark.parametrize("i", range(len(PROMPTS)), ids=[ascii(prompt[:20]) for prompt in PROMPTS])
def test_a_prompt_has_the_ids_of_the_slow_tokenizer(ours, golden, i):
    assert encode(ours, PROMPTS[i]) == padded(ours, golden["prompts"][i])
    shipped = PromptTokenizer.from_folder(SHIPPED / "tokenizer", 77)
    assert encode(shipped, PROMPTS[i]) == padded(shipped, golden["shipped"][i])


def test_any_mixture_has_the_ids_of_the_slow_tokenizer(ours, golden):
    wanted = golden["mixtures"]
    for prompt, ids in zip(mixtures(len(wanted)), wanted, strict=True):
        assert encode(ours, prompt) == padded(ours, ids), ascii(prompt)


def test_many_prompts_make_one_array(ours):
    ids, truncated = ours.encode(["a fox", "fox " * 100])
    assert (ids.shape, ids.dtype, truncated) == ((2, 77), np.int32, True)
    assert (ids[:, 0] == ours.bos_id).all()
    assert ids[1, -1] == ours.eos_id
    assert ours.encode(["a fox", ""])[1] is False


# --- what a checkpoint's files may say ---


def copy_of(folder: Path, tmp_path: Path, **config) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path / "tokenizer"))
    if config:
        write_config(copy, **config)
    return copy


@pytest.mark.parametrize("says", SAYS)
def test_the_configs_of_a_checkpoint_are_followed(folder, golden, tmp_path, says):
    copy, wanted = copy_of(folder, tmp_path), golden["configs"][says]
    write_files(copy, says)
    ours = PromptTokenizer.from_folder(copy, 77)
    assert [ours.bos_id, ours.eos_id, ours.pad_id] == wanted["special"]
    for prompt, ids in zip(MORE_PROMPTS, wanted["prompts"], strict=True):
        assert encode(ours, prompt) == padded(ours, ids), ascii(prompt)


@pytest.mark.parametrize("merges_are_text", [False, True])
def test_a_folder_with_tokenizer_json_alone_gives_the_same_ids(folder, golden, tmp_path, merges_are_text):
    """Fast tokenizers are saved so; older versions wrote each merge as one text."""
    merges = [" ".join(pair) for pair in golden["merges"]] if merges_are_text else golden["merges"]
    vocab = json.loads((folder / "vocab.json").read_text())
    special = [{"id": vocab[token], "content": token, "special": True} for token in (START, END)]
    whole = {"added_tokens": special, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    ours = PromptTokenizer.from_folder(tmp_path, 77)
    for prompt, ids in zip(PROMPTS, golden["prompts"], strict=True):
        assert encode(ours, prompt) == padded(ours, ids), ascii(prompt)


@pytest.mark.parametrize(
    ("says", "most", "length"),
    [(77, 77, 77), (10**30, 77, 77), (None, 77, 77), (None, 40, 40), (64, 77, 64), (128, 77, 77), (128, 248, 128),
     (10**30, 248, 77), ("77", 77, 77), (True, 77, 77), (0, 77, 77), (-1, 77, 77)],
)  # fmt: skip
def test_the_length_is_the_configs_as_far_as_the_text_encoder_goes(folder, tmp_path, says, most, length):
    copy = copy_of(folder, tmp_path, model_max_length=says)
    ours = PromptTokenizer.from_folder(copy, most)
    ids, truncated = ours.encode(["fox " * 1000])
    assert (ours.length, ids.shape, truncated) == (length, (1, length), True)


def test_files_that_are_missing_or_broken_are_an_invalid_checkpoint(folder, tmp_path):
    def broken(name: str, text: str | None) -> Path:
        copy = copy_of(folder, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        (copy / name).unlink(missing_ok=True)
        if text is not None:
            (copy / name).write_text(text)
        return copy

    vocab = json.loads((folder / "vocab.json").read_text())
    folders = [tmp_path / "nothing", broken("vocab.json", None), broken("merges.txt", None)]
    texts = ["", "{", "[]", "7", "[" * 100_000, '{"a": "b"}', '{"a": -1}', '{"a": 1e99}', "{}"]
    folders += [broken("vocab.json", text) for text in texts]
    folders += [broken("vocab.json", json.dumps({k: v for k, v in vocab.items() if k != END}))]
    folders += [
        broken("tokenizer_config.json", text) for text in ("{", "[]", '{"pad_token": 7}', '{"pad_token": "zz zz"}')
    ]
    folders += [broken("added_tokens.json", text) for text in ("[7]", "{")]
    folders += [
        broken("merges.txt", "#version\nnot there\n"),
        broken("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}"),
    ]
    for folder_ in folders:
        with pytest.raises(InvalidCheckpoint, match=r"the tokenizer cannot be used: \w+"):
            PromptTokenizer.from_folder(folder_, 77)
    with pytest.raises(InvalidCheckpoint, match="at least 3 tokens, got 2"):
        PromptTokenizer.from_folder(folder, 2)


# --- whatever a stranger writes ---


def fill(text: str) -> str:
    return (text * (MAX_PROMPT_CHARACTERS // len(text) + 1))[:MAX_PROMPT_CHARACTERS]


def drawn(letters: str, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(letters, k=MAX_PROMPT_CHARACTERS))


HOSTILE = {
    "one letter": "a" * MAX_PROMPT_CHARACTERS,
    "one word": drawn("bcdfghklmnprstaeiou"),
    "one word of syllables": "".join(random.Random(1).choices(["ba", "ke", "ti"], k=5000)),
    "emoji": fill("👩‍👩‍👧"),
    "cuneiform": drawn("".join(map(chr, range(0x12000, 0x12300)))),
    "nested entities": "&" + "amp;" * 2499,
    "nested numbers": "&" + "#38;" * 2499,
    "nested full width": "＆" + "amp;" * 2499,
    "nested mojibake": "ï¼†" + "amp;" * 2499,
    "nested before marks": "&" + "amp;" * 1250 + "\u0300\u0316" * 2499,
    "marks": fill("\u0300\u0316"),
    "marks in reverse": "".join(chr(c) for c in range(0x36F, 0x2FF, -1)) * 89,
    "marks as mojibake": fill("Ì€Ì–"),
    "marks as entities": fill("&#768;&#790;"),
    "lines": "\n" * MAX_PROMPT_CHARACTERS,
    "invisible lines": fill("\ufeff\n"),
    "lines of mojibake": fill("Ã©ж\n"),
    "mojibake": drawn("Ãâ©€™œÂ¢ÐÑž"),
    "mixed mojibake": fill("ÂœÐ"),
    "inconsistent mojibake": fill("Ã©ж"),
    "control characters": drawn("Â\x9fÃ\xa0\x80é"),
    "marks of a byte order": drawn("\ufeffÂ\x9f"),
    "growing": fill("\U0001d160"),
    "ligatures": fill("ﬃ"),
    "special tokens": fill(END + "\ufeff"),
    "beginnings of special tokens": fill("<|endoftext"),
    "quotes": fill("'s''t"),
    "spaces": " " * MAX_PROMPT_CHARACTERS,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_prompt_takes_long(ours, kind):
    """A word of 10,000 letters took six seconds under the GIL; most take a few milliseconds now, the worst forty."""
    ours.encode(["a fox"])
    seconds = []
    for _ in range(3):
        started = time.process_time()
        ids, _ = ours.encode([HOSTILE[kind]])
        seconds.append(time.process_time() - started)
    assert ids.shape == (1, 77)
    assert min(seconds) < 0.25


@given(
    st.lists(
        st.sampled_from("Ãâ©€™œÂ¢ÐÑž\x80\x9f\ufeff\u0300\u0316&;é \nж<") | st.text(max_size=3), min_size=1, max_size=8
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_repetition_of_anything_takes_long(ours, parts):
    started = time.process_time()
    ours.encode([fill("".join(parts) or " ")])
    assert time.process_time() - started < 0.5


def test_new_words_leave_nothing_behind(ours):
    """The slow tokenizer keeps 69 KiB for each prompt of new words."""
    draw = random.Random(2)

    def encode_new_words(count: int) -> None:
        for _ in range(count):
            words = ("".join(draw.choices("bcdfghklmnprstaeiou", k=draw.randint(5, 30))) for _ in range(30))
            ours.encode([" ".join(words)])

    encode_new_words(300)
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    encode_new_words(1700)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss_before < 16_384, "KiB, also of what is not Python's"


def test_other_threads_run_while_a_long_word_is_split(ours):
    """The interpreter is told never to switch threads by itself: they run only where it is let go."""
    turns, stop = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=take_turns)
    word = ours._bpe  # split without anything around it
    letters = HOSTILE["one word"]
    try:
        sys.setswitchinterval(1000)
        thread.start()
        before = turns
        for _ in range(200):
            word.encode_batch_fast([[letters]], is_pretokenized=True, add_special_tokens=False)
            if turns > before:
                break
        assert turns > before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
