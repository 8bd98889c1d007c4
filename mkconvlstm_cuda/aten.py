"""The ``aten`` backend: forward and backward written by hand from torch operations, for CPUs and any other device.

It computes what ``reference`` does, in the form that every fused backend shares: gates overwrite the pre-activations,
gate gradients overwrite the gates, and whatever needs no recurrence (weight gradients, recomputed gates) is done once
over all T. Images are channels-last in memory, and a step updates them in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .convolution import TransitionWeights, channels_last, input_gradient, premix, transition_forward
from .reference import accumulate_dtype

RECOMPUTE_CHUNK = 64  # images; bounds what recompute_gates holds beside the gates themselves


def empty_states(like: Tensor, batch: int, steps: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [B, steps, F, H, W], channels-last, for ``like`` [B, T, 4F, H, W]."""
    gates, height, width = like.shape[2:]
    return like.new_empty((batch, steps, height, width, gates // 4), dtype=dtype).permute(0, 1, 4, 2, 3)


def initial_state(state: Tensor | None, z: Tensor, dtype: torch.dtype) -> Tensor:
    """``state`` [B, F, H, W] channels-last in ``dtype``; zeros where it is None."""
    batch, _, gates, height, width = z.shape
    if state is None:
        return channels_last(z.new_zeros((batch, gates // 4, height, width), dtype=dtype))
    return channels_last(state.to(dtype))


def previous(states: Tensor, initial: Tensor | None) -> Tensor:
    """States before each step, [B, T, F, H, W] channels-last: ``initial`` (zeros if None), then all but the last."""
    batch, steps, hidden, height, width = states.shape
    out = states.new_empty((batch, steps, height, width, hidden)).permute(0, 1, 4, 2, 3)
    out[:, 0] = 0 if initial is None else initial
    out[:, 1:] = states[:, :-1]
    return out


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
    z: Tensor, u: Tensor | None, c_prev: Tensor, peephole: Tensor | None, output_peephole: str
) -> tuple[Tensor, Tensor]:
    """Gates and state update of one step; ``z`` [B, 4F, H, W] becomes the gates of ``z + u``.

    Returns h [B, F, H, W] in z's dtype and c in the accumulate dtype, channels-last.
    """
    gates = z.unflatten(1, (4, -1))
    a = gates.to(c_prev.dtype)  # z itself where the dtypes agree
    if u is not None:
        a += u.unflatten(1, (4, -1))
    c = activate(a, c_prev, peephole, output_peephole)
    if a.dtype != z.dtype:
        gates.copy_(a)
    return (a[:, 3] * c.tanh()).to(z.dtype), c


def forward(
    z: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    gate_step: Callable = gate_step,
) -> tuple[Tensor, Tensor]:
    """The recurrence forward; see :mod:`mkconvlstm_cuda.ops`."""
    hidden = hidden.channels_last()
    batch, steps = z.shape[:2]
    h, c = initial_state(h_0, z, z.dtype), initial_state(c_0, z, accumulate_dtype(z.dtype))
    hs = z.new_empty((batch, steps, h.shape[1], *z.shape[3:]))
    cs = empty_states(z, batch, steps if keep else 1, c.dtype)
    for t in range(steps):
        is_zero = t == 0 and h_0 is None and not hidden.has_bias  # then so is U(h)
        u = None if is_zero else transition_forward(h, hidden)
        h, c = gate_step(z[:, t], u, c, peephole, output_peephole)
        hs[:, t] = h
        cs[:, t if keep else 0] = c
    return hs, cs


def recompute_gates(
    z: Tensor,
    h: Tensor,
    c: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
) -> Tensor:
    """Gates of all steps at once, written over ``z`` [B, T, 4F, H, W]: every h_{t-1} and c_{t-1} is known by now."""
    acc, hidden = accumulate_dtype(z.dtype), hidden.channels_last()
    chunk = max(1, RECOMPUTE_CHUNK // max(1, z.shape[0]))
    for first in range(0, z.shape[1], chunk):
        part = slice(first, first + chunk)
        h_prev = previous(h[:, part], h_0 if first == 0 else h[:, first - 1]).flatten(0, 1)
        c_prev = previous(c[:, part], c_0 if first == 0 else c[:, first - 1]).flatten(0, 1).to(acc)
        images = z[:, part].flatten(0, 1)
        gate_step(images, transition_forward(h_prev, hidden), c_prev, peephole, output_peephole)
        z[:, part] = images.unflatten(0, h[:, part].shape[:2])
    return z


def gate_step_backward(
    gates: Tensor,
    dh: Tensor | None,
    dh_prev: Tensor | None,
    dc: Tensor,
    c_prev: Tensor,
    c: Tensor,
    peephole: Tensor | None,
    output_peephole: str,
) -> Tensor:
    """Backward of :func:`gate_step`: ``gates`` [B, 4F, H, W] become the gradient of the pre-activations.

    ``dh`` and ``dh_prev`` [B, F, H, W] are h_t's gradients from outside and from step t+1, None for zeros; ``dc`` is
    c_t's from step t+1, in the accumulate dtype, as are c_{t-1} and c_t. Returns c_{t-1}'s gradient.
    """
    sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
    gates = gates.unflatten(1, (4, -1))
    a = gates.to(c.dtype)
    i, f, g, o = a.unbind(1)
    terms = [channels_last(d).to(c.dtype) for d in (dh, dh_prev) if d is not None]
    dh = sum(terms) if terms else torch.zeros_like(c)
    tanh_c = c.tanh()
    dz_o = sigmoid_backward(dh * tanh_c, o)
    dc = dc + tanh_backward(dh * o, tanh_c)
    if peephole is not None and output_peephole == "current":
        dc = dc + peephole[2] * dz_o
    batch, hidden, height, width = c.shape
    dz = c.new_empty((batch, height, width, 4, hidden)).permute(0, 3, 4, 1, 2)
    torch.mul(dc, g, out=dz[:, 0])
    torch.mul(dc, c_prev, out=dz[:, 1])
    dz[:, :2] = sigmoid_backward(dz[:, :2], a[:, :2])
    dz[:, 2] = tanh_backward(dc * i, g)
    dz[:, 3] = dz_o
    dc_prev = dc * f
    if peephole is not None:
        dc_prev = dc_prev + peephole[0] * dz[:, 0] + peephole[1] * dz[:, 1]
        if output_peephole == "previous":
            dc_prev = dc_prev + peephole[2] * dz_o
    gates.copy_(dz)
    return dc_prev


def backward(
    gates: Tensor,
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
    gate_step_backward: Callable = gate_step_backward,
) -> tuple[Tensor | None, Tensor]:
    """The recurrence backward; see :mod:`mkconvlstm_cuda.ops`."""
    hidden = hidden.channels_last()
    batch, steps = gates.shape[:2]
    acc = accumulate_dtype(gates.dtype)
    dc = initial_state(dc_n if lengths is None else None, gates, acc).clone()  # a step may overwrite it
    v = premix(previous(h, h_0).flatten(0, 1), hidden).unflatten(0, (batch, steps)) if hidden.mix_tanh else None
    dh_prev = None
    for t in reversed(range(steps)):
        if lengths is not None and dc_n is not None:
            dc = dc + dc_n * (lengths == t + 1).view(-1, 1, 1, 1)
        c_prev = c[:, t - 1].to(acc) if t > 0 else initial_state(c_0, gates, acc)
        dh_t = None if dh is None else dh[:, t]
        dc = gate_step_backward(gates[:, t], dh_t, dh_prev, dc, c_prev, c[:, t].to(acc), peephole, output_peephole)
        if t > 0 or h_0 is not None:
            dh_prev = input_gradient(gates[:, t], hidden, None if v is None else v[:, t])
    return (dh_prev if h_0 is not None else None), dc


def peephole_gradient(dz: Tensor, c: Tensor, c_0: Tensor | None, peephole: Tensor, output_peephole: str) -> Tensor:
    """Gradient of the peepholes [3, F, 1 or H, 1 or W] from ``dz`` [B, T, 4F, H, W] and ``c`` [B, T, F, H, W]."""
    acc = accumulate_dtype(dz.dtype)
    total = torch.zeros((3, *c.shape[2:]), dtype=acc, device=c.device)
    for t in range(dz.shape[1]):
        c_prev = c[:, t - 1] if t > 0 else initial_state(c_0, dz, acc)
        dz_i, dz_f, _, dz_o = dz[:, t].unflatten(1, (4, -1)).unbind(1)
        seen_by_o = c[:, t] if output_peephole == "current" else c_prev
        for row, (gradient, cell) in enumerate(((dz_i, c_prev), (dz_f, c_prev), (dz_o, seen_by_o))):
            total[row] += (gradient.to(acc) * cell).sum(0)
    return total.sum_to_size(peephole.shape).to(peephole.dtype)
