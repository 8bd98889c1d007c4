"""The ``aten`` backend: forward and backward written by hand from torch operations, for CPUs and any other device.

It computes what ``reference`` does, in the form that every fused backend shares: gates overwrite the pre-activations,
gate gradients overwrite the gates, and whatever needs no recurrence (the gradients of weights and input) is done once
over all T. Time is outermost in memory, images are channels-last, and a step updates them in place. Pre-activations,
gates and their gradients come in parts (see :mod:`convolution`), each seen as [B, T, 4*F_p, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import compiled, layout, library
from .convolution import (
    TransitionWeights,
    channels_last,
    input_gradient,
    premix,
    sequence_of,
    transition_parts,
)
from .reference import accumulate_dtype

Parts = Sequence[Tensor]


def empty_states(parts: Parts, steps: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, steps, F, H, W] for ``parts`` [B, T, 4*F_p, H, W]; time outermost in memory, channels-last."""
    batch, _, _, height, width = parts[0].shape
    hidden = sum(p.shape[2] for p in parts) // 4
    return parts[0].new_empty((steps, batch, height, width, hidden), dtype=dtype).permute(1, 0, 4, 2, 3)


def initial_state(state: Tensor | None, parts: Parts, dtype: torch.dtype) -> Tensor:
    """``state`` [B, F, H, W] channels-last in ``dtype``; zeros where it is None."""
    return empty_states(parts, 1, dtype)[:, 0].zero_() if state is None else channels_last(state.to(dtype))


def previous(states: Tensor, initial: Tensor | None, dtype: torch.dtype) -> Tensor:
    """States before each step as :func:`time_major` images: ``initial`` (None: zeros), then all but the last."""
    batch, steps, hidden, height, width = states.shape
    out = states.new_empty((steps, batch, height, width, hidden), dtype=dtype).permute(1, 0, 4, 2, 3)
    write_previous(out, states, initial)
    return out.transpose(0, 1).flatten(0, 1)


def write_previous(out: Tensor, states: Tensor, initial: Tensor | None) -> None:
    """States before each step, of the states [B, T, F, H, W] after each, to ``out`` of the same shape."""
    out[:, 0] = 0 if initial is None else initial
    layout.copy(out[:, 1:], states[:, :-1])


def slices(parts: Parts) -> Iterator[tuple[Tensor, slice]]:
    """Each of ``parts`` [N, 4*F_p, H, W] as [N, 4, F_p, H, W], and which hidden channels are its own."""
    first = 0
    for part in parts:
        gates = part.unflatten(1, (4, -1))
        yield gates, slice(first, first + gates.shape[2])
        first += gates.shape[2]


def activate(z: Tensor, c_prev: Tensor, peephole: Tensor | None, output_peephole: str) -> Tensor:
    """Turn pre-activations [N, 4, F, H, W] into gates i f g o, in place; returns c [N, F, H, W]."""
    i, f, g, o = z.unbind(1)
    if peephole is not None:
        w_ci, w_cf, w_co = peephole
        i.addcmul_(w_ci, c_prev)
        f.addcmul_(w_cf, c_prev)
    z[:, :2].sigmoid_()
    g.tanh_()
    c = torch.addcmul(f * c_prev, i, g)
    if peephole is not None:
        o.addcmul_(w_co, c if output_peephole == "current" else c_prev)
    o.sigmoid_()
    return c


def gate_step(
    z: Parts, u: Parts, c_prev: Tensor, peephole: Tensor | None, output_peephole: str
) -> tuple[Tensor, Tensor]:
    """Gates and state update of one step; ``z``, parts [B, 4*F_p, H, W], become the gates of ``z + u``.

    ``u`` is empty where it would be zero. Returns h [B, F, H, W] in z's dtype and c in the accumulate dtype.
    """
    h, c = torch.empty_like(c_prev, dtype=z[0].dtype), torch.empty_like(c_prev)
    for p, (gates, channels) in enumerate(slices(z)):
        a = gates.to(c_prev.dtype)  # z itself where the dtypes agree
        if u:
            a += u[p].unflatten(1, (4, -1))
        weights = None if peephole is None else peephole[:, channels]
        c_p = activate(a, c_prev[:, channels], weights, output_peephole)
        if a.dtype != gates.dtype:
            gates.copy_(a)
        c[:, channels] = c_p
        h[:, channels] = a[:, 3] * c_p.tanh_()
    return h, c


def steps_on(device: torch.device) -> tuple[Callable, Callable]:
    """The gate step and its backward: the CPU library's where it is loaded, those in torch operations elsewhere."""
    if device.type == "cpu" and library.load("cpu") is None:
        return compiled.gate_step, compiled.gate_step_backward
    return gate_step, gate_step_backward


def forward(
    z: Parts,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    gate_step: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence forward; see :mod:`mkconvlstm_cuda.ops`."""
    gate_step = gate_step or steps_on(z[0].device)[0]
    batch, steps = z[0].shape[:2]
    hidden = hidden.channels_last().prepared((batch, *z[0].shape[3:]), steps)
    h, c = initial_state(h_0, z, z[0].dtype), initial_state(c_0, z, accumulate_dtype(z[0].dtype))
    hs = z[0].new_empty((batch, steps, *h.shape[1:]))
    cs = empty_states(z, steps if keep else 1, c.dtype)
    for t in range(steps):
        is_zero = t == 0 and h_0 is None and not hidden.has_bias  # then so is U(h)
        u = [] if is_zero else transition_parts(h, hidden)
        h, c = gate_step([p[:, t] for p in z], u, c, peephole, output_peephole)
        hs[:, t] = h
        cs[:, t if keep else 0] = c
    return hs, cs


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
    """Backward of :func:`gate_step`: ``gates``, parts [B, 4*F_p, H, W], become the pre-activations' gradient.

    ``dh`` and ``dh_prev`` [B, F, H, W] are h_t's gradients from outside and from step t+1, None for zeros; ``dc`` is
    c_t's from step t+1, in the accumulate dtype, as are c_{t-1} and c_t. Returns c_{t-1}'s gradient.
    """
    sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    terms = [channels_last(d).to(c.dtype) for d in (dh, dh_prev) if d is not None]
    dh = sum(terms) if terms else torch.zeros_like(c)
    dc_prev = torch.empty_like(c)
    for kept, channels in slices(gates):
        i, f, g, o = kept.to(c.dtype).unbind(1)
        w_ci, w_cf, w_co = (None,) * 3 if peephole is None else peephole[:, channels]
        dh_p, tanh_c = dh[:, channels], c[:, channels].tanh()
        dz_o = sigmoid_backward(dh_p * tanh_c, o)
        dc_p = dc[:, channels] + tanh_backward(dh_p * o, tanh_c)
        if peephole is not None and output_peephole == "current":
            dc_p = dc_p + w_co * dz_o
        dz_i, dz_f = sigmoid_backward(dc_p * g, i), sigmoid_backward(dc_p * c_prev[:, channels], f)
        dz_g, dc_p = tanh_backward(dc_p * i, g), dc_p * f
        if peephole is not None:
            dc_p = dc_p + w_ci * dz_i + w_cf * dz_f
            if output_peephole == "previous":
                dc_p = dc_p + w_co * dz_o
        for gate, dz in zip(kept.unbind(1), (dz_i, dz_f, dz_g, dz_o), strict=True):
            gate.copy_(dz)
        dc_prev[:, channels] = dc_p
    return dc_prev


def backward(
    gates: Parts,
    h: Tensor,
    c: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    dh: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
    gate_step_backward: Callable | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The recurrence backward; see :mod:`mkconvlstm_cuda.ops`."""
    gate_step_backward = gate_step_backward or steps_on(gates[0].device)[1]
    hidden = hidden.channels_last()
    batch, steps = gates[0].shape[:2]
    acc = accumulate_dtype(gates[0].dtype)
    if dh is not None and 1 not in dh.shape[3:] and dh.stride(3) != dh.shape[4] * dh.stride(4):
        dh = dh.clone(memory_format=torch.contiguous_format)  # a step takes pixels at one stride; cat on W gives two
    dc = initial_state(dc_n if lengths is None else None, gates, acc).clone()  # a step may overwrite it
    v = sequence_of(premix(previous(h, h_0, h.dtype), hidden), steps) if hidden.mix_tanh else None
    hidden = hidden.prepared((batch, *gates[0].shape[3:]), steps, gradient=True)
    dh_prev = None
    for t in reversed(range(steps)):
        if lengths is not None and dc_n is not None:
            dc = dc + dc_n * (lengths == t + 1).view(-1, 1, 1, 1)
        c_prev = c[:, t - 1].to(acc) if t > 0 else initial_state(c_0, gates, acc)
        dh_t, now = None if dh is None else dh[:, t], [g[:, t] for g in gates]
        dc = gate_step_backward(now, dh_t, dh_prev, dc, c_prev, c[:, t].to(acc), peephole, output_peephole)
        if t > 0 or h_0 is not None:
            dh_prev = input_gradient(now, hidden, None if v is None else v[:, t])
    return (dh_prev if h_0 is not None else None), dc


def peephole_gradient(dz: Parts, c: Tensor, c_0: Tensor | None, peephole: Tensor, output_peephole: str) -> Tensor:
    """Gradient of the peepholes [3, F, 1 or H, 1 or W], in the accumulate dtype, from all steps' ``dz`` and c."""
    acc = accumulate_dtype(dz[0].dtype)
    total = torch.zeros((3, *c.shape[2:]), dtype=acc, device=c.device)
    for t in range(c.shape[1]):
        c_prev = c[:, t - 1] if t > 0 else initial_state(c_0, dz, acc)
        seen_by_o = c[:, t] if output_peephole == "current" else c_prev
        for gates, channels in slices([p[:, t] for p in dz]):
            for row, (gate, cell) in enumerate(((0, c_prev), (1, c_prev), (3, seen_by_o))):
                total[row, channels] += (gates[:, gate].to(acc) * cell[:, channels]).sum(0)
    return total.sum_to_size(peephole.shape)
