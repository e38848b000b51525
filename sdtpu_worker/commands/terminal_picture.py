"""A picture in the terminal, where it can show one: by kitty's or iTerm2's protocol, or in coloured half blocks."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from pathlib import Path

COLUMNS = 48
_CHUNK = 4096


def show_picture(path: Path) -> None:
    """Show a picture on standard output; nothing where that is no terminal or has too few colours."""
    if sys.stdout.isatty():
        sys.stdout.write(picture_text(path, os.environ))
        sys.stdout.flush()


def picture_text(path: Path, environ: Mapping[str, str]) -> str:
    """Return what makes a terminal show a picture; empty for one that cannot.

    Args:
        path: of the picture.
        environ: of the process; it tells which terminal it is.
    """
    program, term = environ.get("TERM_PROGRAM", ""), environ.get("TERM", "")
    if environ.get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program == "ghostty":
        return _for_kitty(_as_png(path))
    if program in ("iTerm.app", "WezTerm"):
        data = base64.b64encode(path.read_bytes()).decode()
        return f"\x1b]1337;File=inline=1;width={COLUMNS};preserveAspectRatio=1:{data}\a\n"
    if environ.get("COLORTERM") in ("truecolor", "24bit"):
        return _in_half_blocks(path)
    return ""


def _as_png(path: Path) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.open(path).save(buffer, "PNG")
    return buffer.getvalue()


def _for_kitty(data: bytes) -> str:
    text = base64.b64encode(data).decode()
    chunks = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        control = f"f=100,a=T,c={COLUMNS}," if number == 0 else ""
        parts.append(f"\x1b_G{control}m={int(number + 1 < len(chunks))};{chunk}\x1b\\")
    return "".join(parts) + "\n"


def _in_half_blocks(path: Path) -> str:
    """Return two rows of pixels as one line of text: the upper one in front of the lower one."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    rows = max(1, round(COLUMNS * image.height / image.width / 2))
    image = image.resize((COLUMNS, 2 * rows))
    lines = []
    for row in range(rows):
        cells = []
        for column in range(COLUMNS):
            upper, lower = image.getpixel((column, 2 * row)), image.getpixel((column, 2 * row + 1))
            cells.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*upper, *lower))  # type: ignore[misc]  # RGB
        lines.append("".join(cells) + "\x1b[0m\n")
    return "".join(lines)
