"""The Lua scripts as files: each says what it is for, and is sent to Redis without its comments."""

from __future__ import annotations

from importlib import resources

import pytest

from sdtpu_worker.delivery import scripts

FILES = {path.name: path for path in (resources.files("sdtpu_worker.delivery") / "lua").iterdir()}
SENT = {name: text for name, text in vars(scripts).items() if name.isupper() and isinstance(text, str)}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_script_opens_with_what_it_does_and_with_its_keys_and_result(name):
    lines = FILES[name].read_text("utf-8").splitlines()
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("--"))])
    assert "KEYS" in comment
    assert "Result:" in comment


def test_every_file_is_sent_and_without_its_comment():
    code = {name: [line for line in path.read_text("utf-8").splitlines() if not line.startswith("--")]
            for name, path in FILES.items()}  # fmt: skip
    for name, lines in code.items():
        assert any(set(lines) <= set(text.splitlines()) for text in SENT.values()), name
    assert not any(line.startswith("--") for text in SENT.values() for line in text.splitlines())
    assert len(SENT) == len(FILES) - 1, "return_to_queue.lua is a part of others"
