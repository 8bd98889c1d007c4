"""Gradients of both transitions' weights as of one transition's, whose input is x_t and h_{t-1} side by side.

Of few pixels, the gradient of one convolution's weights leaves most of a GPU idle; of twice the channels it takes as
long.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import layout
from .aten import write_previous
from .concurrency import MOST_PIXELS, concurrently
from .convolution import BranchWeights, TransitionWeights, convolution_gradients

# Channels of x and h together: with others than multiples, cuDNN's kernels for some sizes are much slower; more fill a
# GPU, and take much memory side by side.
MULTIPLE, MOST_CHANNELS = 128, 512


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
    both = channels + hidden_channels
    few = batch * steps * height * width <= MOST_PIXELS and both <= MOST_CHANNELS
    return few and dtype in (torch.float16, torch.bfloat16) and both % MULTIPLE == 0


def side_by_side(x: Tensor, h: Tensor, h_0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x_t and h_{t-1} as channels of images [T*B, C + F, H, W], channels-last, in ``dtype``.

    ``x`` is [B, T, C, H, W], ``h`` [B, T, F, H, W], ``h_0`` [B, F, H, W] or None for zeros.
    """
    batch, steps, channels, height, width = x.shape
    images = x.new_empty((steps, batch, height, width, channels + h.shape[2]), dtype=dtype)
    both = images.permute(1, 0, 4, 2, 3)
    layout.copy(both[:, :, :channels], x)
    write_previous(both[:, :, channels:], h, h_0)
    return images.flatten(0, 1).permute(0, 3, 1, 2)


def joint_gradients(
    images: Tensor, dparts: Sequence[Tensor], w_x: TransitionWeights, w_h: TransitionWeights
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``w_x.tensors()`` and of ``w_h.tensors()``, contiguous, where that is :func:`possible`.

    ``images`` [N, C + F, H, W] are the transitions' inputs :func:`side_by_side`, ``dparts`` [N, 4*F_r, H, W] the
    gradients of the sum of their outputs, channels-last.
    """
    tasks = [
        partial(split_gradients, dy, images, of_x, of_h)
        for dy, of_x, of_h in zip(dparts, w_x.branches, w_h.branches, strict=True)
    ]
    rest = [None] * (TransitionWeights.TENSORS_PER_BRANCH - 1)
    grads: tuple[list[Tensor | None], list[Tensor | None]] = [], []
    for of_branch in concurrently(images.device, images.shape[0] * images.shape[2] * images.shape[3], tasks):
        for flat, grad in zip(grads, of_branch, strict=True):
            flat += [grad, *rest]
    for flat in grads:
        flat += [None, None]  # of the mix
    return grads


def split_gradients(dy: Tensor, images: Tensor, of_x: BranchWeights, of_h: BranchWeights) -> list[Tensor]:
    """The gradients [4*F_r, C, kh, kw] and [4*F_r, F, kh, kw] of one branch's weights in both transitions."""
    channels = [b.weight.shape[1] for b in (of_x, of_h)]
    weight = layout.weight_stand_in(dy, (dy.shape[1], sum(channels), *of_h.weight.shape[2:]))
    _, dw, _ = convolution_gradients(dy, images, weight, of_h.padding, of_h.dilation, (False, True, False))
    return [layout.contiguous(part) for part in dw.split(channels, 1)]
