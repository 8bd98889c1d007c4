"""A layer as ``torch.compile`` and ``torch.export`` see it: one operation that changes none of its arguments.

It runs what :class:`SequenceFunction` runs, on the backend that is chosen when it runs, so that no size becomes a
condition of the graph. Against the eager path it copies the gates once more in backward, and z where it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, ops
from .autograd import SequenceFunction, SequenceOptions, keeps_graph, last_states, no_autocast, preactivations
from .backward import MOST_PIECES, pieces
from .convolution import TransitionWeights
from .reference import accumulate_dtype

_library = torch.library.Library("mkconvlstm", "FRAGMENT")

_SHARED = (
    "Tensor x, Tensor? z, Tensor? h_0, Tensor? c_0, Tensor? peephole, Tensor? bias, Tensor[] given, Tensor? lengths,"
    " bool[] present, str dtype, int[]? input_dilations, bool input_tanh, int[] dilations, bool tanh,"
    " str output_peephole, bool recompute, str backend"
)
_library.define(f"layer({_SHARED}, bool keep) -> (Tensor h, Tensor h_n, Tensor c_n, Tensor c, Tensor[] gates)")
_library.define(
    f"layer_backward({_SHARED}, Tensor h, Tensor c, Tensor[] gates, Tensor? dh, Tensor? dh_n, Tensor? dc_n,"
    " bool[] needs) -> Tensor[]"
)


class Saved:
    """What :class:`SequenceFunction` finds in its ``ctx``, outside of an autograd graph."""

    saved_tensors: tuple = ()

    def save_for_backward(self, *tensors) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, _) -> None:
        pass

    def maybe_clear_saved_tensors(self) -> None:
        self.saved_tensors = ()


def transitions_of(given, present, input_dilations, input_tanh, dilations, tanh):
    """The tensors of both transitions, None where none is ``present``, the input transition or None, the hidden one."""
    remaining = iter(given)
    tensors = [next(remaining) if there else None for there in present]
    count = len(tensors) - TransitionWeights.tensor_count(len(dilations) // 2)
    w_x = TransitionWeights.from_tensors(tensors[:count], input_dilations, input_tanh) if count else None
    return tensors, w_x, TransitionWeights.from_tensors(tensors[count:], dilations, tanh)


def options_of(x, w_x, w_h, dtype, peephole, output_peephole, recompute, backend) -> SequenceOptions:
    """The options of a call, its backend chosen for ``x`` [B, T, C, H, W]; raises as :func:`dispatch.choose`."""
    chosen = dispatch.choose(dispatch.Problem.of(x, dtype, w_h, peephole), backend).name
    input_form = None if w_x is None else w_x.form
    return SequenceOptions(chosen, dtype, input_form, w_h.form, output_peephole, recompute, None)


def _layer(
    x, z, h_0, c_0, peephole, bias, given, lengths,
    present, dtype, input_dilations, input_tanh, dilations, tanh, output_peephole, recompute, backend, keep,
):  # fmt: skip
    """A whole layer.

    Args:
        x, z, h_0, c_0, peephole, bias, lengths: as :meth:`SequenceFunction.forward` takes them.
        given, present: its tensors without those that are None, and which those are.
        dtype, ..., backend: the fields of :class:`SequenceOptions`; ``backend`` may be "auto", and ``dtype`` is a name,
            since compiled packages on torch 2.11 hand a dtype over as another.
        keep: return what backward needs.

    Returns:
        h [B, T, F, H, W]; the last h and c, [B, F, H, W]; and with ``keep`` c of all steps and the gates. With
        ``recompute`` that c is empty, and in place of the gates are the c that backward may start from, one for each of
        MOST_PIECES but the first; zeros where there are fewer pieces.
    """
    tensors, w_x, w_h = transitions_of(given, present, input_dilations, input_tanh, dilations, tanh)
    dtype = getattr(torch, dtype)
    options = options_of(x, w_x, w_h, dtype, peephole, output_peephole, recompute, backend)
    z = None if z is None else z.clone()  # it is overwritten
    with torch.no_grad(), no_autocast(x.device):
        if not keep:
            gates = preactivations(x, z, w_x, w_h, dtype, options.bias_of_input(bias))
            args = (w_h.tensors(), *w_h.form, h_0, c_0, peephole, output_peephole, options.bias_of_hidden(bias))
            h, c = ops.sequence_forward(gates, *args, lengths is not None, options.backend)
            return h, last_states(h, lengths), last_states(c, lengths), c.new_empty(0), []
        saved = Saved()
        h, h_n, c_n = SequenceFunction.forward(saved, options, x, z, h_0, c_0, peephole, bias, lengths, *tensors)
    c, kept = saved.saved_tensors[2], list(saved.saved_tensors[8 + len(tensors) :])
    if recompute:
        kept += [torch.zeros_like(c_n) for _ in range(MOST_PIECES - 1 - len(kept))]
        return h, h_n, c_n, c_n.new_empty(0), [state.contiguous() for state in kept]
    return h, h_n, c_n, c, kept


def _layer_fake(
    x, z, h_0, c_0, peephole, bias, given, lengths,
    present, dtype, input_dilations, input_tanh, dilations, tanh, output_peephole, recompute, backend, keep,
):  # fmt: skip
    _, _, w_h = transitions_of(given, present, input_dilations, input_tanh, dilations, tanh)
    batch, steps, _, height, width = x.shape
    dtype = getattr(torch, dtype)
    hidden, acc = sum(w_h.sizes), accumulate_dtype(dtype)
    h = x.new_empty((batch, steps, hidden, height, width), dtype=dtype)
    h_n, c_n = (x.new_empty((batch, hidden, height, width), dtype=d) for d in (dtype, acc))
    if not keep:
        return h, h_n, c_n, x.new_empty(0, dtype=acc), []

    def states(channels, kind):
        return x.new_empty((steps, batch, height, width, channels), dtype=kind).permute(1, 0, 4, 2, 3)

    if recompute:
        return h, h_n, c_n, x.new_empty(0, dtype=acc), [torch.empty_like(c_n) for _ in range(MOST_PIECES - 1)]
    return h, h_n, c_n, states(hidden, acc), [states(4 * size, dtype) for size in w_h.parts]


def _layer_backward(
    x, z, h_0, c_0, peephole, bias, given, lengths,
    present, dtype, input_dilations, input_tanh, dilations, tanh, output_peephole, recompute, backend,
    h, c, gates, dh, dh_n, dc_n, needs,
):  # fmt: skip
    """The gradients of those of x, z, h_0, c_0, peephole, bias and ``given`` that ``needs`` names, each contiguous."""
    tensors, w_x, w_h = transitions_of(given, present, input_dilations, input_tanh, dilations, tanh)
    dtype = getattr(torch, dtype)
    saved = Saved()
    saved.options = options_of(x, w_x, w_h, dtype, peephole, output_peephole, recompute, backend)
    if recompute:
        gates = gates[: len(pieces(x, sum(w_h.sizes), dtype)) - 1]
    elif not keeps_graph():
        gates = [g.clone() for g in gates]
    saved.save_for_backward(None if w_x is None else x, h, c, h_0, c_0, peephole, bias, lengths, *tensors, *gates)
    saved.count = len(tensors)
    remaining = iter(needs[6:])
    saved.needs_input_grad = (False, *needs[:6], False, *[there and next(remaining) for there in present])
    with torch.no_grad(), no_autocast(x.device):
        grads = SequenceFunction.plain_backward(saved, dh, dh_n, dc_n)
    return [g.contiguous() for g in grads if g is not None]


def _layer_backward_fake(x, z, h_0, c_0, peephole, bias, given, *rest):
    wanted = [t for t, needed in zip((x, z, h_0, c_0, peephole, bias, *given), rest[-1], strict=True) if needed]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]


def _save(ctx, inputs, output) -> None:
    x, z, h_0, c_0, peephole, bias, given, lengths, *settings, _ = inputs
    h, _, _, c, gates = output
    kept_z = None if z is None else z.new_empty(()).expand_as(z)  # its shape is all that matters
    ctx.save_for_backward(x, kept_z, h_0, c_0, peephole, bias, lengths, h, c, *given, *gates)
    ctx.settings, ctx.count = settings, len(given)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dh, dh_n, dc_n, *_):
    *inputs, lengths, h, c = ctx.saved_tensors[:9]
    given, gates = list(ctx.saved_tensors[9 : 9 + ctx.count]), list(ctx.saved_tensors[9 + ctx.count :])
    *of_inputs, of_given = ctx.needs_input_grad[:7]
    needs = [*of_inputs, *of_given]
    grads = torch.ops.mkconvlstm.layer_backward(
        *inputs, given, lengths, *ctx.settings, h, c, gates, dh, dh_n, dc_n, needs
    )
    remaining = iter(grads)
    found = [next(remaining) if needed else None for needed in needs]
    return *found[:6], found[6:], *[None] * (len(ctx.settings) + 2)


for _name, _kernel, _fake in (
    ("layer", _layer, _layer_fake),
    ("layer_backward", _layer_backward, _layer_backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mkconvlstm::{_name}", _fake, lib=_library)
torch.library.register_autograd("mkconvlstm::layer", _differentiate, setup_context=_save, lib=_library)

operations = torch.ops.mkconvlstm


def layer(
    backend: str,
    x: Tensor,
    z: Tensor | None,
    inputs: TransitionWeights | None,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
    output_peephole: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`functional.sequence` returns; ``z`` [T*B, 4F, H, W] where ``inputs`` is None."""
    tensors = [*([] if inputs is None else inputs.tensors()), *hidden.tensors()]
    given = [t for t in tensors if t is not None]
    x = x if z is None else x.detach()
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, z, h_0, c_0, peephole, bias, *given)
    )
    input_form = (None, False) if inputs is None else inputs.form
    recompute = recompute and z is None  # z cannot be computed again in there
    h, h_n, c_n, _, _ = torch.ops.mkconvlstm.layer(
        x, z, h_0, c_0, peephole, bias, given, lengths,
        [t is not None for t in tensors], str(dtype).removeprefix("torch."), *input_form, *hidden.form, output_peephole,
        recompute, backend, keep,
    )  # fmt: skip
    return h, h_n, c_n
