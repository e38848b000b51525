"""Check a built wheel: it holds the package, all of it and nothing else, and works where only the wheel is.

    python -m pip wheel --no-deps --wheel-dir /tmp/wheel . && python scripts/check_wheel.py /tmp/wheel/*.whl

Run it from the repository's top level; `scripts/check wheel` does both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "sdtpu_worker"
LOAD = f"""
import {PACKAGE}
from {PACKAGE}.diffusion.checkpoint import LoadOptions, load_checkpoint
assert {PACKAGE}.__file__.startswith({{folder!r}}), {PACKAGE}.__file__
for name in ("embedded", "embedded-turbo"):
    load_checkpoint(name, options=LoadOptions(loras={{{{"outline": "embedded-outline"}}}}))
"""


def find_differences(wheel: Path) -> list[str]:
    """Return one line for each file that the wheel lacks or has too many, compared with the tree."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        licences = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    files = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    differences = [f"the wheel lacks {name}" for name in sorted(expected - packed)]
    differences += [f"the wheel must not hold {name}" for name in sorted(packed - expected)]
    return differences if licences else [*differences, "the wheel lacks the file LICENSE"]


def load_from(wheel: Path) -> list[str]:
    """Unpack the wheel elsewhere, load its checkpoints and LoRA from there; return the error, if there is one."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        run = subprocess.run(
            [sys.executable, "-c", LOAD.format(folder=folder)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
    return [f"the wheel's package does not work by itself:\n{run.stderr}"] if run.returncode else []


def main(wheel: Path) -> None:
    """Print what is wrong with a wheel and exit with 1, or say that nothing is."""
    faults = find_differences(wheel) + load_from(wheel)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, the package and nothing else; loads its checkpoints")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python scripts/check_wheel.py WHEEL, got {len(sys.argv) - 1} arguments")
    main(Path(sys.argv[1]).resolve())
