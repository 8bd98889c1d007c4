"""The ``cuda`` backend: the loop of ``aten``, with each step's gates and state update in one CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten, library
from .aten import Parts


def available() -> str | None:
    """None where the CUDA library is loaded, else why it is not."""
    return library.load()


def supports(problem) -> str | None:
    """None where the kernels compute ``problem`` (:class:`dispatch.Problem`), else why not."""
    if problem.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the input is on {problem.device.type}"
    if problem.live_parts:
        return f"its hidden transition has {problem.live_parts}, which only 'reference' computes"
    return None


def gate_step(
    z: Parts, u: Parts, c_prev: Tensor, peephole: Tensor | None, output_peephole: str
) -> tuple[Tensor, Tensor]:
    """:func:`aten.gate_step` as one kernel."""
    c = torch.empty_like(c_prev)
    h = torch.empty_like(c_prev, dtype=z[0].dtype)
    torch.ops.mkconvlstm.gate_step_forward(z, u, c_prev, h, c, contiguous(peephole), output_peephole == "current")
    return h, c


def gate_step_backward(
    gates: Parts,
    dh: Tensor | None,
    dh_prev: Tensor | None,
    dc: Tensor,
    c_prev: Tensor,
    c: Tensor,
    peephole: Tensor | None,
    output_peephole: str,
) -> Tensor:
    """:func:`aten.gate_step_backward` as one kernel; ``dc`` is overwritten and returned."""
    current = output_peephole == "current"
    torch.ops.mkconvlstm.gate_step_backward(gates, dh, dh_prev, dc, c_prev, c, contiguous(peephole), current)
    return dc


def contiguous(peephole: Tensor | None) -> Tensor | None:
    return None if peephole is None else peephole.contiguous()


def forward(*args):
    """See :func:`aten.forward`."""
    return aten.forward(*args, gate_step=gate_step)


def backward(*args):
    """See :func:`aten.backward`."""
    return aten.backward(*args, gate_step_backward=gate_step_backward)
