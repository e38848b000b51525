"""Prompts and tokenizer files, as the oracle (`tools/oracle/tokens.py`) and the tests both read them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
MORE_PROMPTS = [*PROMPTS, "a <my-cat> and<my-cat>zz <MY-CAT> ! fox (fox) foxes fox #1 a@b", "!", "fox"]
_PARTS = sorted({part for prompt in PROMPTS[:33] for part in (prompt, *prompt.split(" "), *prompt[:40])})


def mixtures(count: int) -> list[str]:
    """Return prompts that a seed mixes of pieces of the others and of any characters."""
    draw = random.Random(7)

    def any_characters() -> str:
        ranges = (32, 0x250), (0x300, 0x3000), (0x3000, 0x30000)
        codes = [draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(8))]
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    def piece() -> str:
        return any_characters() if draw.random() < 0.3 else draw.choice(_PARTS)

    return ["\u0390" * 60, "e" + "\u0316\u0301" * 30] + [
        "".join(piece() for _ in range(draw.randrange(40))) for _ in range(count - 2)
    ]


def write_tokenizer(folder: Path, merges: Sequence[Sequence[str]], alphabet: Sequence[str]) -> None:
    """Write the files of a tokenizer of CLIP's kind."""
    letters = sorted(alphabet)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_config(folder)


def write_config(folder: Path, **changes: Any) -> None:
    """Write `tokenizer_config.json`."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def added(content: str, **attributes: Any) -> dict[str, Any]:
    """Return an added token with its attributes, as configs write it."""
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


def write_files(folder: Path, says: str) -> None:
    """Change the files of a tokenizer into what one of `SAYS` has."""
    config, files = SAYS[says]
    if says == "no special tokens":
        (folder / "tokenizer_config.json").write_text("{}")
        return
    if "added_tokens_decoder" in config:
        ids = json.loads((folder / "vocab.json").read_text())
        by_name = {facts["content"]: facts for facts in config["added_tokens_decoder"].values()}
        decoder = {str(ids.get(name, 6500 + i)): facts for i, (name, facts) in enumerate(by_name.items())}
        config = {**config, "added_tokens_decoder": decoder}
    write_config(folder, **config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
