"""A row of a kernel's pixels side by side as channels, and the transpose of that."""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .plan import power_of_two

BLOCK_UNFOLDED, BLOCK_FOLDED = 4096, 1024  # numbers of a program
MOST_ROWS = 256  # of a program that folds: what it reads of them stays in the L1 cache


@triton.jit
def unfold_kernel(
    source_ptr,  # [rows, CHANNELS]
    target_ptr,  # [rows, UNFOLDED]
    rows,  # pixels of all images
    width,  # of an image
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,  # pixels of a row of the kernel
    UNFOLDED: tl.constexpr,  # at least KERNEL * CHANNELS; zeros beyond
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides UNFOLDED
):
    """What a pixel gets lies side by side in the source, too, as far as it is of the same row."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = (r % width)[:, None] + (k // CHANNELS - KERNEL // 2)[None, :]
    exists = (r < rows)[:, None] & (k < UNFOLDED)[None, :]
    inside = exists & (k < KERNEL * CHANNELS)[None, :] & (column >= 0) & (column < width)
    row = r.to(tl.int64)[:, None]
    values = tl.load(source_ptr + (row - KERNEL // 2) * CHANNELS + k[None, :], mask=inside, other=0.0)
    tl.store(target_ptr + row * UNFOLDED + k[None, :], values, mask=exists)


def unfold(source: Tensor, target: Tensor, kernel: int) -> None:
    """``target`` [N, H, W, UNFOLDED] from ``source`` [N, H, W, C], both contiguous, on a GPU."""
    *images, channels = source.shape
    unfolded = target.shape[3]
    block_k = gcd(unfolded, 128)
    block_r = BLOCK_UNFOLDED // block_k
    rows = images[0] * images[1] * images[2]
    options = {
        "CHANNELS": channels,
        "KERNEL": kernel,
        "UNFOLDED": unfolded,
        "BLOCK_R": block_r,
        "BLOCK_K": block_k,
    }
    grid = (-(-rows // block_r), unfolded // block_k, 1)
    launch(unfold_kernel, grid, (source, target, rows, images[2]), options)


@triton.jit
def fold_kernel(
    source_ptr,  # [rows, UNFOLDED]
    target_ptr,  # [rows, CHANNELS]
    rows,
    width,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    UNFOLDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of what all pixels got from a pixel, always in the same order, in float32."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    row = r.to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for j in tl.static_range(KERNEL):
        column = r % width + KERNEL // 2 - j
        inside = ((r < rows) & (column >= 0) & (column < width))[:, None] & (c < CHANNELS)[None, :]
        source = source_ptr + ((row + KERNEL // 2 - j) * UNFOLDED + j * CHANNELS)[:, None] + c[None, :]
        total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    mask = (r < rows)[:, None] & (c < CHANNELS)[None, :]
    tl.store(target_ptr + (row * CHANNELS)[:, None] + c[None, :], total.to(target_ptr.dtype.element_ty), mask=mask)


def fold(source: Tensor, target: Tensor, kernel: int) -> None:
    """``target`` [N, H, W, C] from ``source`` [N, H, W, UNFOLDED], both contiguous, on a GPU."""
    *images, channels = target.shape
    block_c = power_of_two(channels, 1, 1 << 30)
    block_r = max(1, min(MOST_ROWS, BLOCK_FOLDED // block_c))
    rows = images[0] * images[1] * images[2]
    options = {
        "CHANNELS": channels,
        "KERNEL": kernel,
        "UNFOLDED": source.shape[3],
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
    }
    launch(fold_kernel, (-(-rows // block_r), 1, 1), (source, target, rows, images[2]), options)
