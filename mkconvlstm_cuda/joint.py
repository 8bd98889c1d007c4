"""Gradients of both transitions' weights as of one transition's, whose input is x_t and h_{t-1} side by side.

Of few pixels, the gradient of one convolution's weights leaves most of a GPU idle; of twice the channels it takes as
long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .concurrency import MOST_PIXELS
from .convolution import BranchWeights, TransitionWeights, weight_gradients

MULTIPLE = 128  # of the channels of x and h together: with others, cuDNN's kernels for some sizes are much slower


def possible(
    w_x: TransitionWeights | None, w_h: TransitionWeights, needs_x: Sequence[bool], needs_h: Sequence[bool]
) -> bool:
    """Whether the transitions have the same kernels, and nothing but these; and all of them want gradients.

    ``needs_x`` and ``needs_h`` say which of :meth:`TransitionWeights.tensors` do.
    """
    if w_x is None or kernels(w_x) != kernels(w_h):
        return False
    return wants_kernels(w_x, needs_x) and wants_kernels(w_h, needs_h)


def kernels(w: TransitionWeights) -> list[tuple[int, ...]]:
    """Of each branch the outputs, the kernel's size and its dilation."""
    return [(b.weight.shape[0], *b.weight.shape[2:], *b.dilation) for b in w.branches]


def wants_kernels(w: TransitionWeights, needs: Sequence[bool]) -> bool:
    """Whether ``w`` consists of its branches' weights alone, and ``needs`` is true for each of them."""
    return sum(needs) == len(w.branches) and [t is not None for t in w.tensors()] == list(needs)


def pays(shape: Sequence[int], hidden_channels: int, dtype: torch.dtype) -> bool:
    """Whether it is faster so, in ``dtype``, for x of ``shape`` (B, T, C, H, W). Measured on an H100 in bfloat16."""
    batch, steps, channels, height, width = shape
    few = batch * steps * height * width <= MOST_PIXELS
    return few and dtype in (torch.float16, torch.bfloat16) and (channels + hidden_channels) % MULTIPLE == 0


def joint_gradients(
    x: Tensor, h_prev: Tensor, dparts: list[Tensor], w_x: TransitionWeights, w_h: TransitionWeights
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``w_x.tensors()`` and of ``w_h.tensors()``, where that is :func:`possible`.

    ``x`` [N, C, H, W] and ``h_prev`` [N, F, H, W] are the transitions' inputs, ``dparts`` the gradients of the sum of
    their outputs, [N, 4*F_r, H, W]; all channels-last.
    """
    both = torch.cat([x, h_prev], 1)
    branches = [
        BranchWeights(b.weight.new_empty((b.weight.shape[0], both.shape[1], *b.weight.shape[2:])), dilation=b.dilation)
        for b in w_h.branches  # nobody reads these weights' values
    ]
    needs = [t is not None for t in w_h.tensors()]
    grads = weight_gradients(both, dparts, TransitionWeights(tuple(branches)), needs)
    channels = [x.shape[1], h_prev.shape[1]]
    split = [(None, None) if g is None else g.split(channels, 1) for g in grads]
    of_x, of_h = zip(*split, strict=True)
    return list(of_x), list(of_h)
