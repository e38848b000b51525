"""The documentation as the tests read it: its pages, and the fenced blocks of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGES = (
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "docker" / "README.md",
    ROOT / "sdtpu_worker" / "checkpoint" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<info>.*)$")
_MARKER = re.compile(r"^<!-- not run: (?P<reason>.+) -->$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, from the repository's top level.
        line: of its first line of code, from 1.
        language: the first word after the fence; may be empty.
        title: the file that it shows, if it says so.
        text: the code.
        not_run: why it is not run, if a comment before it says so.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page.

    Raises:
        ValueError: a block does not end.
    """
    page, fence, reason, start = str(path.relative_to(ROOT)), None, None, 0
    code: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = _FENCE.match(line)
        if fence is None and match:
            fence, start, code = match, number + 1, []
        elif fence is not None and match and match["fence"] == fence["fence"] and not match["info"]:
            language, _, rest = fence["info"].partition(" ")
            title = _TITLE.search(rest)
            yield Block(page, start, language, title[1] if title else None, "\n".join(code) + "\n", reason)
            fence = reason = None
        elif fence is not None:
            code.append(line.removeprefix(fence["indent"]))
        elif line.strip():
            marker = _MARKER.match(line.strip())
            reason = marker["reason"] if marker else None
    if fence is not None:
        raise ValueError(f"{page}: the block of line {start} does not end")


def all_blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in these languages; in any language if none is named."""
    blocks = [block for path in PAGES for block in read_blocks(path)]
    return [block for block in blocks if not languages or block.language in languages]


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    lines, fence = [], None
    for line in path.read_text().splitlines():
        match = _FENCE.match(line)
        if fence is None and match:
            fence = match["fence"]
        elif fence is not None and match and match["fence"] == fence and not match["info"]:
            fence = None
        elif fence is None:
            lines.append(line)
    return "\n".join(lines)


def write_files(path: Path, folder: Path) -> None:
    """Write the files that a tutorial shows; one "(at the end)" is added to the file that is there."""
    for block in read_blocks(path):
        if block.title is None:
            continue
        name, _, at_the_end = block.title.partition(" (")
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((file.read_text() if at_the_end else "") + block.text)
