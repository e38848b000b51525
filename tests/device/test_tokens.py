"""Prompts become the ids of transformers' CLIPTokenizer, in bounded time and memory whatever the text is."""

from __future__ import annotations

import itertools
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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, CLIPTokenizerFast

from sdtpu_worker.contract.request import MAX_PROMPT_CHARACTERS
from sdtpu_worker.diffusion.tokens import PromptTokenizer
from sdtpu_worker.errors import InvalidCheckpoint
from tests.support.checkpoints import SHIPPED

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = [
    "",
    " ",
    "a fox in the snow",
    "  A   Fox\tin\r\nthe \n\n snow ",
    "highly detailed, (masterpiece:1.3), [art|photo], 8k, trending on #artstation, by @someone --ar 16:9",
    "it's don't we'll I'd they're I've I'm THEY'RE 'S 's'T rock'n'roll O'Neil's",
    "“curly” ‘quotes’ it’s don’t – dashes — and … dots",
    "2024 3.14 1,000,000 ½ ² Ⅷ １２３ ٣٤٥ 1st 4K",
    "naïve café Ångström Zürich straße STRAẞE ǆ ĳ ŉ İstanbul ılık ſ 'ſ",
    "cafe\u0301 A\u030angstro\u0308m o\u0323\u0302 \u0301alone",
    "рыжая лиса в снегу, Ёлка, Їжак",
    "ΟΔΥΣΣΕΥΣ Ὀδυσσεύς ΣΑΣ σας Σ",
    "ثعلب في الثلج، مُحَمَّد ﷺ ﻻ",
    "שועל בשלג שָׁלוֹם",
    "बर्फ़ में लोमड़ी क्षत्रिय",
    "สุนัขจิ้งจอกในหิมะ กำ",
    "雪の中の狐 カタカナ ｶﾀｶﾅ ﾊﾟ 雪中的狐狸，一只",
    "눈 속의 여우 \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪 😀👍🏽 ❤️ 1️⃣",
    "ＦＵＬＬ　ＷＩＤＴＨ！ ﬁre ﬂuﬀy oﬃce",
    "Ã©tÃ© donâ€™t â€œquotedâ€\x9d voilÃ  le travail Ð¿Ñ€Ð¸Ð²ÐµÑ‚ ж Ã©",
    "Ã\ufffd Ã lossy",
    "&lt;b&gt; &amp;amp; &eacute;t&EACUTE; &#233; &#x1F600; &nbsp; &nothing; &#99999999999;",
    "a < b &amp; c\nsecond line &amp; more",
    "first line &amp;\nsecond < line &amp;\nthird &amp;",
    "zero\u200bwidth joi\u200dner soft\u00adhyphen \ufeffmark \u2060word \u200eleft \u202eright",
    "line\u2028para\u2029nbsp\u00a0thin\u2009ideographic\u3000ogham\u1680x\x0bv\x0cf\x1cs\x1fu\x85n",
    "\x80\x9f \x1b[31mred\x1b[0m \x00\x07\x7f",
    f"a fox{END}in the snow {START} twice {END}{END}",
    "<|ENDOFTEXT|> <|StartOfText|> ＜｜endoftext｜＞ <|endoftext <|end|> &lt;|endoftext|&gt;",
    "!!! ... ??? -- === *** ###!a!b! ___ http://example.net/?q=1&r=2 C:\\temp\\x a_b",
    "𝕳𝖊𝖑𝖑𝖔 Ａ\u0301 \u212b K \u2126 ﾞ",
    "x" * 300,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "fox " * 75,
    "fox " * 76,
    "fox " * 500,
    "1" * 75,
    "1" * 76,
    "雪" * 500,
    "." * 400 + "-" * 400,
    "word, " * 400 + "Ã©",
    ("a long line of words " * 20 + "\n") * 20,
    "\n".join("abcdefghij") + "\n" * 50,
    " " * 5000 + "fox" + " " * 4000 + "snow",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Give a tokenizer of CLIP's kind with thousands of merges, as long words take long with many."""
    folder = tmp_path_factory.mktemp("tokenizer")
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    draw = random.Random(0)
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprst", "aeiou")]
    texts = [" ".join(draw.choice(syllables) * draw.randint(1, 2) + draw.choice(syllables) for _ in range(20_000))]
    texts += [(SHIPPED.parents[1] / "README.md").read_text(encoding="utf-8").lower(), *(p.lower() for p in PROMPTS * 5)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    tokens = [*sorted(alphabet), *(f"{letter}</w>" for letter in sorted(alphabet)), *map("".join, merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_config(folder)
    assert len(merges) > 3000
    return folder


def write_config(folder: Path, **changes) -> None:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def in_transformers_words(tokenizer: CLIPTokenizer, prompt: str, length: int = 77) -> tuple[list[int], bool]:
    """Return what the engine made of a prompt with the slow tokenizer."""
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    truncated = len(ids) > length
    if truncated:
        ids = [*ids[: length - 1], ids[-1]]
    return ids + [tokenizer.pad_token_id] * (length - len(ids)), truncated


def encode(tokenizer: PromptTokenizer, prompt: str) -> tuple[list[int], bool]:
    (row,), truncated = tokenizer.encode([prompt])
    return row.tolist(), truncated


@pytest.fixture(scope="module")
def ours(folder) -> PromptTokenizer:
    return PromptTokenizer.from_folder(folder, 77)


@pytest.fixture(scope="module")
def theirs(folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def shipped_pair() -> tuple[PromptTokenizer, CLIPTokenizer]:
    return PromptTokenizer.from_folder(SHIPPED / "tokenizer", 77), CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")


# --- the same ids ---


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt[:20]))
def test_a_prompt_has_the_ids_of_the_slow_tokenizer(ours, theirs, shipped_pair, prompt):
    assert encode(ours, prompt) == in_transformers_words(theirs, prompt)
    assert encode(shipped_pair[0], prompt) == in_transformers_words(shipped_pair[1], prompt)


PARTS = sorted({part for prompt in PROMPTS[:33] for part in (prompt, *prompt.split(" "), *prompt[:40])})


@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=40).map("".join) | st.text(max_size=200))
@example("\u0390" * 60)
@example("e" + "\u0316\u0301" * 30)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_has_the_ids_of_the_slow_tokenizer(ours, theirs, prompt):
    assert encode(ours, prompt) == in_transformers_words(theirs, prompt)


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


def added(content: str, **attributes) -> dict:
    fixed = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {**fixed, "content": content, **attributes}


SAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other padding": ({"pad_token": "!"}, {}),
    "special tokens with attributes": ({"bos_token": added(START), "pad_token": added("!", normalized=False)}, {}),
    "a special tokens map": ({}, {"special_tokens_map.json": {"pad_token": "!", "bos_token": {"content": START}}}),
    "added tokens": ({}, {"added_tokens.json": {"<my-cat>": 7000, "zz": 7001}}),
    "a decoder of added tokens": (
        {
            "added_tokens_decoder": {
                "0": added("!"), "7000": added("<my-cat>"), "7001": added("fox", single_word=True),
                "6001": added(END, special=True), "6000": added(START, special=True),
            },
            "pad_token": "!",
        },
        {"special_tokens_map.json": {"pad_token": END}},
    ),
    "additional special tokens": ({"additional_special_tokens": ["@", added("#")]}, {}),
    "no special tokens": ({"bos_token": None, "pad_token": None, "unk_token": None, "eos_token": None}, {}),
}  # fmt: skip


@pytest.mark.parametrize("says", SAYS)
def test_the_configs_of_a_checkpoint_are_followed(folder, tmp_path, says):
    config, files = SAYS[says]
    ids = json.loads((folder / "vocab.json").read_text())
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        by_name = {facts["content"]: facts for facts in decoder.values()}
        decoder = {str(ids.get(name, 6500 + i)): facts for i, (name, facts) in enumerate(by_name.items())}
        config = {**config, "added_tokens_decoder": decoder}
    if says == "no special tokens":
        copy = copy_of(folder, tmp_path)
        (copy / "tokenizer_config.json").write_text("{}")
        theirs = CLIPTokenizer.from_pretrained(folder)
    else:
        copy = copy_of(folder, tmp_path, **config)
        for name, content in files.items():
            (copy / name).write_text(json.dumps(content))
        theirs = CLIPTokenizer.from_pretrained(copy)
    ours = PromptTokenizer.from_folder(copy, 77)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for prompt in (*PROMPTS, "a <my-cat> and<my-cat>zz <MY-CAT> ! fox (fox) foxes fox #1 a@b", "!", "fox"):
        assert encode(ours, prompt) == in_transformers_words(theirs, prompt)


def test_a_folder_with_tokenizer_json_alone_gives_the_same_ids(folder, theirs, tmp_path):
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    ours = PromptTokenizer.from_folder(tmp_path, 77)
    for prompt in PROMPTS:
        assert encode(ours, prompt) == in_transformers_words(theirs, prompt)
    text = (tmp_path / "tokenizer.json").read_text()
    merges = json.loads(text)["model"]["merges"]
    as_text = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    whole = json.loads(text)
    whole["model"]["merges"] = as_text  # as older versions write them
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert encode(PromptTokenizer.from_folder(tmp_path, 77), PROMPTS[4]) == in_transformers_words(theirs, PROMPTS[4])


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
