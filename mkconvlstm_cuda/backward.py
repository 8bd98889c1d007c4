"""The backward of a whole layer: the recurrence by a backend, everything else over many steps at a time.

Gates, and their gradients in place of them, stay in the parts that convolutions write and read (see
:mod:`convolution`). What has to be laid out anew, x and h, is so for a span of steps only, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from . import aten, layout, ops
from .convolution import (
    TransitionWeights,
    input_gradient,
    premix,
    repart,
    sequence_of,
    time_major,
    weight_gradients,
)
from .reference import accumulate_dtype

SPAN_BYTES = 32 << 20  # that a span may always take


def spans(steps: int, bytes_each: int, kept: int) -> list[slice]:
    """``steps`` in as few even spans as take no more than SPAN_BYTES, or what is ``kept`` of each all the time."""
    most = max(SPAN_BYTES, steps * kept)
    count = min(steps, max(1, -(-steps * bytes_each // most)))
    ends = [steps * n // count for n in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def pieces(x: Tensor, hidden_channels: int, dtype: torch.dtype) -> list[slice]:
    """The steps of ``x`` [B, T, C, H, W] in spans of x, h and gates in ``dtype``, where h and c alone are kept."""
    batch, steps, channels, height, width = x.shape
    values = batch * height * width * dtype.itemsize
    return spans(steps, (channels + 5 * hidden_channels) * values, 2 * hidden_channels * values)


@dataclass
class LayerBackward:
    """Gradients of one call of a layer, gathered span by span; ``SequenceFunction`` says what the names mean."""

    backend: str
    output_peephole: str
    dtype: torch.dtype
    w_x: TransitionWeights | None
    w_h: TransitionWeights
    x: Tensor | None  # [B, T, C, H, W]; None without w_x
    h: Tensor  # [B, T, F, H, W]
    c: Tensor | None  # [B, T, F, H, W]; let go once it is not needed any more
    h_0: Tensor | None
    c_0: Tensor | None
    peephole: Tensor | None
    lengths: Tensor | None
    dh: Tensor | None  # [B, T, F, H, W], from outside
    dc_n: Tensor | None  # [B, F, H, W], from outside
    needs_input: Sequence[bool]  # which tensors of w_x want gradients
    needs_hidden: Sequence[bool]
    needs_x: bool
    needs_peephole: bool
    needs_bias: bool
    dh_0: Tensor | None = None  # of the state before the steps whose recurrence ran last
    dc_0: Tensor | None = None
    dx: Tensor | None = None  # [B, T, C, H, W], where needs_x
    input_grads: list[Tensor | None] = field(init=False)
    hidden_grads: list[Tensor | None] = field(init=False)
    dpeephole: Tensor | None = field(init=False)
    dbias: list[Tensor | None] | None = field(init=False)  # [4*F_p] of each part

    def __post_init__(self):
        self.w_x = None if self.w_x is None else self.w_x.channels_last()
        self.input_grads, self.hidden_grads = [None] * len(self.needs_input), [None] * len(self.needs_hidden)
        self.dpeephole = torch.zeros_like(self.peephole) if self.needs_peephole else None
        self.dbias = [None] * len(self.w_h.parts) if self.needs_bias else None

    @property
    def spans(self) -> list[slice]:
        """All steps in spans of x and h in the dtype of the convolutions, where h is kept anyway."""
        of_h, of_x = self.h[:, 0].numel(), 0 if self.x is None else self.x[:, 0].numel()
        return spans(self.h.shape[1], (of_h + of_x) * self.dtype.itemsize, of_h * self.dtype.itemsize)

    def state_before(self, step: int) -> tuple[Tensor | None, Tensor | None]:
        """h and c, the latter in the accumulate dtype, before ``step``."""
        if step == 0:
            return self.h_0, self.c_0
        return self.h[:, step - 1], self.c[:, step - 1].to(accumulate_dtype(self.dtype))

    def at_once(self, gates: list[Tensor]) -> None:
        """Everything from the ``gates`` of all steps, which become their gradients; the list is emptied for dx."""
        steps = self.h.shape[1]
        self.recurrence(gates, slice(0, steps))
        self.c = None  # not needed any more, and large
        if self.needs_bias:
            self.bias(images_of(gates))
        for here in self.spans:
            self.weights(images_of([p[:, here] for p in gates]), here)
        if self.needs_x:
            images = images_of(gates)
            gates.clear()
            self.input(images, slice(0, steps))

    def in_pieces(self, preactivations: Callable[[slice], list[Tensor]]) -> None:
        """Everything piece by piece, each from its X(x_t): with ``recompute`` no gates are ever held of all steps."""
        for here in reversed(pieces(self.x, self.h.shape[2], self.dtype)):
            gates = preactivations(here)
            self.activate(gates, here)
            self.recurrence(gates, here)
            images = images_of(gates)
            if self.needs_bias:
                self.bias(images)
            self.weights(images, here)
            if self.needs_x:
                self.input(images, here)

    def recompute(self, z: list[Tensor]) -> None:
        """The gates of all steps, written over the pre-activations ``z``."""
        for here in self.spans:
            self.activate([p[:, here] for p in z], here)

    def activate(self, z: list[Tensor], here: slice) -> None:
        aten.recompute_gates(
            z, self.h[:, here], self.c[:, here], self.w_h, *self.state_before(here.start), self.peephole,
            self.output_peephole,
        )  # fmt: skip

    def recurrence(self, gates: list[Tensor], here: slice) -> None:
        """Backward through the steps ``here``: ``gates`` become their gradients. The later steps have been."""
        dh = None if self.dh is None else self.dh[:, here]
        dc_n, lengths = self.dc_n, self.lengths
        if here.stop < self.h.shape[1]:  # what comes back from the step after these
            dh = torch.zeros_like(self.h[:, here]) if dh is None else dh.clone()
            dh[:, -1] += self.dh_0
            dc_n, lengths = self.dc_0, None
            if self.dc_n is not None and self.lengths is not None:
                dc_n = self.dc_n.where((self.lengths <= here.stop).view(-1, 1, 1, 1), self.dc_0)
                lengths = (self.lengths - here.start).clamp(max=here.stop - here.start)
        elif lengths is not None:
            lengths = lengths - here.start
        h_0, c_0 = self.state_before(here.start)
        w = self.w_h
        self.dh_0, self.dc_0 = ops.sequence_backward(
            gates, self.h[:, here], self.c[:, here], w.tensors(), *w.form, h_0, c_0, self.peephole,
            self.output_peephole, dh, dc_n, lengths, self.backend,
        )  # fmt: skip
        if self.dpeephole is not None:
            self.dpeephole += aten.peephole_gradient(gates, self.c[:, here], c_0, self.peephole, self.output_peephole)

    def bias(self, images: list[Tensor]) -> None:
        """Add what some steps' ``images`` have to say of the bias' gradient."""
        add(self.dbias, list(map(layout.channel_sums, images)))

    def weights(self, images: list[Tensor], here: slice) -> None:
        """Add what the steps ``here`` have to say of all weights' gradients."""
        if any(self.needs_hidden):
            # h_{-1} = 0 has nothing to add
            skip = here.start == 0 and self.h_0 is None and here.stop > 1 and not self.w_h.has_bias
            first = here.start + skip
            before = self.h[:, first - 1] if first else self.h_0
            h_prev = aten.previous(self.h[:, first : here.stop], before, self.dtype)
            seen = [p[skip * self.h.shape[0] :] for p in images]
            add(self.hidden_grads, weight_gradients(h_prev, seen, self.w_h, self.needs_hidden))
        if any(self.needs_input):
            x = time_major(self.x[:, here], self.dtype)
            images = repart(images, self.w_h.parts, self.w_x.parts)
            add(self.input_grads, weight_gradients(x, images, self.w_x, self.needs_input))

    def input(self, images: list[Tensor], here: slice) -> None:
        """The gradient of x in the steps ``here``; ``images`` is emptied."""
        v = premix(time_major(self.x[:, here], self.dtype), self.w_x) if self.w_x.mix_tanh else None
        parts = repart(images, self.w_h.parts, self.w_x.parts)
        dx = sequence_of(input_gradient(parts, self.w_x, v), here.stop - here.start)
        if self.dx is None:
            self.dx = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        layout.copy(self.dx[:, here], dx)


def images_of(parts: Sequence[Tensor]) -> list[Tensor]:
    """Parts [B, T, 4*F_p, H, W] as images [T*B, 4*F_p, H, W], channels-last to the last stride."""
    return [p.permute(1, 0, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2) for p in parts]


def add(totals: list[Tensor | None], grads: list[Tensor | None]) -> None:
    """``totals`` plus ``grads``, in place; None is zero."""
    for n, grad in enumerate(grads):
        if grad is not None:
            totals[n] = grad if totals[n] is None else totals[n].add_(grad)
