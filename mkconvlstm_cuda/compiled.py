"""The gate step of a compiled library, CPU or CUDA, as :mod:`aten` would have it; see :mod:`library` for the schema."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gate_step(
    z: Sequence[Tensor], u: Sequence[Tensor], c_prev: Tensor, peephole: Tensor | None, output_peephole: str
) -> tuple[Tensor, Tensor]:
    """:func:`aten.gate_step` in one pass over memory."""
    h, c = torch.empty_like(c_prev, dtype=z[0].dtype), torch.empty_like(c_prev)
    current = output_peephole == "current"
    torch.ops.mkconvlstm.gate_step_forward(z, u, c_prev, h, c, contiguous(peephole), current)
    return h, c


def gate_step_backward(
    gates: Sequence[Tensor],
    dh: Tensor | None,
    dh_prev: Tensor | None,
    dc: Tensor,
    c_prev: Tensor,
    c: Tensor,
    peephole: Tensor | None,
    output_peephole: str,
) -> Tensor:
    """:func:`aten.gate_step_backward` in one pass over memory; ``dc`` is overwritten and returned."""
    current = output_peephole == "current"
    torch.ops.mkconvlstm.gate_step_backward(gates, dh, dh_prev, dc, c_prev, c, contiguous(peephole), current)
    return dc


def contiguous(peephole: Tensor | None) -> Tensor | None:
    return None if peephole is None else peephole.contiguous()
