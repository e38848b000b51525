"""JAX's persistent compilation cache, set up so that every program is kept, and counted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


class CompileCache:
    """Counts the cache's hits and misses in this process.

    Args:
        folder: where compiled programs are kept; `auto` for the user's cache folder, `off` for nowhere.
    """

    def __init__(self, folder: str) -> None:
        self._counts = {_HIT: 0, _MISS: 0}
        self.path: Path | None = None
        if folder == "off":
            return
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.path = Path(base if folder == "auto" else folder).expanduser()
        if folder == "auto":
            self.path = self.path / "sdtpu_worker" / "xla"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            logger.warning("compiled programs are not kept, every start compiles anew: %s", exc)
            self.path = None
            return
        jax.config.update("jax_compilation_cache_dir", str(self.path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.monitoring.register_event_listener(self._on_event)

    def counts(self) -> tuple[int, int]:
        """Return `(hits, misses)` so far."""
        return self._counts[_HIT], self._counts[_MISS]

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return `(hits, misses)` since an earlier `counts()`."""
        hits, misses = self.counts()
        return hits - before[0], misses - before[1]

    def _on_event(self, event: str, **_: object) -> None:
        if event in self._counts:
            self._counts[event] += 1


class TraceCounter:
    """Counts what JAX traces or compiles in this process from its making on."""

    _events = 0
    _listens = False

    def __init__(self) -> None:
        if not TraceCounter._listens:
            TraceCounter._listens = True
            jax.monitoring.register_event_duration_secs_listener(TraceCounter._on_event)
        self._before = TraceCounter._events

    def count(self) -> int:
        """Return how many events there were."""
        return TraceCounter._events - self._before

    @staticmethod
    def _on_event(event: str, _: float, **__: object) -> None:
        if "jaxpr_trace" in event or "backend_compile" in event:
            TraceCounter._events += 1
