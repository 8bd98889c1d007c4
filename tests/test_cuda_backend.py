"""Whole layers on the CUDA backend: every option in float64, and what the Hopper kernels serve in half types."""

import pytest
import torch
from problems import LIVE, PROBLEMS, Problem, assert_close

from mkconvlstm_cuda import cuda_backend, sm90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_backend.available() is not None, reason=f"no CUDA library: {cuda_backend.available()}"),
]

HALVES = {
    "odd": Problem({3: 24, 5: 48}, channels=3, size=(9, 7)),
    "one size": Problem({5: 72}, channels=3, size=(5, 11)),
}
OPTIONS = {
    "plain": {},
    "recompute": {"recompute": True},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in LIVE])
def test_float64_agrees_to_1e10(name):
    problem = PROBLEMS[name]
    assert_close(problem.run("cuda", device="cuda"), problem.run("reference", device="cuda"), 1e-10)


@pytest.mark.parametrize("lengths", [None, (2, 5)], ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_as_close_as_torch(dtype, name, options, state, lengths, monkeypatch):
    """Each tensor at most twice as far from float64 as aten's, torch's own arithmetic, in the same dtype."""
    base = HALVES[name]
    problem = Problem(base.kernels, OPTIONS[options], lengths, state, steps=5, channels=3, size=base.size)
    served = []
    for direction in ("forward", "backward"):
        kernels = getattr(sm90, direction)
        monkeypatch.setattr(sm90, direction, lambda *args, k=kernels, d=direction: served.append(d) or k(*args))
    exact = problem.run("reference", device="cuda")
    torchs, ours = (problem.run(backend, dtype, "cuda") for backend in ("aten", "cuda"))
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert set(served) == ({"forward", "backward"} if on_hopper else set())
    floor = 2**-10 if dtype == torch.float16 else 2**-7
    for n, wanted in exact.items():
        error, torch_error = (float((r[n].double() - wanted).norm() / wanted.norm()) for r in (ours, torchs))
        assert error <= max(2 * torch_error, floor), n
