"""The operation's schema: ``torch.ops.mkconvlstm.sequence_forward`` and ``sequence_backward``, with fake kernels.

One call is the whole recurrence over T. ``hidden`` is :meth:`TransitionWeights.tensors`, flat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import aten
from .convolution import TransitionWeights
from .dispatch import BACKENDS
from .reference import accumulate_dtype


@torch.library.custom_op("mkconvlstm::sequence_forward", mutates_args=("z",))
def sequence_forward(
    z: Tensor,
    hidden: Sequence[Tensor | None],
    dilations: Sequence[int],
    mix_tanh: bool,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """All T steps of the recurrence.

    Args:
        z: [B, T, 4F, H, W], channels-last images: the input's pre-activations. With ``keep`` it is overwritten by the
            activated gates; without, its content afterwards is unspecified.
        hidden, dilations, mix_tanh: the hidden transition (see :class:`TransitionWeights`), in z's dtype.
        h_0: [B, F, H, W] in z's dtype, or None for zeros.
        c_0: [B, F, H, W] in the accumulate dtype, or None for zeros.
        peephole: [3, F, 1 or H, 1 or W] in the accumulate dtype, or None.
        output_peephole: "previous" or "current".
        keep: keep gates and all cell states for backward.
        backend: a name in ``dispatch.BACKENDS``.

    Returns:
        h: [B, T, F, H, W], contiguous.
        c: [B, T, F, H, W] with ``keep``, else the last step's [B, 1, F, H, W]; channels-last, accumulate dtype.
    """
    w = TransitionWeights.from_tensors(hidden, dilations, mix_tanh).channels_last()
    return BACKENDS[backend].forward(z, w, h_0, c_0, peephole, output_peephole, keep)


@sequence_forward.register_fake
def _(z, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, keep, backend):
    batch, steps, gates, height, width = z.shape
    h = z.new_empty((batch, steps, gates // 4, height, width))
    return h, aten.empty_states(z, batch, steps if keep else 1, accumulate_dtype(z.dtype))


@torch.library.custom_op("mkconvlstm::sequence_backward", mutates_args=("gates",))
def sequence_backward(
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    hidden: Sequence[Tensor | None],
    dilations: Sequence[int],
    mix_tanh: bool,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    dh: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Backward through all T steps; weight gradients are left to :func:`convolution.gradients`.

    Args:
        gates: [B, T, 4F, H, W], activated; overwritten by the gradient of the pre-activations.
        h, c: what :func:`sequence_forward` returned with ``keep`` (c may have been rounded to h's dtype).
        dh: [B, T, F, H, W], gradient of every h_t from outside the recurrence, or None for zeros.
        dc_n: [B, F, H, W], gradient of the last cell state, c at ``lengths - 1`` where those are given; or None.
        lengths: [B] int64, or None where every sequence has T steps.

    Returns:
        dh_0 [B, F, H, W] in z's dtype, empty (0 elements) when h_0 is None; dc_0 [B, F, H, W], accumulate dtype.
    """
    w = TransitionWeights.from_tensors(hidden, dilations, mix_tanh).channels_last()
    dh_0, dc_0 = BACKENDS[backend].backward(gates, h, c, w, h_0, c_0, peephole, output_peephole, dh, dc_n, lengths)
    return gates.new_empty(0) if dh_0 is None else dh_0, dc_0


@sequence_backward.register_fake
def _(gates, h, c, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, dh, dc_n, lengths, backend):
    batch, _, _channels, _height, _width = gates.shape
    dc_0 = aten.empty_states(gates, batch, 1, accumulate_dtype(gates.dtype))[:, 0]
    return gates.new_empty(0) if h_0 is None else torch.empty_like(dc_0, dtype=gates.dtype), dc_0
