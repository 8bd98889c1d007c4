"""One convolution's weights into the blocks that ``convolve.py`` reads."""

import triton
import triton.language as tl

from .gates import round_to_tf32


@triton.jit
def pack_kernel(
    weight_ptr,  # [outputs, inputs, kh*kw]
    packed_ptr,  # [tiles, blocks of k, taps, BLOCK_N, BLOCK_K], written
    taps,
    run,  # tiles whose columns follow one another
    run_stride,  # elements of a tap from one such run to the next
    groups_stride,  # from one group of CHANNELS columns of a tile to the next (branches, forward: from gate to gate)
    n_stride,  # from one column to the next
    n_count,  # columns of a group
    k_stride,
    k_count,
    blocks,
    ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr,  # columns of a group in one tile
    ROWS: tl.constexpr,  # columns of a tile that one program packs
    QUADS: tl.constexpr,  # columns are in the order of convolve.take_gates
    TAPS: tl.constexpr,  # and taps: they lie side by side in the weights
):
    """Program (tile * blocks + block, rows, taps): TAPS x ROWS x BLOCK_K weights, zeros where there are none."""
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    place = n
    if QUADS:
        value = n // 8 * 2 + n % 2
        place = value // (CHANNELS // 4) * CHANNELS + n // 2 % 4 * (CHANNELS // 4) + value % (CHANNELS // 4)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tile % run * CHANNELS + place % CHANNELS
    first = tile // run * run_stride + place // CHANNELS * groups_stride + column * n_stride
    source = weight_ptr + (first[:, None] + (k * k_stride)[None, :]).to(tl.int64) * taps
    mask = (column < n_count)[:, None] & (k < k_count)[None, :]
    target = packed_ptr + tl.program_id(0).to(tl.int64) * taps * (BLOCK_N * BLOCK_K)
    target += n[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tap_first = tl.program_id(2) * TAPS
    for tap in range(tap_first, tl.minimum(tap_first + TAPS, taps)):
        w = tl.load(source + tap, mask=mask, other=0.0)
        tl.store(target + tap * (BLOCK_N * BLOCK_K), round_to_tf32(w) if ROUND else w)
