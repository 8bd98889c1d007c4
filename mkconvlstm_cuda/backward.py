"""The backward of a whole layer: the recurrence by a backend, everything else over many steps at a time.

Gates, and their gradients in place of them, stay in the parts that convolutions write and read (see
:mod:`convolution`). What has to be laid out anew, x and h, is so for a span of steps only, which bounds the memory; all
at once where both are small (see :mod:`joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from . import aten, joint, layout, ops
from .concurrency import concurrently
from .convolution import TransitionWeights, images_of, input_gradient, premix, sequence_of, time_major, weight_gradients
from .interleaving import repart

SPAN_BYTES = 32 << 20  # that a span may always take
MOST_PIECES = 5


def spans(steps: int, count: int) -> list[slice]:
    """``steps`` in ``count`` even spans, or as many as there are steps, one after another."""
    count = max(1, min(steps, count))
    ends = [steps * n // count for n in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def pieces(x: Tensor, hidden_channels: int, dtype: torch.dtype) -> list[slice]:
    """The spans of steps of ``x`` [B, T, C, H, W] that are recomputed one by one; they hold x, h and gates.

    Backward begins with the last, when there are no gradients of x and weights yet: it may be twice as long as a share.
    """
    batch, steps, channels, height, width = x.shape
    bytes_of_all = batch * steps * (channels + 5 * hidden_channels) * height * width * dtype.itemsize
    count = min(steps, MOST_PIECES, -(-bytes_of_all // SPAN_BYTES))
    if count < 3:
        return spans(steps, count)
    last = steps - 2 * steps // count
    return [*spans(last, count - 1), slice(last, steps)]


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
    c: Tensor | None  # [B, T, F, H, W]; None where gates are recomputed; let go once it is not needed any more
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
    dbias: Tensor | None = None  # [4F], where needs_bias
    input_grads: list[Tensor | None] = field(init=False)
    hidden_grads: list[Tensor | None] = field(init=False)
    dpeephole: Tensor | None = field(init=False)

    def __post_init__(self):
        self.input_grads, self.hidden_grads = [None] * len(self.needs_input), [None] * len(self.needs_hidden)
        self.dpeephole = torch.zeros_like(self.peephole) if self.needs_peephole else None

    @property
    def spans(self) -> list[slice]:
        """All steps in spans whose copies of x or h, whichever is larger, take no more than the gates do."""
        of_h, of_x = self.h.numel() * self.dtype.itemsize, 0 if self.x is None else self.x.numel() * self.dtype.itemsize
        return spans(self.h.shape[1], -(-max(of_h, of_x) // max(SPAN_BYTES, 4 * of_h)))

    def h_before(self, step: int) -> Tensor | None:
        return self.h[:, step - 1] if step else self.h_0

    def at_once(self, gates: list[Tensor]) -> None:
        """Everything from the ``gates`` of all steps, which become their gradients; the list is emptied for dx."""
        steps = self.h.shape[1]
        self.recurrence(gates, slice(0, steps), self.c, self.c_0)
        self.c = self.dc_n = None  # not needed any more, and large
        if self.c_0 is None:
            self.dc_0 = None
        tasks = [partial(self.input, gates, slice(0, steps))] if self.needs_x else []
        if self.joins:
            # It has tasks itself, which take this stream's side streams: not the first. And `input` lets go of the
            # gates on this stream, which would use their memory again at once: they are held until all is done.
            tasks.append(partial(self.both_weights, list(gates)))
        else:
            tasks[:0] = [
                partial(self.over_spans, gates, self.hidden_weights, self.hidden_grads),
                partial(self.over_spans, gates, self.input_weights, self.input_grads),
            ]
        batch, _, _, height, width = self.h.shape
        concurrently(self.h.device, batch * steps * height * width, tasks)

    def in_pieces(
        self,
        starts: list[Tensor],
        preactivations: Callable[[slice], list[Tensor]],
        activate: Callable[[list[Tensor], Tensor | None, Tensor | None], Tensor],
    ) -> None:
        """Everything piece by piece, each from its X(x_t): with ``recompute`` no gates are ever held of all steps.

        ``starts``, emptied, are c before each piece but the first; ``activate(z, h_0, c_0)`` runs the recurrence once
        more, writes the gates over z and returns c of all its steps.
        """
        for here in reversed(pieces(self.x, self.h.shape[2], self.dtype)):
            c_0 = starts.pop() if here.start else self.c_0
            gates = preactivations(here)
            c = activate(gates, self.h_before(here.start), c_0)
            self.recurrence(gates, here, c, c_0)
            del c
            for weights in (self.hidden_weights, self.input_weights):
                weights(gates, here)
            if self.needs_x:
                self.input(gates, here)
            del gates  # before the next piece's are made
        lay_out(self.hidden_grads)
        lay_out(self.input_grads)

    def recurrence(self, gates: list[Tensor], here: slice, c: Tensor, c_0: Tensor | None) -> None:
        """Backward through the steps ``here``: ``gates`` become their gradients. The later steps have been.

        ``c`` are the cell states of these steps, ``c_0`` the one before.
        """
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
        w = self.w_h
        self.dh_0, self.dc_0, dbias = ops.sequence_backward(
            gates, self.h[:, here], c, w.tensors(), *w.form, self.h_before(here.start), c_0, self.peephole,
            self.output_peephole, dh, dc_n, lengths, self.needs_bias, self.backend,
        )  # fmt: skip
        if self.needs_bias:
            self.dbias = dbias if self.dbias is None else self.dbias + dbias
        if self.dpeephole is not None:
            self.dpeephole += aten.peephole_gradient(gates, c, c_0, self.peephole, self.output_peephole)

    def over_spans(
        self, dz: list[Tensor], add_gradients: Callable[[list[Tensor], slice], None], grads: list[Tensor | None]
    ) -> None:
        """``add_gradients`` to ``grads`` for all steps, span by span."""
        for here in self.spans:
            add_gradients([p[:, here] for p in dz], here)
        lay_out(grads)

    def hidden_weights(self, dz: list[Tensor], here: slice) -> None:
        """Add what ``dz``, the parts of the steps ``here``, has to say of the hidden transition's gradients."""
        if any(self.needs_hidden):
            # h_{-1} = 0 has nothing to add
            skip = here.start == 0 and self.h_0 is None and here.stop > 1 and not self.w_h.has_bias
            first = here.start + skip
            h_prev = aten.previous(self.h[:, first : here.stop], self.h_before(first), self.dtype)
            images = images_of([p[:, int(skip) :] for p in dz])
            add(self.hidden_grads, weight_gradients(h_prev, images, self.w_h, self.needs_hidden))

    def input_weights(self, dz: list[Tensor], here: slice) -> None:
        """The same of the input transition's gradients."""
        if any(self.needs_input):
            x = time_major(self.x[:, here], self.dtype)
            images = repart(images_of(dz), self.w_h.parts, self.w_x.parts)
            add(self.input_grads, weight_gradients(x, images, self.w_x, self.needs_input))

    @property
    def joins(self) -> bool:
        """Whether :meth:`both_weights` stands for :meth:`hidden_weights` and :meth:`input_weights`."""
        if not joint.possible(self.w_x, self.w_h, self.needs_input, self.needs_hidden):
            return False
        return self.x.is_cuda and joint.pays(self.x.shape, self.h.shape[2], self.dtype)

    def both_weights(self, dz: list[Tensor]) -> None:
        """The gradients of both transitions from ``dz`` of all steps at once."""
        images = joint.side_by_side(self.x, self.h, self.h_0, self.dtype)
        self.input_grads, self.hidden_grads = joint.joint_gradients(images, images_of(dz), self.w_x, self.w_h)

    def input(self, dz: list[Tensor], here: slice) -> None:
        """The gradient of x in the steps ``here``; ``dz`` is emptied."""
        images = images_of(dz)
        dz.clear()
        v = premix(time_major(self.x[:, here], self.dtype), self.w_x) if self.w_x.mix_tanh else None
        parts = repart(images, self.w_h.parts, self.w_x.parts)
        dx = sequence_of(input_gradient(parts, self.w_x, v), here.stop - here.start)
        if self.dx is None:
            self.dx = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        layout.copy(self.dx[:, here], dx)


def lay_out(grads: list[Tensor | None]) -> None:
    """Gradients of weights as weights are laid out, in place of themselves, or torch would do it, more slowly."""
    grads[:] = [layout.contiguous(g) if g is not None and g.dim() == 4 else g for g in grads]


def add(totals: list[Tensor | None], grads: list[Tensor | None]) -> None:
    """``totals`` plus ``grads``, in place; None is zero."""
    for n, grad in enumerate(grads):
        if grad is not None:
            totals[n] = grad if totals[n] is None else totals[n].add_(grad)
