"""Which kernels run: what "auto" takes, and which of the CUDA backend's kernels run backward."""

from dataclasses import replace

import pytest
import torch
from test_sequence_plan import WORKLOADS

from mkconvlstm_cuda import aten, cuda_backend, dispatch, simt, sm80, sm90, triton_backend
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights


@pytest.mark.parametrize(
    ("batch", "served", "triton", "wanted"),
    [
        (27, ("forward", "backward"), True, "sm90"),
        (26, ("forward", "backward"), True, "triton"),  # too few tiles for all multiprocessors
        (26, ("forward", "backward"), False, "sm90"),
        (27, ("forward",), True, "triton"),
        (27, ("backward",), True, "sm90"),
        (27, (), True, "aten"),
        (27, ("forward",), False, "aten"),
        (26, ("forward", "backward", "resident"), True, "sm90"),
        (26, ("resident",), True, "sm90"),
    ],
)
def test_who_runs_backward(batch, served, triton, wanted, monkeypatch):
    monkeypatch.setattr(sm90, "device_limits", lambda _: (132, 232448))
    monkeypatch.setattr(sm90, "refusal", lambda *args: None if args[-1] in served else "no")
    monkeypatch.setattr(triton_backend, "available", lambda: None if triton else "no")
    for family in (sm80, simt):
        monkeypatch.setattr(family, "refusal", lambda *_: "no")
    for module, name in ((sm90, ("sm90",)), (triton_backend, ("triton",)), (aten, ("aten",))):
        monkeypatch.setattr(module, "backward", lambda *_, name=name, **__: name)
    hidden = TransitionWeights((BranchWeights(torch.zeros((4 * 72, 72, 3, 3))),))
    gates = [torch.zeros(batch, 1, 4 * 72, 8, 16)]
    args = (gates, None, None, hidden, None, None, None, "previous", None, None, None, True)
    assert cuda_backend.backward(*args)[0] == wanted


def test_auto_takes_the_kernels_where_they_are_fastest(monkeypatch):
    monkeypatch.setattr(sm90, "device_limits", lambda _: (132, 232448))
    for backend in ("triton", "cuda"):
        serving = replace(dispatch.BACKENDS[backend], available=lambda: None, supports=lambda _: None)
        monkeypatch.setitem(dispatch.BACKENDS, backend, serving)

    def chosen(batch, height, width, branches, dtype=torch.bfloat16, **more):
        problem = dispatch.Problem(torch.device("cuda"), dtype, batch, height, width, tuple(branches), **more)
        return dispatch.choose(problem).name

    assert {chosen(**problem) for problem in WORKLOADS.values()} == {"cuda"}
    small = {"batch": 1, "height": 32, "width": 32, "branches": [(3, 3, 32), (5, 5, 32)]}
    assert chosen(**small) == "cuda"
    assert chosen(**{**small, "batch": 2}) == "triton"
    assert chosen(**WORKLOADS["paper_mk35"], plain=False) == "triton"
    for allowed, wanted in ((True, "triton"), (False, "cuda")):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            assert chosen(**WORKLOADS["paper_mk35"], dtype=torch.float32) == wanted
            assert chosen(**WORKLOADS["paper_mk35"], dtype=torch.float32, plain=False) == "triton"
