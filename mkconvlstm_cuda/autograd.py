"""``SequenceFunction``: a whole layer, input transition and recurrence, as one differentiable operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops, reference
from .backward import LayerBackward, pieces
from .convolution import (
    TransitionWeights,
    channels_last,
    images_of,
    sequence_of,
    time_major,
    transition_forward,
    transition_parts,
)
from .dispatch import BACKENDS
from .interleaving import repart


def has_autocast(device: torch.device) -> bool:
    """Whether there is autocast for ``device``; some ("meta") have none, and torch raises when asked for more."""
    if torch.compiler.is_compiling():  # torch 2.11 cannot trace the question
        return device.type != "meta"
    return torch.amp.is_autocast_available(device.type)


def no_autocast(device: torch.device):
    """A context without autocast, for code that has chosen its dtypes; backward may run inside the user's autocast."""
    if has_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@dataclass(frozen=True)
class SequenceOptions:
    """All of a call that is no tensor."""

    backend: str
    dtype: torch.dtype
    input_form: tuple[list[int], bool] | None  # dilations, mix_tanh; None where z is given in place of x
    hidden_form: tuple[list[int], bool]
    output_peephole: str
    recompute: bool
    recompute_z: Callable[[], Tensor] | None  # z once more, where it is given: a fresh tensor each time

    def bias_of_input(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` where it goes into z, else None."""
        return None if BACKENDS[self.backend].adds_bias else bias

    def bias_of_hidden(self, bias: Tensor | None) -> Tensor | None:
        """``bias`` where the backend adds it, else None."""
        return bias if BACKENDS[self.backend].adds_bias else None

    def split(self, tensors: list) -> tuple[list, list]:
        """What belongs to the input transition's tensors, and what to the hidden transition's."""
        count = len(tensors) - TransitionWeights.tensor_count(len(self.hidden_form[0]) // 2)
        return tensors[:count], tensors[count:]

    def transitions(self, tensors: list) -> tuple[TransitionWeights | None, TransitionWeights]:
        """The input transition, or None, and the hidden one."""
        of_input, of_hidden = self.split(tensors)
        w_x = TransitionWeights.from_tensors(of_input, *self.input_form) if of_input else None
        return w_x, TransitionWeights.from_tensors(of_hidden, *self.hidden_form)


def last_states(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The state after each sequence's last step, [B, F, H, W], contiguous, from [B, T, F, H, W]."""
    if lengths is None:
        return states[:, -1].clone(memory_format=torch.contiguous_format)
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, lengths - 1].contiguous()


def preactivations(
    x: Tensor,
    z: Tensor | None,
    w_x: TransitionWeights | None,
    w_h: TransitionWeights,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> list[Tensor]:
    """X(x_t) + b of all steps, in the hidden transition's parts, each [B, T, 4*F_p, H, W].

    ``x`` is [B, T, C, H, W]; ``z``, where ``w_x`` is None, X's value as images [T*B, 4F, H, W]; ``bias`` [4F] or None.
    """
    if w_x is None:
        z = z if bias is None else z + bias.to(dtype)[:, None, None]
        parts, sizes = [channels_last(z)], [z.shape[1] // 4]
    else:
        images = time_major(x, dtype)
        w_x = w_x.with_bias(bias).channels_last().prepared((images.shape[0], *images.shape[2:]), 1)
        parts, sizes = transition_parts(images, w_x), w_x.parts
    return [sequence_of(p, x.shape[1]) for p in repart(parts, sizes, w_h.parts)]


def forward_in_pieces(
    options: SequenceOptions,
    parts: Iterable[list[Tensor]],
    w_h: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The recurrence over consecutive ``parts`` of all steps.

    Returns:
        The gates; h and c [B, T, F, H, W]; and c after each sequence's last step [B, F, H, W]. With ``recompute`` c
        after each of ``parts`` but the last, [B, F, H, W], in place of the gates, and None in place of c.
    """
    done, hs, cs, c_n = 0, [], [], None
    keep = not options.recompute or lengths is not None
    for z in parts:
        h, c = run_recurrence(options, z, w_h, h_0, c_0, peephole, bias, keep)
        steps = h.shape[1]
        if lengths is None or c_n is None:
            c_n = last_states(c, None if lengths is None else lengths.clamp(1, steps))
        else:
            ends = lengths - done
            c_n = last_states(c, ends.clamp(1, steps)).where((ends > 0).view(-1, 1, 1, 1), c_n)
        done += steps
        h_0, c_0 = h[:, -1], c[:, -1].clone() if options.recompute and keep else c[:, -1]
        hs.append(h)
        cs.append(c_0)
        if options.recompute:
            z = c = None  # before the next piece is made
    h = hs[0] if len(hs) == 1 else torch.cat(hs, 1)
    return (cs[:-1], h, None, c_n) if options.recompute else (z, h, c, c_n)


def run_recurrence(
    options: SequenceOptions,
    z: list[Tensor],
    w_h: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`ops.sequence_forward` by the backend of ``options``, b added to ``z`` where it is not in there yet."""
    bias = options.bias_of_hidden(bias)
    args = (w_h.tensors(), *w_h.form, h_0, c_0, peephole, options.output_peephole, bias, keep, options.backend)
    return ops.sequence_forward(z, *args)


class SequenceFunction(Function):
    """z_t = X(x_t) + U(h_{t-1}) + b and the recurrence, with the backward of the backend that ran forward.

    Between forward and backward it keeps x as it came and h of all steps; beside them c of all steps and the gates or,
    with ``recompute``, c of a few steps, from which backward runs the recurrence once more, piece by piece. Backward
    overwrites the gates by their gradients, unless the graph is retained. A backward that is itself differentiated goes
    through ``reference``.
    """

    @staticmethod
    def forward(ctx, options: SequenceOptions, x, z, h_0, c_0, peephole, bias, lengths, *tensors):
        w_x, w_h = options.transitions(tensors)
        z = None if z is None else z.detach()  # it is ours alone: overwritten without its graph's knowledge
        whole = [slice(0, x.shape[1])]
        here = pieces(x, sum(w_h.sizes), options.dtype) if options.recompute and w_x is not None else whole
        if len(here) > 1:
            w_x = w_x.channels_last()  # once for all of them
        parts = (preactivations(x[:, t], z, w_x, w_h, options.dtype, options.bias_of_input(bias)) for t in here)
        kept, h, c, c_n = forward_in_pieces(options, parts, w_h, h_0, c_0, peephole, bias, lengths)
        kept_x = None if w_x is None else x
        ctx.save_for_backward(kept_x, h, c, h_0, c_0, peephole, bias, lengths, *tensors, *kept)
        ctx.options, ctx.count = options, len(tensors)
        ctx.set_materialize_grads(False)
        return h, last_states(h, lengths), c_n

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
        x, h, c, h_0, c_0, peephole, bias, lengths, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.count], rest[ctx.count :]
        del rest
        if keeps_graph():
            kept = kept if options.recompute else [gates.clone() for gates in kept]
        else:  # from here on nothing but what is still needed holds memory
            ctx.maybe_clear_saved_tensors()
            ctx.options = None
        w_x, w_h = options.transitions(tensors)
        _, needs_x, needs_z, needs_h_0, needs_c_0, needs_peephole, needs_bias, _, *needs = ctx.needs_input_grad
        needs_input, needs_hidden = options.split(needs)
        run = LayerBackward(
            options.backend, options.output_peephole, options.dtype, w_x, w_h, x, h, c, h_0, c_0, peephole, lengths,
            add_last_gradient(dh, dh_n, h, lengths), dc_n, needs_input, needs_hidden, needs_x, needs_peephole,
            needs_bias,
        )  # fmt: skip
        del c

        def activate(z: list[Tensor], h_0: Tensor | None, c_0: Tensor | None) -> Tensor:
            return run_recurrence(options, z, w_h, h_0, c_0, peephole, bias, True)[1]

        in_z, dz = options.bias_of_input(bias), kept
        if options.recompute and w_x is not None:
            run.in_pieces(kept, lambda t: preactivations(x[:, t], None, w_x, w_h, options.dtype, in_z), activate)
        elif options.recompute:
            dz = preactivations(h, options.recompute_z().detach(), None, w_h, options.dtype, in_z)
            run.c = activate(dz, h_0, c_0)
            run.at_once(dz)
        else:
            run.at_once(dz)
        dz = repart(images_of(dz), w_h.parts, [h.shape[2]])[0] if needs_z else None
        return (
            None,
            run.dx,
            dz,
            run.dh_0 if needs_h_0 else None,
            run.dc_0 if needs_c_0 else None,
            run.dpeephole,
            None if run.dbias is None else run.dbias.to(bias.dtype),
            None,
            *run.input_grads,
            *run.hidden_grads,
        )

    @staticmethod
    def differentiable_backward(ctx, dh, dh_n, dc_n):
        """Backward as a differentiable function of all inputs: torch's gradient of the reference (double backward)."""
        options = ctx.options
        x, h, _, *saved = ctx.saved_tensors
        steps = h.shape[1]
        # Aliases, so that what z has of the same tensors (tied weights, x computed from h_0) is not counted here too.
        x = None if x is None else x.view_as(x)
        saved = [None if t is None else t.view_as(t) for t in saved[: 5 + ctx.count]]
        h_0, c_0, peephole, bias, lengths, *tensors = saved
        w_x, w_h = options.transitions(tensors)
        z = None if x is not None else options.recompute_z()
        if z is not None and not z.requires_grad:
            z = z.detach().requires_grad_()
        images = z if x is None else transition_forward(time_major(x, options.dtype), w_x)
        images = images if bias is None else images + bias.to(images.dtype)[:, None, None]
        h, c = reference.sequence(
            sequence_of(images, steps),
            lambda state: transition_forward(state, w_h),
            h_0,
            c_0,
            peephole,
            options.output_peephole,
        )
        outputs = ((h, dh), (last_states(h, lengths), dh_n), (last_states(c, lengths), dc_n))
        outputs = [(y, dy) for y, dy in outputs if dy is not None]
        inputs = (None, x, z, h_0, c_0, peephole, bias, None, *tensors)
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
