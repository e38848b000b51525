"""Keep what was compiled, by a fingerprint of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdtpu_worker.kept_files import package_versions, write_whole
from sdtpu_worker.planning.compile_ahead import Wanted

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax")
_SOURCES = (
    "diffusion/**/*.py", "models/**/*.py", "aggregator/plan.py", "contract/request.py", "planning/hlo*.py",
    "planning/compile_ahead.py", "planning/memory_report.py", "planning/kernels.py", "planning/chips.py",
)  # fmt: skip
_VERSION = 1


class ResultsCache:
    """A folder of JSON files. A file that is damaged, or of something else, counts as none.

    Args:
        folder: for the files; None for a cache that keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def read(self, key: str) -> dict[str, Any] | None:
        """Return what was kept under a key."""
        if self._folder is None:
            return None
        try:
            kept = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            facts = kept["facts"]
            whole = kept["key"] == key and kept["digest"] == _digest(facts) and isinstance(facts, dict)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return facts if whole else None

    def write(self, key: str, facts: dict[str, Any]) -> None:
        """Keep facts, whole or not at all; a folder that cannot be written keeps nothing."""
        if self._folder is None:
            return
        text = json.dumps({"key": key, "digest": _digest(facts), "facts": facts})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / f"{key}.json", text.encode())
        except OSError:
            return


def fingerprint(wanted: Wanted, full: bool) -> str:
    """Return what tells a compile from others: the setting, the model's configs, versions, this package's source."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    versions = package_versions(_PACKAGES)
    digest.update(json.dumps([_VERSION, asdict(wanted), full, versions], sort_keys=True).encode())
    sources = [path for pattern in _SOURCES for path in sorted(package.glob(pattern))]
    folder = Path(wanted.model).expanduser()
    configs = sorted(folder.glob("*.json")) + sorted(folder.glob("*/*.json")) if folder.is_dir() else []
    for _, controlnet in wanted.controlnets:
        configs += sorted(Path(controlnet).expanduser().glob("*.json")) if controlnet else []
    for path in (*sources, *configs):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def default_folder() -> Path:
    """Return the user's cache folder for plans."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdtpu_worker" / "plan"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
