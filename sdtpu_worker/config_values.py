"""Parsers of settings: the value of a text from the environment, or of an object from the app's configuration.

Each raises ValueError with the words for what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sdtpu_worker.contract.parameter_checks import MAX_SIDE, SIDE_MULTIPLE

SIZE_LISTS = {
    "sdxl": (
        (1024, 1024), (896, 1152), (1152, 896), (832, 1216), (1216, 832), (768, 1344), (1344, 768), (640, 1536),
        (1536, 640),
    ),
}  # fmt: skip
"""Names for sizes, `(height, width)` in pixels. Source of `sdxl`: arXiv 2307.01952, appendix I."""


def parse_text(value: Any) -> str:
    """Return a text without white space around it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value.strip()


def parse_queue(value: Any) -> str:
    """Return the name of a queue."""
    name = parse_text(value)
    if not name.isprintable():
        raise ValueError("a name of printable characters")
    return name


def parse_choice(*choices: str) -> Callable[[Any], str]:
    """Return a parser that takes one of these."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return parse


def parse_integer(low: int, high: int) -> Callable[[Any], int]:
    """Return a parser of an integer within bounds."""

    def parse(value: Any) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return number

    return parse


def _whole(value: Any) -> int | None:
    """Return an integer: `value` itself, or the number in a short text of digits; None for anything else."""
    if isinstance(value, str):
        digits = value.strip()
        is_one = len(digits) <= 20 and digits.isascii() and digits.removeprefix("-").isdigit()
        return int(digits) if is_one else None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def parse_slots(value: Any) -> int | str:
    """Return a number of slots, or `auto`."""
    try:
        return "auto" if value == "auto" else parse_integer(1, 64)(value)
    except ValueError as exc:
        raise ValueError(f"auto, or {exc}") from None


def parse_switch(value: Any) -> bool:
    """Return a bool: one from the app's configuration, or a word from the environment."""
    words = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("on or off")


def parse_reuse(value: Any) -> str:
    """Return `off`, `on` or `across_tenants`."""
    if value == "across_tenants":
        return "across_tenants"
    try:
        return "on" if parse_switch(value) else "off"
    except ValueError:
        raise ValueError("off, on or across_tenants") from None


def parse_seconds(low: float, high: float) -> Callable[[Any], float]:
    """Return a parser of seconds within bounds."""

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not low <= number <= high:
            raise ValueError(f"seconds from {low} to {high}")
        return number

    return parse


def parse_optional_text(value: Any) -> str | None:
    """Return a text, None where it is empty."""
    return None if value is None or value == "" else parse_text(value)


def parse_loras(value: Any) -> tuple[tuple[str, float], ...]:
    """Return the names and weights of "a.safetensors=0.8,owner/name" or of a sequence of pairs or names."""
    wanted = "files with weights, like 'a.safetensors=0.8,b.safetensors' or [('a.safetensors', 0.8)]"
    entries = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        raise ValueError(wanted)
    loras = []
    for entry in entries:
        if isinstance(entry, str):
            name, separator, weight = entry.strip().rpartition("=")
            name, weight = (name, weight) if separator else (entry.strip(), "1")
        elif isinstance(entry, list | tuple) and len(entry) == 2:
            name, weight = entry
        else:
            raise ValueError(wanted)
        try:
            number = float(weight)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(wanted) from None
        if not isinstance(name, str) or not name or not -100 <= number <= 100:
            raise ValueError(wanted)
        loras.append((name, number))
    return tuple(loras)


def parse_named(value: Any) -> dict[str, str]:
    """Return by name the sources of "canny=/models/canny,pose=owner/name" or of a dictionary."""
    wanted = "names with sources, like 'canny=/models/canny,pose=owner/name' or {'canny': '/models/canny'}"
    if isinstance(value, str):
        entries = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): source.strip() for name, _, source in entries}
        if len(value) != len(entries):
            raise ValueError(f"{wanted}, each name once")
    if not isinstance(value, Mapping):
        raise ValueError(wanted)
    for name, source in value.items():
        if not isinstance(name, str) or not isinstance(source, str) or not name or not source or not name.isprintable():
            raise ValueError(wanted)
    return dict(value)


def parse_lora_sources(value: Any) -> dict[str, str] | str | None:
    """Return what `parse_named` returns, or the path of a folder; None where the value is empty."""
    return _parse_sources(value, "names", "pixel")


def parse_embedding_sources(value: Any) -> dict[str, str] | str | None:
    """Return what `parse_lora_sources` returns; words have no space at their ends."""
    sources = _parse_sources(value, "words", "moodring")
    if isinstance(sources, dict) and any(word != word.strip() for word in sources):
        raise ValueError("words without space around them")
    return sources


def _parse_sources(value: Any, what: str, example: str) -> dict[str, str] | str | None:
    if value is None or value == "" or value == {}:
        return None
    if isinstance(value, str) and "=" not in value:
        return value
    try:
        return parse_named(value)
    except ValueError:
        raise ValueError(
            f"a folder, or {what} with sources, like '{example}=/models/{example}.safetensors,toy=owner/name' or"
            f" {{'{example}': '/models/{example}.safetensors'}}"
        ) from None


def parse_address(value: Any) -> tuple[str, int]:
    """Return host and port of "127.0.0.1:8080", ":8080" (every interface) or "[::1]:8080"."""
    host, separator, text = value.strip().rpartition(":") if isinstance(value, str) else ("", "", "")
    port = _whole(text)
    if not separator or port is None or not 0 <= port <= 65_535:
        raise ValueError("host:port, like 127.0.0.1:8080")
    return host.strip("[]"), port


def parse_resolutions(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Return the sizes of "512x512,768x512" (height x width) or of a sequence of pairs or such texts.

    A text may also be a name of `SIZE_LISTS`. None where the value is empty.
    """
    wanted = (
        f"heights x widths in multiples of {SIDE_MULTIPLE}, like '512x512,768x512' or [(512, 512)], or"
        f" {', '.join(SIZE_LISTS)}"
    )
    if value is None or value == "":
        return None
    try:
        entries = value.split(",") if isinstance(value, str) else value
        sizes = tuple(dict.fromkeys(size for entry in entries for size in _sizes(entry)))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(wanted) from None
    if not sizes or any(not 0 < side <= MAX_SIDE or side % SIDE_MULTIPLE for size in sizes for side in size):
        raise ValueError(wanted)
    return sizes


def _sizes(entry: Any) -> tuple[tuple[int, int], ...]:
    if isinstance(entry, str):
        text = entry.strip().lower()
        if text in SIZE_LISTS:
            return SIZE_LISTS[text]
        entry = text.split("x")
    height, width = entry
    return ((int(height), int(width)),)


def parse_urls(value: Any) -> tuple[str, ...]:
    """Return the URLs in "redis,file:///srv/old" or in a list, each once; none for an empty one."""
    urls = value.split(",") if isinstance(value, str) else value
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        raise ValueError("a list of `redis`, redis:// URLs and fsspec URLs, or one string with commas between them")
    return tuple(dict.fromkeys(url.strip() for url in urls if url.strip()))


class HttpKey(NamedTuple):
    """A caller's key, as `sdtpu_http_keys` has it.

    Attributes:
        name: of the caller.
        sha256: the hash of the key, in 64 hexadecimal digits.
        priorities: the most and the least urgent priority that the caller may ask for.
        max_jobs: how many unfinished jobs it may have; 0 for any number.
    """

    name: str
    sha256: str
    priorities: tuple[int, int]
    max_jobs: int


_HTTP_KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.@-]{0,63}):([0-9a-f]{64})(?::([0-9])-([0-9]))?(?::([0-9]{1,9}))?")


def parse_http_keys(value: Any) -> tuple[HttpKey, ...]:
    """Return the keys in "shop:HASH:3-9:100,other:HASH" or in a list of such texts; none for an empty one."""
    entries = [entry for entry in value.split(",") if entry.strip()] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        raise ValueError(_KEYS_WANTED)
    keys = []
    for entry in entries:
        match = _HTTP_KEY.fullmatch(entry.strip()) if isinstance(entry, str) else None
        if match is None or int(match[3] or 0) > int(match[4] or 9):
            raise ValueError(_KEYS_WANTED)
        keys.append(HttpKey(match[1], match[2], (int(match[3] or 0), int(match[4] or 9)), int(match[5] or 0)))
    if len({key.sha256 for key in keys}) < len(keys):
        raise ValueError(f"{_KEYS_WANTED}; no key twice")
    return tuple(keys)


_KEYS_WANTED = (
    "`NAME:SHA256` with `:LOW-HIGH` for priorities from 0 to 9 and `:MAX_JOBS` after it, or several, with commas"
    " between them or in a list"
)


def parse_priorities(value: Any) -> tuple[int, int]:
    """Return the most and the least urgent priority of "6-9" or of a pair."""
    match = re.fullmatch(r"([0-9])-([0-9])", value) if isinstance(value, str) else None
    low, high = (int(match[1]), int(match[2])) if match else value if _is_pair(value) else (1, 0)
    if not 0 <= low <= high <= 9:
        raise ValueError("the most and the least urgent priority from 0 to 9, like '6-9' or (6, 9)")
    return low, high


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and [type(each) for each in value] == [int, int]


def parse_dotted_path(value: Any) -> str | None:
    """Return the path of a function like "shop.owners.find_owner", None where it is empty."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
        raise ValueError("the dotted path of a function, like 'shop.owners.find_owner'")
    return value


def parse_origins(value: Any) -> tuple[str, ...]:
    """Return the origins in "https://a.example,https://b.example" or in a list; none for an empty one."""
    origins = [origin.strip() for origin in value.split(",")] if isinstance(value, str) else value
    origins = [origin for origin in origins if origin] if isinstance(origins, list | tuple) else [None]
    if any(not isinstance(each, str) or not re.fullmatch(r"https?://[^/\s*?#]+", each) for each in origins):
        raise ValueError("origins like https://shop.example, with commas between them or in a list")
    return tuple(origins)
