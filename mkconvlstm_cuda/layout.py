"""Tensors laid out anew: by Triton kernels on GPUs that have them, else by torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import triton_backend

FEWEST = 1 << 19  # elements that our own copy pays for: torch's is slow on the GPU, ours takes longer to launch


def has_kernels(*tensors: Tensor) -> bool:
    """Whether Triton kernels may stand in for torch: nothing has to see, trace or differentiate what they do."""
    if not all(t.is_cuda for t in tensors) and not triton_backend.interpreted():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not torch.compiler.is_compiling() and triton_backend.available() is None


def copy(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` for [B, T, C, H, W] of any strides and dtypes."""
    if source.numel() >= FEWEST and has_kernels(target, source):
        from .triton_kernels import layout

        with torch.cuda.device_of(source):
            if layout.copy(target, source):
                return
    target.copy_(source)


def channels_last(weight: Tensor) -> Tensor:
    """``weight`` [outputs, inputs, kh, kw] with inputs innermost in memory, not differentiable."""
    return as_format(weight, torch.channels_last)


def contiguous(weight: Tensor) -> Tensor:
    """``weight`` [outputs, inputs, kh, kw] with kernels innermost in memory, not differentiable."""
    return as_format(weight, torch.contiguous_format)


def as_format(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    if weight.is_contiguous(memory_format=memory_format):
        return weight
    out = torch.empty_like(weight, memory_format=memory_format)
    copy(out[None], weight.detach()[None])
    return out


def stand_in(dy: Tensor, channels: int, count: int | None = None) -> Tensor:
    """Channels-last images [count, ``channels``, H, W] in place of an input whose values nobody reads.

    ``dy`` [N, ..., H, W] is the output's gradient; ``count`` is N unless given.

    torch lays a gradient out anew, and back, where the input that it belongs to is not channels-last too. They need no
    memory of their own where dy's suffices.
    """
    n, outputs, height, width = dy.shape
    count = n if count is None else count
    size, strides = (count, channels, height, width), (height * width * channels, 1, width * channels, channels)
    if count * channels <= n * outputs:
        return dy.as_strided(size, strides)
    return dy.new_zeros((count, height, width, channels)).permute(0, 3, 1, 2)  # copied, in some of torch's ways


def weight_stand_in(dy: Tensor, shape: Sequence[int]) -> Tensor:
    """A weight of ``shape`` (O, C, kh, kw), channels-last, in place of one whose values nobody reads, in dy's memory.

    ``dy`` [N, O, H, W] is dense: its numbers follow one another in memory from its first. torch copies the weight, in
    some of its ways, so that it has to be memory that has been written.
    """
    outputs, channels, height, width = shape
    if math.prod(shape) <= dy.numel():
        return dy.as_strided(tuple(shape), (height * width * channels, 1, width * channels, channels))
    return dy.new_zeros((outputs, height, width, channels)).permute(0, 3, 1, 2)


def channel_sums(images: Tensor) -> Tensor:
    """``images.sum((0, 2, 3))`` for ``images`` [N, C, H, W]: [C], float32 for half types."""
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    if images.numel() >= FEWEST and channels_last:
        return row_sums(images.permute(0, 2, 3, 1).flatten(0, 2))
    return images.sum((0, 2, 3), dtype=torch.promote_types(images.dtype, torch.float32))


def row_sums(rows: Tensor) -> Tensor:
    """``rows.sum(0)`` for contiguous ``rows`` [N, C]: [C], float32 for half types."""
    if rows.numel() > 0 and has_kernels(rows) and rows.dtype != torch.float64:
        from .triton_kernels import layout

        with torch.cuda.device_of(rows):
            return layout.row_sums(rows)
    return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
