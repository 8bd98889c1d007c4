"""What the tests of the Triton backend share: shapes to plan for, problems to run, marks, how results are judged."""

from __future__ import annotations

import pytest
import torch
from problems import PROBLEMS, Problem

from mkconvlstm_cuda import Branch

triton = pytest.importorskip("triton")
launch = pytest.importorskip("mkconvlstm_cuda.triton_kernels.launch")
plan = launch.plan

INTERPRETED = launch.INTERPRETED
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_kernels_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]

PAPER = plan.Problem(10, 14, 14, (plan.Kernel(128, 3, 3), plan.Kernel(128, 5, 5)), 2, True)
RADAR = plan.Problem(4, 96, 96, (plan.Kernel(32, 3, 3), plan.Kernel(32, 5, 5)), 2, True)
SMALL = plan.Problem(1, 32, 32, (plan.Kernel(32, 3, 3), plan.Kernel(32, 5, 5)), 2, True)
ODD = plan.Problem(3, 13, 7, (plan.Kernel(5, 1, 3), plan.Kernel(40, 7, 5, (2, 1)), plan.Kernel(1, 1, 1)), 4, True)
EXACT = plan.Problem(2, 9, 9, (plan.Kernel(12, 3, 3),), 4, False)
PLANS = {"paper": PAPER, "radar": RADAR, "small": SMALL, "odd": ODD, "exact": EXACT}
DEVICES = {"H100": (132, 232448), "A100": (108, 166912), "consumer": (36, 101376)}

REFUSED = {
    "bottleneck and dilation": "bottleneck",
    "recompute, bottleneck": "bottleneck",
    "mix gate": "mix",
    "mix gate, tanh": "mix",
    "mix full": "mix",
    "mix full, tanh": "mix",
    "recompute, mix, peephole": "mix",
    "group norm": "norm",
    "layer norm": "norm",
    "batch norm": "norm",
    "layer norm by pixel": "norm",
    "norm of the gates": "norm",
    "inception": "norm",
    "pool": "pool",
}
SERVED = [name for name in PROBLEMS if name not in REFUSED] + ["dilation"]
PROBLEMS_HERE = PROBLEMS | {"dilation": Problem([Branch(1, 1), Branch(3, 2, dilation=2)])}


LARGE = {
    "paper": Problem({3: 128, 5: 128}, batch=3, steps=5, channels=16, size=(14, 14)),
    "odd": Problem(
        {3: 24, (5, 7): 40}, {"peephole": "channel"}, (7, 1, 4), batch=3, steps=7, channels=3, size=(13, 37)
    ),
    "many tiles": Problem({3: 32, 5: 32}, batch=5, steps=2, channels=4, size=(96, 90), state=False),
    "long": Problem({3: 8, 5: 8}, batch=2, steps=100, channels=4, size=(10, 10)),
    "one pixel": Problem({1: 64}, batch=1, steps=4, channels=4, size=(1, 1)),
}


def worst(results, exact) -> float:
    return max(float((r.double() - exact[n]).norm() / exact[n].norm().clamp(min=1e-30)) for n, r in results.items())


def assert_as_close(problem: Problem, dtype: torch.dtype, device="cpu", floor: float = 1e-6) -> None:
    """At most twice as far from float64 as ``aten``, torch's own arithmetic, in the same dtype."""
    exact = problem.run("reference", device=device)
    torchs, ours = (problem.run(backend, dtype, device) for backend in ("aten", "triton"))
    assert worst(ours, exact) <= max(2 * worst(torchs, exact), floor)
