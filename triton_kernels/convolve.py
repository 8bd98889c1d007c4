"""The convolution of all kernel sizes as one matrix product, in pieces that a schedule lists (see ``schedule.py``)."""

import triton
import triton.language as tl

SEGMENT = tl.constexpr(19)  # integers a segment: see schedule.Segment.row
FINISH = tl.constexpr(9)  # integers a row of what is to be finished: schedule.Finish's fields


@triton.jit
def accumulate(
    acc,  # [BLOCK_M, BLOCK_N] float32
    row,  # -> one segment, [SEGMENT] int32
    active,  # False: the image is all zeros, add nothing
    image_ptr,  # [B*H*W, stride] of one step
    weights,  # descriptor of [iterations of all tiles, BLOCK_N, BLOCK_K], flattened to two dimensions: see launch.py
    rows,  # B*H*W
    height,
    width,
    HALVES: tl.constexpr,  # the order of rows is that of take_gates
    DEPTH_RUN: tl.constexpr,  # divides every depth, stride and first channel
    EVEN_K: tl.constexpr,  # every depth is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc`` plus iterations ``k_first .. k_last`` of one part: blocks of BLOCK_K channels, taps innermost."""
    m_tile = tl.load(row)
    k_first = tl.load(row + 1)
    k_last = tl.where(active, tl.load(row + 2), k_first)
    weight_first = tl.load(row + 8)
    kernel_h = tl.load(row + 9)
    kernel_w = tl.load(row + 10)
    first_y = tl.load(row + 11)
    first_x = tl.load(row + 12)
    step_y = tl.load(row + 13)
    step_x = tl.load(row + 14)
    depth = tl.multiple_of(tl.load(row + 15), DEPTH_RUN)
    stride = tl.multiple_of(tl.load(row + 17), DEPTH_RUN)
    channel_first = tl.multiple_of(tl.load(row + 18), DEPTH_RUN)

    # This tile's pixels, and where they lie.
    m = tl.arange(0, BLOCK_M)
    p = m_tile * BLOCK_M + (m // 16 * 8 + m % 8 + m // 8 % 2 * (BLOCK_M // 2) if HALVES else m)
    pixel = p % (height * width)
    y = tl.where(p < rows, pixel // width, -(1 << 28))  # beyond the last row: outside the image for every tap
    x = pixel % width
    image_rows = image_ptr + (p.to(tl.int64) * stride + channel_first)

    k = tl.arange(0, BLOCK_K)
    taps = kernel_h * kernel_w
    block = k_first // taps
    tap_y = k_first % taps // kernel_w
    tap_x = k_first % taps % kernel_w
    for it in range(k_first, k_last):
        dy = first_y + tap_y * step_y
        dx = first_x + tap_x * step_x
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        channel = block * BLOCK_K + k
        mask = inside[:, None]
        if not EVEN_K:
            mask = mask & (channel < depth)[None, :]
        shift = (dy * width + dx) * stride
        a = tl.load(image_rows[:, None] + (shift + channel)[None, :], mask=mask, other=0.0)
        w = weights.load([(weight_first + it) * BLOCK_N, 0])
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION)

        tap_x += 1
        tap_y = tl.where(tap_x == kernel_w, tap_y + 1, tap_y)
        tap_x = tl.where(tap_x == kernel_w, 0, tap_x)
        block = tl.where(tap_y == kernel_h, block + 1, block)
        tap_y = tl.where(tap_y == kernel_h, 0, tap_y)
    return acc


@triton.jit
def take_gates(acc, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The gates of a product's first or second half of pixels, [BLOCK_M / 2, BLOCK_N / 4] each.

    A thread of the tensor cores has rows r and r + 8 of each 16, and columns 2q and 2q + 1 of each 8. So that it keeps
    what it has, all r are one half and all r + 8 the other, and the columns of each q are four gates of the same
    channels, side by side in memory: ``accumulate`` orders pixels and ``pack_kernel`` columns so.
    """
    rows = tl.permute(tl.reshape(acc, (BLOCK_M // 16, 2, 8, BLOCK_N)), (0, 2, 3, 1))
    first, second = tl.split(rows)
    half = second if HALF == 1 else first
    quads = tl.permute(tl.reshape(half, (BLOCK_M // 2, BLOCK_N // 8, 4, 2)), (0, 2, 1, 3))
    gates = tl.permute(tl.reshape(quads, (BLOCK_M // 2, 4, 2, 2, BLOCK_N // 16)), (0, 1, 4, 2, 3))
    u_ig, u_fo = tl.split(tl.reshape(gates, (BLOCK_M // 2, BLOCK_N // 4, 2, 2)))
    u_i, u_g = tl.split(u_ig)
    u_f, u_o = tl.split(u_fo)
    return u_i, u_f, u_g, u_o


@triton.jit
def await_loads(number, fault):
    """``fault``; what is computed from it waits until all loads before are on their way.

    The compiler keeps loads on their side of a barrier, but not sums: it would put those of what came first before the
    next load, to need fewer registers, and each load would wait for the one before. What depends on a load from behind
    the barrier, of a ``number`` that is never negative, stays there.
    """
    tl.debug_barrier()
    return tl.where(tl.load(number) < 0, float("nan"), fault)


@triton.jit
def store_partial(partial_ptr, slot, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``acc`` to ``partial_ptr`` [slots, BLOCK_M, BLOCK_N] float32."""
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + offsets, acc)


@triton.jit
def partial_pointers(
    partial_ptr,
    slot,
    row_first,
    column_first,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pointers [ROWS, COLUMNS] into one slot, to rows ``row_first ..`` and columns ``column_first ..``."""
    offsets = (row_first + tl.arange(0, ROWS))[:, None] * BLOCK_N + (column_first + tl.arange(0, COLUMNS))[None, :]
    return partial_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + offsets


@triton.jit
def are_inside(column_first, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """1 for each of so many columns of a tile that it has, 0 for those after its last; [1, COLUMNS]."""
    return (column_first + tl.arange(0, COLUMNS) < BLOCK_N).to(tl.int32)[None, :]


@triton.jit
def load_four(pointers, stride, count):
    """What lies at ``pointers`` and 1, 2 and 3 strides on, zeros from ``count`` on; from L2."""
    there = count + tl.zeros(pointers.shape, dtype=tl.int32)
    first = tl.load(pointers, mask=there > 0, other=0.0, cache_modifier=".cg")
    second = tl.load(pointers + stride, mask=there > 1, other=0.0, cache_modifier=".cg")
    third = tl.load(pointers + 2 * stride, mask=there > 2, other=0.0, cache_modifier=".cg")
    fourth = tl.load(pointers + 3 * stride, mask=there > 3, other=0.0, cache_modifier=".cg")
    return first, second, third, fourth


@triton.jit
def sum_gates(
    partial_ptr,
    slot,
    slots,
    row_first,
    column_first,
    APART: tl.constexpr,  # a share is four slots, one a gate; else one slot with the gates side by side
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile's gates, [ROWS, CHANNELS] each: the sums of its shares, always in the same order."""
    GATE: tl.constexpr = BLOCK_M * BLOCK_N if APART else BLOCK_N // 4
    SHARE: tl.constexpr = BLOCK_M * BLOCK_N * (4 if APART else 1)
    four = 4 * are_inside(column_first, BLOCK_N, CHANNELS) if APART else 4
    pointers = partial_pointers(partial_ptr, slot, row_first, column_first, BLOCK_M, BLOCK_N, ROWS, CHANNELS)
    u_i = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    u_f = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    u_g = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    u_o = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for s in range(0, slots, 2):
        i, f, g, o = load_four(pointers, GATE, four)
        next_i, next_f, next_g, next_o = load_four(pointers + SHARE, GATE, four * (slots - s - 1))
        tl.debug_barrier()  # keeps the compiler from delaying each load until its use
        u_i += i + next_i
        u_f += f + next_f
        u_g += g + next_g
        u_o += o + next_o
        pointers += 2 * SHARE
    return u_i, u_f, u_g, u_o


@triton.jit
def sum_slots(
    partial_ptr,
    slot,
    slots,
    row_first,
    column_first,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A piece of a tile, [ROWS, COLUMNS]: the sum of its slots, always in the same order."""
    pointers = partial_pointers(partial_ptr, slot, row_first, column_first, BLOCK_M, BLOCK_N, ROWS, COLUMNS)
    inside = are_inside(column_first, BLOCK_N, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for s in range(0, slots, 8):
        a, b, c, d = load_four(pointers, BLOCK_M * BLOCK_N, (slots - s) * inside)
        e, f, g, h = load_four(pointers + 4 * BLOCK_M * BLOCK_N, BLOCK_M * BLOCK_N, (slots - s - 4) * inside)
        tl.debug_barrier()  # keeps the compiler from delaying each load until its use
        total += (a + b + (c + d)) + (e + f + (g + h))
        pointers += 8 * BLOCK_M * BLOCK_N
    return total
