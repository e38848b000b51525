"""What a worker asks of a store below an fsspec URL: that it can be written, and that browsers know its types."""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdtpu_worker.images.decode import CONTENT_TYPES

logger = logging.getLogger(__name__)

_PROBE = "_sdtpu-probe"
"""The name of what is written at the start; no image has it."""
_CONTENT_TYPE_OPTIONS = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}
"""How a file system's `pipe_file` wants to be told the content type, by protocol; others have none or guess it."""


def type_options(fs: Any, path: str) -> dict[str, str]:
    """Return the options with which `fs.pipe_file` stores an image so that it is served with its content type."""
    content_type = CONTENT_TYPES.get(path.rpartition(".")[2])
    option = next((_CONTENT_TYPE_OPTIONS[name] for name in _protocols(fs) if name in _CONTENT_TYPE_OPTIONS), None)
    return {option: content_type} if option and content_type else {}


def make_writable(fs: Any, root: str, make_root: Callable[[], None], write: Callable[[str, bytes], None]) -> None:
    """Make a store's folder or bucket if that is possible, and prove that images can be written into it.

    The right to make a bucket is not needed where there is one already.

    Args:
        fs: the file system.
        root: the folder.
        make_root: makes the folder.
        write: writes a file at a path.

    Raises:
        ValueError: what is written here is in this process only.
        Exception: of any kind, since every file system has its own: a file cannot be written.
    """
    if "memory" in _protocols(fs):
        raise ValueError("a store in memory cannot be read by other processes")
    failure: Exception | None = None
    try:
        make_root()
    except Exception as exc:
        failure = exc
    probe = f"{root}/{_PROBE}"
    try:
        write(probe, b"")
    except Exception as exc:
        raise failure or exc from None
    with contextlib.suppress(Exception):  # without the right to delete, one empty file stays
        fs.rm_file(probe)
    if "file" in _protocols(fs) and not Path(root).stat().st_mode & stat.S_IXOTH:
        logger.warning(
            "only the worker's user, or its group, can read the images in %s; a web process of another user cannot:"
            " chmod o+rx the folder", root,
        )  # fmt: skip


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
