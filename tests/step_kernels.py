"""What the tests of kernels with one step a launch share: problems, and the kernels compiled for a CPU."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, Problem

from mkconvlstm_cuda import Branch, cuda_backend, dispatch

# Many channels, more pixels than a block, odd sizes, kernels wider than the image, three branches out of order.
LARGER = {
    "many channels": Problem({3: 70, 1: 3}, batch=1, steps=2, size=(3, 5)),
    "many pixels": Problem({3: 2, (5, 1): 3}, batch=3, steps=2, size=(11, 7)),
    "wider than the image": Problem([Branch(1, 2), Branch((3, 9), 1), Branch(3, 17, dilation=3)], size=(2, 3)),
    "slices of depth": Problem({(1, 3): 20}, {"peephole": "channel", "output_peephole": "current"}, size=(1, 4)),
}
SERVED = {
    name: problem for name, problem in PROBLEMS.items()
    if not any(word in name for word in ("mix", "bottleneck", "norm", "inception", "pool", "mask", "two layers"))
} | LARGER  # fmt: skip
LARGE = {
    "paper": Problem({3: 128, 5: 128}, batch=3, steps=3, channels=8, size=(14, 14)),
    "odd": Problem(
        {3: 24, (5, 7): 40}, {"peephole": "channel"}, (5, 1, 4), batch=3, steps=5, channels=3, size=(13, 37)
    ),
    "one pixel": Problem({1: 65}, batch=1, steps=4, channels=4, size=(1, 1)),
}


def passes(problem):
    """How often ``problem`` goes through the recurrence: forward, again for recomputed gates, and backward."""
    directions = 2 if problem.options.get("bidirectional") else 1
    return directions * (3 if problem.options.get("recompute") else 2)


def build(family, directory):
    """csrc/FAMILY for the CPU."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++) found")
    here = Path(__file__).parent
    built = directory / f"lib{family}.so"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    include = ["-I", str(here.parent / "csrc")]
    subprocess.run([compiler, *options, *include, str(here / f"{family}_host.cpp"), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def array(values):
    return (ctypes.c_int64 * len(values))(*values)


def pointers(tensors):
    assert all(t is None or t.is_contiguous() for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


class OnTheHost:
    """What the CUDA operations of a family do, for CPU tensors.

    ``plan(element_bytes, **problem)`` is the family's; ``launch(pass_, pixels)`` gives blocks along the pixels and what
    else the family's launch is made of.
    """

    def __init__(self, kernels, family, plan, launch):
        self.kernels = kernels
        self.family = family
        self.plan = plan
        self.launch = launch
        self.calls = 0

    def call(self, name, parts, weights, kernels, peephole, current, keep, state_row, operands, *more):
        self.calls += 1
        steps, batch, height, width, _ = parts[0].shape
        branches = [(p.shape[4] // 4, *kernels[4 * r : 4 * r + 4]) for r, p in enumerate(parts)]
        bytes_each = parts[0].element_size()
        plan = self.plan(bytes_each, batch=batch, height=height, width=width, branches=branches)
        first = [sum(b[0] for b in branches[:r]) for r in range(len(branches))]
        rows = [
            (*branches[r][1:], branches[r][0], first[r], block)
            for r, block in zip(plan.order, plan.first_blocks, strict=True)
        ]
        peepholes = 0 if peephole is None else 2 if current else 1
        per = 0 if peephole is None else peephole[0, 0].numel()
        pass_ = getattr(plan, name)
        blocks_x, family = self.launch(pass_, batch * height * width)
        sizes = (
            steps, batch, height, width, sum(b[0] for b in branches), len(rows), peepholes, per, keep,
            state_row, blocks_x, pass_.blocks_y, *family,
        )  # fmt: skip
        getattr(self.kernels, f"{self.family}_{name}")(
            ctypes.c_int64(bytes_each),
            array(sizes),
            array(sum(rows, ())),
            pointers([parts[r] for r in plan.order]),
            pointers([weights[r] for r in plan.order]),
            pointers(operands),
            *more,
        )

    def forward(self, z, weights, kernels, h_0, c_0, bias, peephole, current, keep, state, h, c):
        for scratch in (state, h, c):
            scratch.fill_(float("nan"))
        operands = [h_0, c_0, bias, peephole, state, h, c]
        self.call("forward", z, weights, kernels, peephole, current, keep, state.shape[-1], operands)
        if not keep:
            for part in z:
                part.fill_(float("nan"))

    def backward(self, gates, weights, kernels, c_0, c, peephole, current, dh, dc_n, lengths, dh_0, dc):
        for scratch in (dh_0, dc):
            if scratch is not None:
                scratch.fill_(float("nan"))
        strides = array((0,) * 5 if dh is None else dh.stride())
        base = None if dh is None else dh.as_strided((1,), (1,))
        operands = [c_0, c, peephole, base, dc_n, lengths, dh_0, dc]
        self.call("backward", gates, weights, kernels, peephole, current, True, 0, operands, strides)

    def take_over(self, monkeypatch):
        """The ``cuda`` backend in the place of ``aten``, on CPU tensors, by these kernels alone."""
        monkeypatch.setattr(torch.ops.mkconvlstm, f"{self.family}_forward", self.forward)
        monkeypatch.setattr(torch.ops.mkconvlstm, f"{self.family}_backward", self.backward)
        by_kernels = replace(dispatch.BACKENDS["cuda"], name="aten", available=lambda: None, supports=lambda _: None)
        monkeypatch.setitem(dispatch.BACKENDS, "aten", by_kernels)
        monkeypatch.setattr(cuda_backend, "aten", None)
