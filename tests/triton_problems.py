"""What the tests of the Triton backend share: shapes to plan for, problems to run, marks, how results are judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import PROBLEMS, Problem

from mkconvlstm_cuda import Branch, aten
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights

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
PLANS |= {f"{name}, mix gate": replace(p, mix=4) for name, p in PLANS.items()} | {
    f"{name}, mix full": replace(p, mix=1) for name, p in PLANS.items()
}
DEVICES = {"H100": (132, 232448), "A100": (108, 166912), "consumer": (36, 101376)}

REFUSED = {
    "bottleneck and dilation": "bottleneck",
    "recompute, bottleneck": "bottleneck",
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


def paper(**options) -> Problem:
    return Problem({3: 128, 5: 128}, options, batch=3, steps=5, channels=16, size=(14, 14))


def odd(**options) -> Problem:
    return Problem({3: 24, (5, 7): 40}, options, (7, 1, 4), batch=3, steps=7, channels=3, size=(13, 37))


def many_tiles(**options) -> Problem:
    return Problem({3: 32, 5: 32}, options, batch=5, steps=2, channels=4, size=(96, 90), state=False)


LARGE = {
    "paper": paper(),
    "paper, mix gate": paper(mix="gate"),
    "paper, mix full, tanh": paper(mix="full", mix_activation="tanh"),
    "odd": odd(peephole="channel"),
    "odd, mix gate, tanh": odd(peephole="channel", mix="gate", mix_activation="tanh"),
    "odd, mix full": odd(mix="full"),
    "many tiles": many_tiles(),
    "many tiles, mix gate, tanh": many_tiles(mix="gate", mix_activation="tanh"),
    "long": Problem({3: 8, 5: 8}, batch=2, steps=100, channels=4, size=(10, 10)),
    "one pixel": Problem({1: 64}, batch=1, steps=4, channels=4, size=(1, 1)),
}


def check_biases_around_a_mix(groups: int, tanh: bool, device) -> None:
    """As folded norms leave them; from zeros, so that they alone are U(h_{-1}). Against ``aten``, in float32."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    batch, steps, hidden, height, width = shape = 2, 3, 5, 3, 4
    branches = (
        BranchWeights(randn(8, hidden, 1, 1) / 3),
        BranchWeights(randn(12, hidden, 3, 3) / 6, randn(12)),
    )
    w = TransitionWeights(branches, randn(4 * hidden, 4 * hidden // groups, 1, 1) / 4, randn(4 * hidden), tanh)
    z, bias, dh = randn(steps, batch, height, width, 4 * hidden), randn(4 * hidden), randn(*shape)
    ours, theirs = ([t.clone().permute(1, 0, 4, 2, 3)] for t in (z, z + bias))
    h, c = launch.forward(ours, w, None, None, None, "previous", True, bias)
    wanted_h, wanted_c = aten.forward(theirs, w, None, None, None, "previous", True)
    arguments = (None, None, None, "previous", dh, None, None)
    _, dc_0 = launch.backward(ours, h, c, w, *arguments)
    _, wanted_dc_0 = aten.backward(theirs, wanted_h, wanted_c, w, *arguments)
    for got, wanted in ((h, wanted_h), (c, wanted_c), (dc_0, wanted_dc_0), (ours[0], theirs[0])):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
