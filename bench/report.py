"""Reports: JSON with everything, a Markdown table to read, a picture. They only read what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from .contestants import BASELINE

COLUMNS = (
    "workload",
    "dtype",
    "layer",
    "forward, ms",
    "forward + backward, ms",
    "speed-up",
    "of peak rate",
    "kept for backward, MiB",
    "peak in training, MiB",
    "GPU busy",
)


def rows(results: dict) -> list[tuple[str, ...]]:
    """One row for each record, in :data:`COLUMNS`; the speed-up is over the usual loop, forward / with backward."""
    base = {(r["workload"], r["dtype"]): r for r in results["records"] if r["contestant"] == BASELINE}
    table = []
    for r in results["records"]:
        b = base[r["workload"], r["dtype"]]
        table.append(
            (
                r["workload"],
                r["dtype"],
                label(r),
                f"{r['forward_ms']:.3g}",
                f"{r['training_ms']:.3g}",
                f"{b['forward_ms'] / r['forward_ms']:.2f} / {b['training_ms'] / r['training_ms']:.2f}",
                f"{100 * r['share_of_peak']:.0f}%",
                f"{r['kept_mib']:.1f}",
                "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
                "" if r["gpu_busy"] is None else f"{100 * r['gpu_busy']:.0f}%",
            )
        )
    return table


def label(record: dict) -> str:
    """A contestant's name, with the time to compile it where that is long."""
    name = record["contestant"]
    return f"{name} ({record['setup_s']:.0f} s to compile)" if "torch.compile" in name else name


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def markdown(results: dict) -> str:
    """The table, and a line that says where it was measured."""
    table = [COLUMNS, ["---"] * len(COLUMNS), *rows(results)]
    if results["device_type"] == "cpu":
        table = [row[:-2] for row in table]  # GPU memory and time
    lines = list(map(line, table))
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in results["peak_tflops"].items())
    where = f"{results['device']}" + (f", {results['threads']} threads" if results["device_type"] == "cpu" else "")
    driver = f", driver {results['driver']}" if results["driver"] else ""
    lines += [
        "",
        f"{where}; torch {results['torch']}{driver}; kernels {results['kernels']}; medians, by turns in one run. "
        f"Peak rate: {rates} (the better of a large matrix product and a large convolution).",
    ]
    if alone := results.get("hidden_convolutions_us"):
        shown = ", ".join(f"{name} {time:.1f}" for name, time in alone.items())
        lines += ["", f"cuDNN's hidden convolutions of one step alone, in a CUDA graph, us: {shown}."]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Bars of training time for each workload and dtype, relative to the usual loop; peers in grey.

    Raises:
        ImportError: matplotlib is missing.
    """
    groups = list(dict.fromkeys((r["workload"], r["dtype"]) for r in results["records"]))
    names = list(dict.fromkeys(r["contestant"] for r in results["records"]))
    peers = [name for name in names if not name.startswith("ours")]
    colors = {name: str(0.85 - 0.6 * k / len(peers)) for k, name in enumerate(peers)}
    figure, (axes,) = new_figure(1.5 + 2.2 * len(groups), 5.5)
    times = {(r["workload"], r["dtype"], r["contestant"]): r["training_ms"] for r in results["records"]}
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [times[(*g, BASELINE)] / times[(*g, name)] if (*g, name) in times else math.nan for g in groups]
        places = [x + k * width for x in range(len(groups))]
        bars = axes.bar(places, heights, width, label=name, color=colors.get(name))
        labels = [f"{times[(*g, name)]:.3g}" if (*g, name) in times else "" for g in groups]
        axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
    for x, (workload, dtype) in enumerate(groups):  # what the chip could do
        share = next(r for r in results["records"] if (r["workload"], r["dtype"]) == (workload, dtype))
        best = times[workload, dtype, BASELINE] / (share["share_of_peak"] * share["training_ms"])
        label = "all convolutions at the chip's peak rate" if x == 0 else None
        axes.hlines(best, x - width / 2, x + 0.8 - width / 2, color="black", linestyle=":", label=label)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], [f"{w}\n{d}" for w, d in groups])
    axes.set_ylabel(f"speed-up over the {BASELINE}")
    axes.set_title(f"forward + backward on {results['device']} (numbers: ms)", fontsize=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, 2 * top)  # room for the numbers
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=150)


def plot_sweeps(sweeps: list[dict], path: Path) -> None:
    """Training time against each axis of :mod:`sweeps`, a panel each. Raises as :func:`plot`."""
    axes_names = list(dict.fromkeys(r["axis"] for r in sweeps))
    figure, panels = new_figure(3.4 * len(axes_names), 3.6, len(axes_names))
    for axis, panel in zip(axes_names, panels, strict=True):
        for name in dict.fromkeys(r["contestant"] for r in sweeps):
            line = [(r["value"], r["training_ms"]) for r in sweeps if (r["axis"], r["contestant"]) == (axis, name)]
            panel.plot(*zip(*line, strict=True), marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axis)
    panels[0].set_ylabel("forward + backward, ms")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def new_figure(width: float, height: float, panels: int = 1):
    """A figure and its axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def write(results: dict, folder: Path) -> list[Path]:
    """``<device>.json``, ``.md`` and ``.png`` in ``folder``, with sweeps another; returns their paths.

    A GPU's table ends with what sanitizers have said, where ``folder`` knows: see :mod:`sanitize`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = results["device"] if results["device_type"] == "cuda" else "cpu"
    stem = "-".join(device.lower().replace("/", " ").split())
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    sanitizers = folder / "sanitizers.md"
    found = sanitizers.read_text() if results["device_type"] == "cuda" and sanitizers.exists() else None
    paths[1].write_text(markdown(results) + (f"\nUnder sanitizers:\n\n{found}" if found else ""))
    plot(results, paths[2])
    if results.get("sweeps"):
        paths.append(folder / f"{stem}-sweeps.png")
        plot_sweeps(results["sweeps"], paths[-1])
    return paths


def stale(report: Path, kernels: str | None) -> str | None:
    """Why a committed report, or what sanitizers said, no longer belongs to the code, or None if it does."""
    found = json.loads(report.read_text())
    measured = {found["kernels"]} if "kernels" in found else {verdict["kernels"] for verdict in found.values()}
    if kernels is None or measured == {kernels}:
        return None
    command = "mkconvlstm bench --report" if "kernels" in found else "make sanitize"
    return f"{report.name} is of kernels {', '.join(sorted(measured))}, the code has {kernels}: run `{command}`"
