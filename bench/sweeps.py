"""How time grows with steps, batch, hidden channels and image size, around one workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

import torch

from . import measure
from .contestants import BASELINE
from .precision import Precision
from .workloads import Workload

BASE = Workload("sweep", 8, 10, 32, 32, 32, {3: 32, 5: 32}, "sweeps")
BASE_CPU = Workload("sweep", 1, 5, 8, 16, 16, {3: 8, 5: 8}, "sweeps")
AXES = {
    "T, steps": ((5, 10, 20, 50, 100), lambda w, n: replace(w, steps=n)),
    "B, batch": ((1, 2, 8, 32), lambda w, n: replace(w, batch=n)),
    "F, hidden channels": ((16, 64, 128, 256), lambda w, n: replace(w, kernels=dict.fromkeys(w.kernels, n // 2))),
    "H = W, image size": ((8, 16, 32, 64, 96), lambda w, n: replace(w, height=n, width=n)),
}


def points(base: Workload) -> Iterator[tuple[str, int, Workload]]:
    """(axis, value, workload): ``base`` with one size changed at a time."""
    for axis, (values, change) in AXES.items():
        for value in values:
            yield axis, value, change(base, value)


def run(
    device: torch.device, precision: Precision, seconds: float, progress: Callable[[str], None] = lambda line: None
) -> list[dict]:
    """A record for every point and for the usual loop, the best loop and ours; checked against float64 first."""
    gpu = device.type == "cuda"
    records = []
    for axis, value, workload in points(BASE if gpu else BASE_CPU):
        progress(f"sweep: {axis} = {value}")
        timed = measure.run_workload(workload, device, precision, 1.0, seconds, only=is_shown)
        records += [{"axis": axis, "value": value, **asdict(r)} for r in timed]
    return records


def is_shown(contestant: str) -> bool:
    """Whether a contestant is worth a line."""
    graphed = not torch.cuda.is_available() or "CUDA graph" in contestant
    return contestant == BASELINE or (graphed and "recompute" not in contestant)
