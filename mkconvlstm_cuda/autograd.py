"""The two differentiable pieces: ``TransitionFunction`` (no recurrence, keeps only x) and ``SequenceFunction``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from . import aten, ops, reference
from .convolution import (
    TransitionWeights,
    channels_last,
    gradients,
    mix_forward,
    premix,
    transition_forward,
)


def no_autocast(device: torch.device):
    """A context without autocast, for code that has chosen its dtypes; backward may run inside the user's autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class TransitionFunction(Function):
    """:func:`convolution.transition_forward` over all images at once, keeping ``x`` as it came.

    torch's own convolution would keep the channels-last (and, under autocast, rounded) copy of x until backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, dilations, mix_tanh: bool, keep_premix: bool, *tensors):
        w = TransitionWeights.from_tensors(tensors, dilations, mix_tanh).channels_last()
        v = premix(channels_last(x.to(dtype)), w)
        ctx.save_for_backward(x, v if keep_premix and w.mix is not None else None, *tensors)
        ctx.dtype, ctx.dilations, ctx.mix_tanh = dtype, dilations, mix_tanh
        return mix_forward(v, w)

    @staticmethod
    def backward(ctx, dz: Tensor):
        x, v, *tensors = ctx.saved_tensors
        w = TransitionWeights.from_tensors(tensors, ctx.dilations, ctx.mix_tanh).channels_last()
        dz, images = channels_last(dz), channels_last(x.to(ctx.dtype))
        if torch.is_grad_enabled():
            v = None  # a double backward has to see how it depends on x
        with no_autocast(x.device):
            dx, grads = gradients(images, dz, w, ctx.needs_input_grad[5:], ctx.needs_input_grad[0], v)
        dx = None if dx is None else dx.to(x.dtype)
        return dx, None, None, None, None, *grads


def transition(x: Tensor, w: TransitionWeights, dtype: torch.dtype, *, recompute: bool = False) -> Tensor:
    """``x`` [N, C, H, W] -> [N, 4F, H, W] in ``dtype``, channels-last.

    ``w`` is in ``dtype``. With ``recompute`` nothing but x is kept, else also what a 1x1 mix multiplies.
    """
    return TransitionFunction.apply(x, dtype, w.dilations, w.mix_tanh, not recompute, *w.tensors())


@dataclass(frozen=True)
class SequenceOptions:
    """All of a call that is no tensor."""

    backend: str
    dilations: list[int]
    mix_tanh: bool
    output_peephole: str
    recompute: bool
    recompute_z: Callable[[], Tensor]  # z [B, T, 4F, H, W] once more, a fresh tensor each time


def last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The state after each sequence's last step, [B, F, H, W], contiguous, from [B, T, F, H, W]."""
    if lengths is None:
        return states[:, -1].clone(memory_format=torch.contiguous_format)
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, lengths - 1].contiguous()


class SequenceFunction(Function):
    """The recurrence, with the backward of the backend that ran forward.

    Between forward and backward it keeps h and c of all steps, and either the gates or, with ``recompute`` (c then in
    h's dtype), nothing more. Backward overwrites the gates by their gradients, unless the graph is retained. A backward
    that is itself differentiated goes through ``reference``.
    """

    @staticmethod
    def forward(ctx, options: SequenceOptions, z, h_0, c_0, peephole, lengths, *hidden):
        args = (hidden, options.dilations, options.mix_tanh, h_0, c_0, peephole, options.output_peephole)
        gates = z.detach()  # z is ours alone: overwritten without its graph's knowledge
        h, c = ops.sequence_forward(gates, *args, True, options.backend)
        gates, kept_c = (None, c.to(h.dtype)) if options.recompute else (gates, c)
        ctx.save_for_backward(gates, h, kept_c, lengths, h_0, c_0, peephole, *hidden)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return h, last_states(h, lengths), last_states(c, lengths)

    @staticmethod
    def backward(ctx, dh, dh_n, dc_n):
        if dh is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        device = next(d for d in (dh, dh_n, dc_n) if d is not None).device
        with no_autocast(device):
            if torch.is_grad_enabled():
                return SequenceFunction.differentiable_backward(ctx, dh, dh_n, dc_n)
            return SequenceFunction.plain_backward(ctx, dh, dh_n, dc_n)

    @staticmethod
    def plain_backward(ctx, dh, dh_n, dc_n):
        """Backward by the backend that ran forward."""
        options = ctx.options
        gates, h, c, lengths, h_0, c_0, peephole, *hidden = ctx.saved_tensors
        w = TransitionWeights.from_tensors(hidden, options.dilations, options.mix_tanh)
        if options.recompute:
            gates = aten.recompute_gates(options.recompute_z(), h, c, w, h_0, c_0, peephole, options.output_peephole)
        elif keeps_graph():
            gates = gates.clone()
        if not keeps_graph():
            ctx.options = None  # as torch frees the saved tensors: recompute_z holds x
        dh = add_last_gradient(dh, dh_n, h, lengths)
        args = (hidden, options.dilations, options.mix_tanh, h_0, c_0, peephole, options.output_peephole)
        dh_0, dc_0 = ops.sequence_backward(gates, h, c, *args, dh, dc_n, lengths, options.backend)
        dz = gates
        _, needs_z, needs_h_0, needs_c_0, needs_peephole, _, *needs_hidden = ctx.needs_input_grad
        grads = [None] * len(hidden)
        if any(needs_hidden):
            first = 1 if h_0 is None and h.shape[1] > 1 and not w.has_bias else 0  # h_{-1} = 0 has nothing to add
            seen = aten.previous(h[:, first:], h[:, 0] if first else h_0)
            _, grads = gradients(seen.flatten(0, 1), dz[:, first:], w, needs_hidden)
        return (
            None,
            dz if needs_z else None,
            dh_0 if needs_h_0 else None,
            dc_0 if needs_c_0 else None,
            aten.peephole_gradient(dz, c, c_0, peephole, options.output_peephole) if needs_peephole else None,
            None,
            *grads,
        )

    @staticmethod
    def differentiable_backward(ctx, dh, dh_n, dc_n):
        """Backward as a differentiable function of all inputs: torch's gradient of the reference (double backward)."""
        options = ctx.options
        _, _, _, lengths, *saved = ctx.saved_tensors
        # Aliases, so that what z has of the same tensors (tied weights, x computed from h_0) is not counted here too.
        h_0, c_0, peephole, *hidden = (None if t is None else t.view_as(t) for t in saved)
        w = TransitionWeights.from_tensors(hidden, options.dilations, options.mix_tanh)
        z = options.recompute_z()
        z = z if z.requires_grad else z.detach().requires_grad_()
        h, c = reference.sequence(
            z, lambda state: transition_forward(state, w), h_0, c_0, peephole, options.output_peephole
        )
        outputs = ((h, dh), (last_states(h, lengths), dh_n), (last_states(c, lengths), dc_n))
        outputs = [(y, dy) for y, dy in outputs if dy is not None]
        inputs = (None, z, h_0, c_0, peephole, None, *hidden)
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        ys, dys = zip(*outputs, strict=True)
        grads = torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True)
        remaining = iter(grads)
        return tuple(next(remaining) if needed else None for needed in ctx.needs_input_grad)


def keeps_graph() -> bool:
    """Whether the backward that runs now may run again over the same graph (``retain_graph=True``).

    The engine tells it nobody else; torch's own compiled backwards ask it the same way before they reuse buffers.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def add_last_gradient(dh: Tensor | None, dh_n: Tensor | None, h: Tensor, lengths: Tensor | None) -> Tensor | None:
    """``dh`` [B, T, F, H, W] with the gradient of the last hidden state [B, F, H, W] added where that state is."""
    if dh_n is None:
        return dh
    dh = torch.zeros_like(h) if dh is None else dh.clone()
    if lengths is None:
        dh[:, -1] += dh_n
    else:
        dh[torch.arange(h.shape[0], device=h.device), lengths - 1] += dh_n
    return dh
