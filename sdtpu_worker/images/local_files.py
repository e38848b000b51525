"""Files on a local disk that are whole after a crash of the process, and still there after a power loss."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write_durably(target: Path, data: bytes) -> None:
    """Write a file so that a reader never sees half of it, and that it is on the disk when this returns.

    The data are written beside the target and flushed to the disk before the file gets its name: a name may reach the
    disk earlier than data that nobody flushed, and after a power loss the file would be empty. The image's job is
    acknowledged next, and never runs again.

    Args:
        target: the file; one that is there is replaced.
        data: what is written.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: the file cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
            _sync_folder(target.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def read_plainly(path: Path, most: int | None = None) -> bytes:
    """Return what a regular file holds.

    Args:
        path: of the file; its last part may not be a symbolic link, which could lead anywhere.
        most: bytes to read; None for all.

    Raises:
        PermissionError: it is a link, or no regular file.
        OSError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block for ever
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise PermissionError(errno.EPERM, "a symbolic link is not followed", str(path)) from exc
        raise
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise PermissionError(errno.EPERM, "not a regular file", str(path))
        return file.read(-1 if most is None else most)


def make_folder_durably(folder: Path) -> None:
    """Make a folder, with those above it, so that it is on the disk when this returns; one that is there stays.

    Raises:
        OSError: the folder cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync_folder(each.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can do that for a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(handle)
