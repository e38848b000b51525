"""What a compile for a chip finds, as `sdtpu_worker.planning` passes it on: made up, so that the figures are known."""

from __future__ import annotations

from sdtpu_worker.planning.chips import CHIPS, GIB

V5E = CHIPS["v5e"]
WEIGHTS, MORE = 1_638_000_000, 819_000_000  # bytes: 2 ms and 1 ms of a v5e's bandwidth


def work(hbm_bytes: int, cycles: int = 0, kernel_cycles: int = 0) -> dict:
    facts = {"hbm_bytes": hbm_bytes, "cycles": cycles, "kernel_cycles": kernel_cycles}
    return facts | {"kernels": 0, "loops_of_unknown_length": 0}


def facts(slots: int = 1, temp: int = GIB, cycles: int = 0, kernel_cycles: int = 0) -> dict:
    """What a compile of a model says whose step reads its weights, and moves 1 ms of other bytes for each slot."""
    parts = {name: work(0) for name in ("tick", "phase", "insert", "decode", "picture", "windows", "control")}
    parts["step"] = work(WEIGHTS + slots * MORE, cycles, kernel_cycles)
    program = {"code_bytes": None, "collectives": {}, "aliased": 12, "argument_bytes": 2 * GIB, "temp_bytes": temp}
    small = program | {"parts": {"all": work(0)}, "temp_bytes": 0, "total_bytes": 0}
    matmuls = {
        "step": [[128, 128, 128, slots]], "insert": [], "decode": [[128, 128, 128, 7]], "picture": [],
        "windows": [[128, 128, 128, slots]], "control": [[128, 128, 128, 9 * slots]],
    }  # fmt: skip
    return {
        "num_devices": 8, "resolution": [512, 512], "rows_per_job": 2, "unet_bytes": WEIGHTS, "slot_bytes": 0,
        "bank_bytes": 0, "entry_bytes": 0, "donated": 12, "fits": True, "reason": None, "code_generated": False,
        "time_limit_passed": False,
        "prompt_windows": 3, "controlnets": [], "controlnet_bytes": 0, "in_tiles": False,
        "matmuls": matmuls, "matmuls_on_chip": matmuls, "kernels": {},
        "programs": {"tick": program | {"parts": parts, "total_bytes": 2 * GIB + temp}, "snapshot": small},
    }  # fmt: skip
