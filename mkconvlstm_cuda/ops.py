"""The operation's schema: ``torch.ops.mkconvlstm.sequence_forward`` and ``sequence_backward``, with fake kernels.

One call is the whole recurrence over T. ``hidden`` is :meth:`TransitionWeights.tensors`, flat. They are defined with
``torch.library.Library``, which costs the host less at each call than ``torch.library.custom_op``.
"""

from __future__ import annotations

import torch

from . import aten, layout
from .convolution import TransitionWeights, images_of
from .dispatch import BACKENDS
from .interleaving import join_gates
from .reference import accumulate_dtype

_library = torch.library.Library("mkconvlstm", "FRAGMENT")

_SHARED = (
    "Tensor?[] hidden, int[] dilations, bool mix_tanh, Tensor? h_0, Tensor? c_0, Tensor? peephole, str output_peephole"
)
_library.define(
    f"sequence_forward(Tensor(a!)[] z, {_SHARED}, Tensor? bias, bool keep, str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"sequence_backward(Tensor(a!)[] gates, Tensor h, Tensor c, {_SHARED}, Tensor? dh, Tensor? dc_n, Tensor? lengths,"
    " bool needs_bias, str backend) -> (Tensor, Tensor, Tensor)"
)


def _sequence_forward(z, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, bias, keep, backend):
    """All T steps of the recurrence.

    Args:
        z: the input's pre-activations, one part [B, T, 4*F_p, H, W] for each of the hidden transition's (see
            :mod:`convolution`), in memory [T, B, H, W, 4*F_p]. With ``keep`` they are overwritten by the activated
            gates; without, their content afterwards is unspecified.
        hidden, dilations, mix_tanh: the hidden transition (see :class:`TransitionWeights`), in z's dtype.
        h_0: [B, F, H, W] in z's dtype, or None for zeros.
        c_0: [B, F, H, W] in the accumulate dtype, or None for zeros.
        peephole: [3, F, 1 or H, 1 or W] in the accumulate dtype, or None.
        output_peephole: "previous" or "current".
        bias: [4F], gate-major, of any dtype, to be added to z; or None. Only for a backend that ``adds_bias``.
        keep: keep gates and all cell states for backward.
        backend: a name in ``dispatch.BACKENDS``.

    Returns:
        h: [B, T, F, H, W], contiguous.
        c: [B, T, F, H, W] with ``keep``, else the last step's [B, 1, F, H, W]; channels-last, accumulate dtype.
    """
    w = TransitionWeights.from_tensors(hidden, dilations, mix_tanh)
    more = (bias,) if BACKENDS[backend].adds_bias else ()
    return BACKENDS[backend].forward(z, w, h_0, c_0, peephole, output_peephole, keep, *more)


def _sequence_forward_fake(z, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, bias, keep, backend):
    c = aten.empty_states(z, z[0].shape[1] if keep else 1, accumulate_dtype(z[0].dtype))
    return z[0].new_empty((*z[0].shape[:2], *c.shape[2:])), c


def _sequence_backward(
    gates, h, c, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, dh, dc_n, lengths, needs_bias,
    backend,
):  # fmt: skip
    """Backward through all T steps; weight gradients are left to :func:`convolution.weight_gradients`.

    Args:
        gates: the parts, activated; overwritten by the gradients of the pre-activations.
        h, c: what ``sequence_forward`` returned with ``keep`` (c may have been rounded to h's dtype).
        dh: [B, T, F, H, W], gradient of every h_t from outside the recurrence, or None for zeros.
        dc_n: [B, F, H, W], gradient of the last cell state, c at ``lengths - 1`` where those are given; or None.
        lengths: [B] int64, or None where every sequence has T steps.
        needs_bias: whether the gradient of what is added to z at each step is wanted.

    Returns:
        dh_0 [B, F, H, W] in z's dtype, empty (0 elements) when h_0 is None; dc_0 [B, F, H, W], accumulate dtype; the
        sum of the gradients of z over all but its channels, [4F], gate-major, accumulate dtype, or empty.
    """
    w = TransitionWeights.from_tensors(hidden, dilations, mix_tanh)
    chosen = BACKENDS[backend]
    args = (gates, h, c, w, h_0, c_0, peephole, output_peephole, dh, dc_n, lengths)
    dh_0, dc_0, dbias = chosen.backward(*args, needs_bias) if chosen.adds_bias else (*chosen.backward(*args), None)
    if not needs_bias:
        dbias = dc_0.new_empty(0)
    elif dbias is None:
        dbias = join_gates([layout.channel_sums(images) for images in images_of(gates)])
    return h.new_empty(0) if dh_0 is None else dh_0, dc_0, dbias


def _sequence_backward_fake(
    gates, h, c, hidden, dilations, mix_tanh, h_0, c_0, peephole, output_peephole, dh, dc_n, lengths, needs_bias,
    backend,
):  # fmt: skip
    dc_0 = aten.empty_states(gates, 1, accumulate_dtype(h.dtype))[:, 0]
    dh_0 = h.new_empty(0) if h_0 is None else torch.empty_like(dc_0, dtype=h.dtype)
    return dh_0, dc_0, dc_0.new_empty(4 * dc_0.shape[1] if needs_bias else 0)


def _below_autograd(name: str):
    """The operation for tensors that want gradients: one opaque call. Its derivative is SequenceFunction's business."""

    def call(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.mkconvlstm, name).default(*args)

    return call


for _name, _kernel in (("sequence_forward", _sequence_forward), ("sequence_backward", _sequence_backward)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(_name), "Autograd")
torch.library.register_fake("mkconvlstm::sequence_forward", _sequence_forward_fake, lib=_library)
torch.library.register_fake("mkconvlstm::sequence_backward", _sequence_backward_fake, lib=_library)

sequence_forward = torch.ops.mkconvlstm.sequence_forward.default
sequence_backward = torch.ops.mkconvlstm.sequence_backward.default
