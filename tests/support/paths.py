"""Folders that tests need by name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
"""The checkout."""
XLA_CACHE = os.environ.get("SDTPU_TEST_COMPILE_CACHE") or str(Path(tempfile.gettempdir()) / "sdtpu-worker-test-xla")
"""Where tests, and the workers that they start, keep compiled programs."""
