"""What `accelerator.py` measured, as text: a table, and side by side what two parts measured of the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LOUD = """
************************************************************************************************************
*  A REHEARSAL. There is no accelerator here: the devices are simulated and share the CPU's cores.          *
*  The figures show that the benchmark runs. They say NOTHING about the speed of a TPU or a GPU.            *
************************************************************************************************************
"""


def to_text(found: Mapping[str, Any]) -> str:
    """Return the table of all parts."""
    return "\n".join(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    about = found["about"]
    loud = LOUD if about["rehearsal"] else ""
    yield loud
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield (
        f"{about['model']} on {about['num_devices']} x {about['device_kind']}, {about['date']}, Python"
        f" {about['python']}, {versions}"
    )
    yield "median (least – most of n runs); a device's times are without those of a tick without work"
    for part in found["parts"]:
        yield ""
        why = f": {part['reason']}" if part["reason"] else ""
        took = f", {part['wall_s']:.0f} s" if "wall_s" in part else ""
        yield f"{part['name']}: {part['status']}{took}{why}"
        for figure in part["figures"]:
            yield _line(figure)
    yield ""
    yield from _side_by_side(found["parts"])
    yield loud


def _line(figure: Mapping[str, Any]) -> str:
    spread = "" if figure["n"] == 1 else f" ({figure['low']:.4g} – {figure['high']:.4g} of {figure['n']})"
    name = " ".join(str(figure[key]) for key in ("name", "of", "way") if figure.get(key))
    more = ""
    if figure.get("gflop"):
        share = figure["share_of_peak"]
        of_peak = (
            "its peak is not known here" if share is None else f"{share:.1%} of {figure['peak_flops'] / 1e12:g} TFLOP/s"
        )
        more = f"; {figure['gflop']:g} GFLOP, {of_peak}"
    return f"  {name:<74} {figure['median']:>9.4g} {figure['unit']}{spread}{more}"


def _side_by_side(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield by slots how long a step and a decode take here and in diffusers, whose faster way counts."""
    titled = False
    for ours in parts:
        theirs = next((p for p in parts if p["kind"] == "diffusers" and p["slots"] == ours["slots"]), None)
        if ours["kind"] != "engine" or theirs is None:
            continue
        for name in ("a step of one image", "a decode"):
            mine = [figure for figure in ours["figures"] if figure["name"] == name]
            fastest = min(
                (figure for figure in theirs["figures"] if figure["name"] == name),
                key=lambda figure: figure["median"],
                default=None,
            )
            if not mine or fastest is None:
                continue
            if not titled:
                yield "ms of one device for one image, beside diffusers in PyTorch (the faster of its ways)"
                titled = True
            ratio = fastest["median"] / mine[0]["median"]
            yield (
                f"  {ours['slots']} slots, {name:<22}{mine[0]['median']:>9.4g}  diffusers {fastest['median']:>9.4g}"
                f" ({fastest['way']})  {ratio:.2f} times"
            )
