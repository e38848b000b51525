"""JAX's persistent compilation cache, set up to keep every program, and counts of what JAX compiles in this process.

JAX has one compilation cache and one registry of listeners for the whole process. Settings of the cache stay when an
object here is closed; its listener is unregistered.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Self

import jax

logger = logging.getLogger(__name__)

COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
"""Variables of the environment that decide what the compiler makes of a program, and how it rounds."""
PROGRAMS = "programs"
"""The folder of whole programs in that of the cache."""
_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


def cache_folder(setting: str) -> Path | None:
    """Return the folder that `sdtpu_compile_cache` means: `auto` for the user's cache folder; None for `off`."""
    if setting == "off":
        return None
    if setting == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdtpu_worker" / "xla"
    return Path(setting).expanduser()


class CompileCache:
    """Sets up the cache, and counts its hits and misses in this process until it is closed.

    Args:
        folder: where compiled programs are kept; `auto` for the user's cache folder, `off` for nowhere.
        keep_programs: keep programs also whole; see `kept_programs.py`.
        ahead: a folder of whole programs that were made ahead, which is only read; None for none.

    Attributes:
        path: the folder; None if compiled programs are not kept.
        programs: the folder of whole programs; None if they are not kept.
        ahead: as given.
    """

    def __init__(self, folder: str, keep_programs: bool = True, ahead: Path | None = None) -> None:
        self.ahead = ahead
        self._lock, self._counts = threading.Lock(), {_HIT: 0, _MISS: 0}  # programs are compiled in several threads
        self._of_thread = threading.local()
        self.path: Path | None = None
        self.programs: Path | None = None
        path = cache_folder(folder)
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            logger.warning(
                "compiled programs are not kept, every start compiles them again: sdtpu_compile_cache must be a folder"
                " that can be written: %s",
                exc,
            )
            return
        self.path, self.programs = path, path / PROGRAMS if keep_programs else None
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.monitoring.register_event_listener(self._on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting; the cache stays on."""
        if self.path is not None:
            jax.monitoring.unregister_event_listener(self._on_event)

    def counts(self) -> tuple[int, int]:
        """Return `(hits, misses)` so far."""
        with self._lock:
            return self._counts[_HIT], self._counts[_MISS]

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return `(hits, misses)` since an earlier `counts()`."""
        hits, misses = self.counts()
        return hits - before[0], misses - before[1]

    def was_hit(self) -> bool:
        """Return whether the program that the calling thread compiled last came from the cache."""
        return getattr(self._of_thread, "event", _MISS) == _HIT

    def _on_event(self, event: str, **_: object) -> None:
        if event in self._counts:
            self._of_thread.event = event
            with self._lock:
                self._counts[event] += 1


class TraceCounter:
    """Counts what JAX traces or compiles in this process, until it is closed."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def count(self) -> int:
        """Return how many traces and compilations there were since the start or the last `restart`."""
        return self._count

    def restart(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._count = 0

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, _: float, **__: object) -> None:
        if "jaxpr_trace" in event or "backend_compile" in event:
            with self._lock:
                self._count += 1
