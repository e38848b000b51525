"""The JSON files of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdtpu_worker.errors import InvalidCheckpoint


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InvalidCheckpoint: the file is missing, cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
