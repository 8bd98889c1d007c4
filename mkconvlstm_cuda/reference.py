"""The ``reference`` backend: the equations as a plain loop of torch operations, differentiated by torch itself.

It is the oracle that every other backend is judged by: any dtype, any option, any order of differentiation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the cell state and of the gates' arithmetic: float32 for half types, else ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def cell_step(z: Tensor, c_prev: Tensor, peephole: Tensor | None, output_peephole: str) -> tuple[Tensor, Tensor]:
    """Gates and state update of one step (the paper's eqs. 6-10; Shi et al. 2015 with ``output_peephole="current"``).

    ``z`` [B, 4F, H, W]: pre-activations, order i f g o. ``c_prev`` [B, F, H, W]. ``peephole`` [3, F, 1 or H, 1 or W]:
    w_ci, w_cf, w_co. Returns ``h_t``, ``c_t`` [B, F, H, W] in ``c_prev``'s dtype.
    """
    z_i, z_f, z_g, z_o = z.to(c_prev.dtype).chunk(4, dim=1)
    if peephole is not None:
        w_ci, w_cf, w_co = peephole.to(c_prev.dtype)
        z_i = z_i + w_ci * c_prev
        z_f = z_f + w_cf * c_prev
        if output_peephole == "previous":
            z_o = z_o + w_co * c_prev
    c = torch.sigmoid(z_f) * c_prev + torch.sigmoid(z_i) * torch.tanh(z_g)
    if peephole is not None and output_peephole == "current":
        z_o = z_o + w_co * c
    return torch.sigmoid(z_o) * torch.tanh(c), c


def sequence(
    z: Tensor,
    hidden_transition: Callable[[Tensor], Tensor],
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over all T.

    Args:
        z: [B, T, 4F, H, W], the input's part of the pre-activations, bias included.
        hidden_transition: ``U``, [B, F, H, W] -> [B, 4F, H, W] in z's dtype.
        h_0: [B, F, H, W] in z's dtype, or None for zeros.
        c_0: [B, F, H, W] in ``accumulate_dtype(z.dtype)``, or None for zeros.
        peephole: [3, F, 1 or H, 1 or W], or None.
        output_peephole: "previous" or "current".
        norm: of the sum ``z_t + U(h_{t-1})``, [B, 4F, H, W] in the accumulate dtype, or None.

    Returns:
        h [B, T, F, H, W], contiguous, in z's dtype and c, the same shape, in the accumulate dtype.
    """
    batch, _, outputs, height, width = z.shape
    c = z.new_zeros((batch, outputs // 4, height, width), dtype=accumulate_dtype(z.dtype)) if c_0 is None else c_0
    h = torch.zeros_like(c, dtype=z.dtype) if h_0 is None else h_0
    hs, cs = [], []
    for z_t in z.unbind(1):
        gates = z_t.to(c.dtype) + hidden_transition(h)
        h, c = cell_step(gates if norm is None else norm(gates), c, peephole, output_peephole)
        h = h.to(z.dtype)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1).contiguous(), torch.stack(cs, 1)
