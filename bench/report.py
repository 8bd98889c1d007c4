"""Reports: JSON with everything, a Markdown table to read, a picture. They only read what was measured."""

from __future__ import annotations

import json
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
                r["contestant"],
                f"{r['forward_ms']:.3g}",
                f"{r['training_ms']:.3g}",
                f"{b['forward_ms'] / r['forward_ms']:.2f} / {b['training_ms'] / r['training_ms']:.2f}",
                f"{100 * r['share_of_peak']:.0f}%",
                f"{r['kept_mib']:.1f}",
                "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}",
            )
        )
    return table


def markdown(results: dict) -> str:
    """The table, and a line that says where it was measured."""
    table = [COLUMNS, ["---"] * len(COLUMNS), *rows(results)]
    if results["device_type"] == "cpu":
        table = [row[:-1] for row in table]  # GPU memory
    lines = ["| " + " | ".join(row) + " |" for row in table]
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in results["peak_tflops"].items())
    where = f"{results['device']}" + (f", {results['threads']} threads" if results["device_type"] == "cpu" else "")
    lines += [
        "",
        f"{where}; torch {results['torch']}; medians, by turns in one run. "
        f"Peak rate: {rates} (the better of a large matrix product and a large convolution).",
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Bars of training time for each workload and dtype, relative to the usual loop.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    groups = list(dict.fromkeys((r["workload"], r["dtype"]) for r in results["records"]))
    names = list(dict.fromkeys(r["contestant"] for r in results["records"]))
    figure = Figure(figsize=(1.5 + 2.2 * len(groups), 4.5), layout="constrained")
    axes = figure.subplots()
    times = {(r["workload"], r["dtype"], r["contestant"]): r["training_ms"] for r in results["records"]}
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        heights = [times[(*g, BASELINE)] / times[(*g, name)] if (*g, name) in times else 0 for g in groups]
        places = [x + k * width for x in range(len(groups))]
        bars = axes.bar(places, heights, width, label=name, color="0.7" if name == BASELINE else None)
        labels = [f"{times[(*g, name)]:.3g}" if (*g, name) in times else "" for g in groups]
        axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], [f"{w}\n{d}" for w, d in groups])
    axes.set_ylabel(f"speed-up over the {BASELINE}")
    axes.set_title(f"forward + backward on {results['device']} (numbers: ms)", fontsize=10)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def write(results: dict, folder: Path) -> list[Path]:
    """``<device>.json``, ``.md`` and ``.png`` in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    device = results["device"] if results["device_type"] == "cuda" else "cpu"
    stem = "-".join(device.lower().replace("/", " ").split())
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(markdown(results))
    plot(results, paths[2])
    return paths


def stale(report: Path, kernels: str | None) -> str | None:
    """Why a committed report no longer belongs to the code, or None if it does."""
    measured = json.loads(report.read_text())["kernels"]
    if kernels is not None and measured != kernels:
        return (
            f"{report.name} was measured on kernels {measured}, the code has {kernels}: run `mkconvlstm bench --report`"
        )
    return None
