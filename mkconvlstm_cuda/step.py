"""Families of CUDA kernels that compute one step of the recurrence a launch: what they have in common.

See ``csrc/step``. Here weights are packed and memory is allocated; a family says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import TransitionWeights, whole_bias
from .reference import accumulate_dtype


def shape_refusal(parts: Sequence[Tensor], hidden: TransitionWeights, plan_refusal: Callable) -> str | None:
    """Why no launch serves ``parts`` [B, T, 4*F_r, H, W], else None, as far as it does not depend on the dtype."""
    if hidden.mix is not None or any(b.bottleneck is not None for b in hidden.branches):
        return "the hidden transition has 1x1 convolutions"
    batch, _, _, height, width = parts[0].shape
    branches = zip(hidden.sizes, kernels_of(hidden), strict=True)
    return plan_refusal(batch, height, width, tuple((size, *kernel) for size, kernel in branches))


def kernels_of(hidden: TransitionWeights) -> list[tuple[int, int, int, int]]:
    """Height, width and dilations of each branch's kernel."""
    return [(*b.weight.shape[2:], *b.dilation) for b in hidden.branches]


def padding(size: int, block: int) -> tuple[int, int]:
    """Zeros before and after ``size`` that complete its last block."""
    return 0, -size % block


def in_memory_order(states: Tensor) -> Tensor:
    """``states`` [B, T, C, H, W] as [T, B, H, W, C]: a view where they lie so in memory."""
    return states.permute(1, 0, 3, 4, 2)


def pixels(state: Tensor | None) -> Tensor | None:
    """``state`` [B, F, H, W] as contiguous [B, H, W, F]."""
    return None if state is None else state.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Family:
    """Operations ``NAME_forward`` and ``NAME_backward`` in ``torch.ops.mkconvlstm``; see ``library.py``.

    ``pack_forward`` and ``pack_backward`` lay out a weight [4*F_r, F, kh, kw] as the kernels read it. A pixel's hidden
    states begin at multiples of ``aligned(dtype)`` elements.
    """

    name: str
    pack_forward: Callable[[Tensor], Tensor]
    pack_backward: Callable[[Tensor], Tensor]
    aligned: Callable[[torch.dtype], int] = lambda _: 1

    def forward(
        self,
        z: Sequence[Tensor],
        hidden: TransitionWeights,
        h_0: Tensor | None,
        c_0: Tensor | None,
        peephole: Tensor | None,
        output_peephole: str,
        keep: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence forward; see :func:`mkconvlstm_cuda.ops.sequence_forward`."""
        batch, steps, _, height, width = z[0].shape
        state = (batch, height, width, sum(hidden.sizes))
        accumulate = accumulate_dtype(z[0].dtype)
        h = z[0].new_empty((batch, steps, state[-1], height, width))
        c = z[0].new_empty((steps if keep else 1, *state), dtype=accumulate)
        pad = padding(state[-1], self.aligned(h.dtype))
        bias = whole_bias(hidden, bias)
        getattr(torch.ops.mkconvlstm, f"{self.name}_forward")(
            list(map(in_memory_order, z)),
            [self.pack_forward(b.weight) for b in hidden.branches],
            sum(kernels_of(hidden), ()),
            None if h_0 is None else F.pad(pixels(h_0), pad),
            pixels(c_0),
            None if bias is None else bias.to(accumulate),
            None if peephole is None else peephole.contiguous(),
            output_peephole == "current",
            keep,
            z[0].new_empty((2, *state[:-1], state[-1] + pad[1])),
            h,
            c,
        )
        return h, c.permute(1, 0, 4, 2, 3)

    def backward(
        self,
        gates: Sequence[Tensor],
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
    ) -> tuple[Tensor | None, Tensor]:
        """The recurrence backward; see :func:`mkconvlstm_cuda.ops.sequence_backward`."""
        batch, _, channels, height, width = h.shape
        accumulate = accumulate_dtype(h.dtype)
        dc = h.new_empty((batch, height, width, channels), dtype=accumulate)
        dh_0 = None if h_0 is None else torch.empty_like(dc, dtype=h.dtype)
        getattr(torch.ops.mkconvlstm, f"{self.name}_backward")(
            list(map(in_memory_order, gates)),
            [self.pack_backward(b.weight) for b in hidden.branches],
            sum(kernels_of(hidden), ()),
            pixels(c_0),
            in_memory_order(c).to(accumulate).contiguous(),
            None if peephole is None else peephole.contiguous(),
            output_peephole == "current",
            None if dh is None else dh.to(h.dtype),
            None if dc_n is None else pixels(dc_n.to(accumulate)),
            None if lengths is None else lengths.contiguous(),
            dh_0,
            dc,
        )
        return None if dh_0 is None else dh_0.permute(0, 3, 1, 2), dc.permute(0, 3, 1, 2)
