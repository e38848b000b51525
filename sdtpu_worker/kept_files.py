"""Files that one process keeps for the next one: whole or not there, and named by what they depend on."""

from __future__ import annotations

import importlib.metadata
import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader never sees half of it; one that is there is replaced.

    Nobody but its owner may write it. After a power loss it may be gone or empty: for what can be made again.

    Args:
        path: of the file, whose folder is there.
        data: what is written.

    Raises:
        OSError: it cannot be written.
    """
    half = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o644), "wb") as file:
            file.write(data)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
