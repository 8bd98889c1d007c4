"""Copies between layouts, and sums over pixels, at the rate of memory; torch's own take several times as long."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .plan import power_of_two, run_of

SUMS = 528  # programs that share the rows of a sum
FEW_ROWS = 4096  # that one program sums


@triton.jit
def copy_kernel(
    source_ptr,
    target_ptr,
    source_b,  # strides, those of the source divided by SOURCE_RUN, of the target by TARGET_RUN
    source_t,
    source_outer,  # from channel to channel where pixels lie side by side, else from pixel to pixel
    target_b,
    target_t,
    target_outer,
    steps,
    channels,
    pixels,
    p_tiles,
    c_tiles,
    SOURCE_RUN: tl.constexpr,  # divide all strides but 1, and the number of what lies side by side
    TARGET_RUN: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,  # divides the channels
    PIXEL_RUN: tl.constexpr,
    FROM_CHANNELS_LAST: tl.constexpr,
    TO_CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_P, BLOCK_C] of an image: read along what is contiguous there, written likewise."""
    tile = tl.program_id(0) % (p_tiles * c_tiles)
    image = (tl.program_id(0) // (p_tiles * c_tiles)).to(tl.int64)
    b = image // steps
    t = image % steps
    p = tile % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile // p_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < pixels // PIXEL_RUN * PIXEL_RUN)[:, None] & (c < channels // CHANNEL_RUN * CHANNEL_RUN)[None, :]
    source = source_ptr + (b * source_b + t * source_t) * SOURCE_RUN
    if FROM_CHANNELS_LAST:
        source = source + (p * (source_outer * SOURCE_RUN))[:, None] + c[None, :]
    else:
        source = source + (c * (source_outer * SOURCE_RUN))[None, :] + p[:, None]
    target = target_ptr + (b * target_b + t * target_t) * TARGET_RUN
    if TO_CHANNELS_LAST:
        target = target + (p * (target_outer * TARGET_RUN))[:, None] + c[None, :]
    else:
        target = target + (c * (target_outer * TARGET_RUN))[None, :] + p[:, None]
    tl.store(target, tl.load(source, mask=mask).to(target_ptr.dtype.element_ty), mask=mask)


def side(x: Tensor) -> tuple[bool, int, tuple[int, int, int]] | None:
    """Whether ``x`` [B, T, C, H, W] is channels-last, what divides its strides, and those (b, t, outer), divided.

    None where neither channels nor pixels lie side by side, or an image spans 2^31 elements.
    """
    _, _, channels, height, width = x.shape
    stride_b, stride_t, stride_c, stride_h, stride_w = x.stride()
    if height > 1 and stride_h != width * stride_w:
        return None
    last = stride_c == 1 and (stride_w != 1 or channels > 1)
    if not last and stride_w != 1:
        return None
    if (height * width if last else channels) * (stride_w if last else stride_c) >= 2**31:
        return None
    strides = (stride_b, stride_t, stride_w if last else stride_c)
    run = run_of(16, *strides, channels if last else height * width)
    return last, run, tuple(s // run for s in strides)


def copy(target: Tensor, source: Tensor) -> bool:
    """``target.copy_(source)``, both [B, T, C, H, W] on a GPU; False, and nothing done, where strides are others."""
    batch, steps, channels, height, width = source.shape
    from_side, to_side = side(source), side(target)
    if source.numel() == 0 or from_side is None or to_side is None:
        return False
    from_last, from_run, from_strides = from_side
    to_last, to_run, to_strides = to_side
    pixels = height * width
    block_c = power_of_two(channels, 8, 64)
    block_p = power_of_two(pixels, 8, 4096 // block_c)
    p_tiles = -(-pixels // block_p)
    options = {
        "SOURCE_RUN": from_run,
        "TARGET_RUN": to_run,
        "CHANNEL_RUN": run_of(16, channels),
        "PIXEL_RUN": run_of(16, pixels),
        "FROM_CHANNELS_LAST": from_last,
        "TO_CHANNELS_LAST": to_last,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
    }
    c_tiles = -(-channels // block_c)
    programs = batch * steps * p_tiles * c_tiles
    if programs >= 2**31:
        return False
    sizes = (steps, channels, pixels, p_tiles, c_tiles)
    launch(copy_kernel, (programs, 1, 1), (source, target, *from_strides, *to_strides, *sizes), options)
    return True


@triton.jit
def sum_kernel(
    source_ptr,  # [rows, columns]
    target_ptr,  # [programs 0, columns] float32
    rows,
    columns,
    COLUMN_RUN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every so many rows' sum, always in the same order."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = columns // COLUMN_RUN * COLUMN_RUN
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        offsets = (r.to(tl.int64) * columns)[:, None] + c[None, :]
        total += tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(target_ptr + tl.program_id(0) * columns + c, tl.sum(total, 0), mask=c < columns)


def row_sums(rows: Tensor) -> Tensor:
    """``rows.sum(0)``, [C] float32, for contiguous ``rows`` [N, C] on a GPU."""
    count, columns = rows.shape
    if count > FEW_ROWS:
        block_r = 32
        rows = partial_sums(rows, min(SUMS, -(-count // block_r)), block_r, power_of_two(columns, 8, 128))
    return partial_sums(rows, 1, 512, 8)[0]


def partial_sums(rows: Tensor, programs: int, block_r: int, block_c: int) -> Tensor:
    """The sum of ``rows`` [N, C] as one of ``programs`` rows, [programs, C] float32."""
    count, columns = rows.shape
    partial = torch.empty((programs, columns), dtype=torch.float32, device=rows.device)
    options = {"COLUMN_RUN": run_of(16, columns), "BLOCK_R": block_r, "BLOCK_C": block_c}
    launch(sum_kernel, (programs, -(-columns // block_c), 1), (rows, partial, count, columns), options)
    return partial
