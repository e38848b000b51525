"""The report of `serving.py`: `table.md`, with the targets and where they are missed, and `serving.png`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving_run import Run
from benchmarks.serving_simulated import simulated_lines
from benchmarks.serving_systems import SYSTEMS

FIXED = ("fixed-bucketed", "fixed-mixed")
SAME_THROUGHPUT = 0.99
"""Of the other's: the jobs of a run that keeps up come at the same rate, only the last ones' way differs."""
_NUMBERS = ("throughput", "sustained", "mean_s", "p50_s", "p95_s", "p99_s", "occupancy", "waste", "backlog")
_HEADINGS = ("images/s", "mean, s", "p50, s", "p95, s", "p99, s", "occupancy", "waste", "backlog")


@dataclass(frozen=True)
class Cell:
    """A system at a load: medians over the repeats of `_NUMBERS`, and in how many of the repeats it kept up."""

    medians: Mapping[str, float]
    kept_up: int
    repeats: int

    @property
    def stable(self) -> bool:
        """It kept up in every repeat."""
        return self.kept_up == self.repeats

    def __getitem__(self, name: str) -> float:
        return self.medians[name]


@dataclass(frozen=True)
class Target:
    """`metric` of ours is to be at most `at_most` of that of the best of `rivals`, at equal or better throughput."""

    mix: str
    load: float
    metric: str
    rivals: tuple[str, ...]
    rival_name: str
    at_most: float


def _targets() -> Iterator[Target]:
    batches = ("celery-batches",)
    for load in (60.0, 80.0):
        yield Target("mixed", load, "mean_s", FIXED, "the best fixed batches'", 0.45)
        yield Target("mixed", load, "p99_s", FIXED, "the best fixed batches'", 0.5)
        yield Target("mixed", load, "mean_s", batches, "celery-batches'", 0.4)
        yield Target("mixed", load, "p99_s", batches, "celery-batches'", 0.4)
    for load in (60.0, 80.0):
        yield Target("equal", load, "mean_s", FIXED, "fixed batches'", 0.75)
        yield Target("equal", load, "p99_s", FIXED, "fixed batches'", 0.85)


Cells = dict[tuple[str, float | None, str], Cell]


def write_report(
    runs: Sequence[Run],
    about: Mapping[str, Any],
    config: Mapping[str, Any],
    limits: Mapping[str, float],
    out: Path,
) -> None:
    """Write `table.md` and `serving.png` into a folder."""
    cells = _cells(runs)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    step_ms = config["step_ms"]
    devices = f"of constant speed, {step_ms:g} ms a step" if step_ms else "as fast as the cores that they share"
    lines = [
        f"{about['date']}, {about['machine']}; {versions}. Eight simulated devices, {devices}. Medians of"
        f" {max(cell.repeats for cell in cells.values())} runs of {config['jobs']} jobs; latency from a job's scheduled"
        " arrival to its published result; backlog: jobs in the system at the last arrival.",
        "",
        *_tables(cells, limits),
        *_target_lines(cells),
        *_losses(cells),
        "",
        *simulated_lines(runs, config),
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    _plot(cells, limits, out / "serving.png")
    print(f"{out / 'table.md'}, {out / 'serving.png'}")


def _cells(runs: Sequence[Run]) -> Cells:
    groups: dict[tuple[str, float | None, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.mix, run.load, run.system].append(run)
    return {
        key: Cell(
            {name: median(getattr(run, name) for run in group) for name in _NUMBERS},
            sum(run.kept_up for run in group),
            len(group),
        )
        for key, group in groups.items()
    }


def _loads(cells: Cells, mix: str) -> list[float | None]:
    """Return the loads of a mix, all at once first."""
    found = {load for cell_mix, load, _ in cells if cell_mix == mix}
    return sorted(found, key=lambda load: -1.0 if load is None else load)


def _tables(cells: Cells, limits: Mapping[str, float]) -> Iterator[str]:
    for mix, limit in limits.items():
        yield f"### {_mix_name(mix)}: 100 % is {limit:.2f} images/s"
        yield ""
        yield f"| load | system | {' | '.join(_HEADINGS)} |"
        yield "|---|---|" + "---|" * len(_HEADINGS)
        for load in _loads(cells, mix):
            for name, system in SYSTEMS.items():
                if any(key[::2] == (mix, name) for key in cells):
                    yield f"| {_load_name(load)} | {system.label} | {_row(cells, mix, load, name)} |"
        yield ""


def _row(cells: Cells, mix: str, load: float | None, name: str) -> str:
    """Return a row's numbers; the latencies of a queue that grows would only say how long the run was."""
    cell, at_once = cells.get((mix, load, name)), cells.get((mix, None, name))
    if cell is None:
        reason = f"beyond its limit of {at_once['sustained']:.2f} images/s" if at_once else "not run"
        return " | ".join([reason, *[""] * (len(_HEADINGS) - 1)])
    throughput = f"{cell['throughput']:.2f}"
    backlog = f"{cell['backlog']:.0f}" if load is not None else ""
    if not cell.stable:
        fell_behind = f"fell behind in {cell.repeats - cell.kept_up} of {cell.repeats} runs"
        return " | ".join([throughput, fell_behind, *[""] * (len(_HEADINGS) - 3), backlog])
    latencies = [f"{cell[name]:.2f}" for name in ("mean_s", "p50_s", "p95_s", "p99_s")]
    shares = [f"{100 * cell[name]:.0f} %" for name in ("occupancy", "waste")]
    return " | ".join([throughput, *latencies, *shares, backlog])


def _target_lines(cells: Cells) -> Iterator[str]:
    yield "### Targets"
    yield ""
    yield "| | at most | measured | throughput, of theirs | met |"
    yield "|---|---|---|---|---|"
    for target in _targets():
        ours = cells.get((target.mix, target.load, "ours"))
        rivals = [cell for name in target.rivals if (cell := cells.get((target.mix, target.load, name)))]
        name = f"{_mix_name(target.mix)}, {target.load:.0f} %: {_metric_name(target.metric)}, of {target.rival_name}"
        if ours is None or not (rivals := [cell for cell in rivals if cell.stable] or rivals):
            continue
        ratio = ours[target.metric] / min(cell[target.metric] for cell in rivals)
        throughput = ours["throughput"] / max(cell["throughput"] for cell in rivals)
        met = ours.stable and ratio <= target.at_most and throughput >= SAME_THROUGHPUT
        behind = "" if any(cell.stable for cell in rivals) else " (they fell behind)"
        yield f"| {name} | {target.at_most} | {ratio:.2f}{behind} | {throughput:.2f} | {'yes' if met else '**no**'} |"
    for mix, load, system in cells:
        if load == 95 and system == "ours":
            cell = cells[mix, load, system]
            yield (
                f"| {_mix_name(mix)}, 95 %: the queue stays stable | | kept up in {cell.kept_up} of {cell.repeats},"
                f" {cell['backlog']:.0f} jobs there at the last arrival | | {'yes' if cell.stable else '**no**'} |"
            )
    yield ""


def _losses(cells: Cells) -> Iterator[str]:
    """Say at which loads another system, that kept up, had a better mean, p99 or throughput than ours."""
    yield "### Where it does not win"
    yield ""
    found = False
    for (mix, load, name), cell in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1] or 0, item[0][2])):
        ours = cells.get((mix, load, "ours"))
        if name == "ours" or ours is None or not cell.stable:
            continue
        better = [
            f"{_metric_name(metric)} {cell[metric]:.2f} s against {ours[metric]:.2f} s"
            for metric in ("mean_s", "p99_s")
            if load is not None and cell[metric] < ours[metric]
        ]
        if ours["throughput"] < SAME_THROUGHPUT * cell["throughput"]:
            better.append(f"{cell['throughput']:.2f} images/s against {ours['throughput']:.2f}")
        if better:
            found = True
            yield f"* {_mix_name(mix)}, {_load_name(load)}: {SYSTEMS[name].label} has {', '.join(better)}."
    if not found:
        yield "Nowhere in these runs: no other system that kept up had a better mean, p99 or throughput."


def _plot(cells: Cells, limits: Mapping[str, float], path: Path) -> None:
    """Draw mean and p99 latency against load; a system's line ends where it falls behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    metrics = ("mean_s", "p99_s")
    figure, axes = plt.subplots(
        len(metrics), len(limits), figsize=(5.2 * len(limits), 7), sharex=True, sharey="row", squeeze=False
    )
    for row, metric in enumerate(metrics):
        for axis, mix in zip(axes[row], limits, strict=True):
            for colour, (name, system) in enumerate(SYSTEMS.items()):
                points = [
                    (load, cells[mix, load, name][metric])
                    for load in _loads(cells, mix)
                    if load is not None and (mix, load, name) in cells and cells[mix, load, name].stable
                ]
                style = {"linewidth": 2.4, "zorder": 3} if name == "ours" else {"linewidth": 1.4}
                axis.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=f"C{colour}",
                          label=system.label, markersize=4, **style)  # fmt: skip
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 100 else ""))
            axis.tick_params(axis="y", which="minor", labelsize=7)
            axis.grid(which="both", alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(f"{_mix_name(mix)} (100 % = {limits[mix]:.1f} images/s)", fontsize=10)
            if row == len(metrics) - 1:
                axis.set_xlabel("load, % of the limit")
                axis.set_xticks([load for load in _loads(cells, mix) if load is not None])
            if axis is axes[row][0]:
                axis.set_ylabel(f"{_metric_name(metric)} latency, s")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mix_name(mix: str) -> str:
    return {"equal": "all 30 steps", "mixed": "10, 20, 30, 50 steps mixed"}[mix]


def _load_name(load: float | None) -> str:
    return "all at once" if load is None else f"{load:.0f} %"


def _metric_name(metric: str) -> str:
    return metric.removesuffix("_s")
