"""The recurrence forward: each step's convolutions of h, gates and state update, for any number of steps a launch."""

import triton
import triton.language as tl

from .convolve import FINISH, SEGMENT, accumulate, store_partial, sum_gates
from .gates import gate_forward, grid_barrier, load_peephole, locate, part_pointer, round_to_tf32, widen


@triton.jit
def update_state(
    step,
    row,  # -> what is to be finished, [FINISH] int32
    slot,  # the tile's partial sums: the hidden transition's gates
    slots,
    m_tile,
    row_first,
    partial_ptr,
    z_ptrs,
    h_ptr,
    c_ptr,
    c_0_ptr,
    state_ptr,
    bias_ptr,
    peephole_ptr,
    steps,
    rows,
    pixels,
    hidden,
    fault,
    KEEP: tl.constexpr,
    HAS_C_0: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PEEPHOLE: tl.constexpr,
    CURRENT: tl.constexpr,
    ROUND: tl.constexpr,
    PIXEL_RUN: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHANNELS: tl.constexpr,
    FINISH_M: tl.constexpr,
):
    """Gates and state update of FINISH_M pixels of a tile, from ``row_first`` on; pointers as in the kernel."""
    p = m_tile * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    # A hint counts only where its value is made: what a called function is told of an argument is lost.
    channel_first = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    part = tl.load(row + 6)
    part_first = tl.multiple_of(tl.load(row + 7), CHANNEL_RUN)
    part_channels = tl.multiple_of(tl.load(row + 8), CHANNEL_RUN)
    b, pixel, channel, mask = locate(p, channel_first, channel_end, rows, pixels, PIXEL_RUN, CHANNELS)
    in_part = tl.multiple_of(channel_first - part_first, CHANNEL_RUN) + tl.arange(0, CHANNELS)
    image = (p.to(tl.int64) * hidden)[:, None] + channel[None, :]

    # All loads before the first use, so that they wait together.
    z = part_pointer(z_ptrs, part) + ((step * rows + p) * (4 * part_channels))[:, None] + in_part[None, :]
    z_i = tl.load(z, mask=mask, other=0.0)
    z_f = tl.load(z + part_channels, mask=mask, other=0.0)
    z_g = tl.load(z + 2 * part_channels, mask=mask, other=0.0)
    z_o = tl.load(z + 3 * part_channels, mask=mask, other=0.0)
    c = c_ptr + image
    if KEEP:
        c += step * rows * hidden
        c_prev = tl.load(c - rows * hidden, mask=mask & (step + 0 * channel > 0)[None, :], other=0.0)
    else:
        c_prev = tl.load(c, mask=mask & (step + 0 * channel > 0)[None, :], other=0.0)
    u_i, u_f, u_g, u_o = sum_gates(partial_ptr, slot, slots, row_first, BLOCK_M, CHANNELS, FINISH_M)
    u_i += z_i.to(tl.float32) + fault
    u_f += z_f.to(tl.float32)
    u_g += z_g.to(tl.float32)
    u_o += z_o.to(tl.float32) + fault
    if HAS_BIAS:
        valid = channel < channel_end
        u_i += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        u_f += tl.load(bias_ptr + hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        u_g += tl.load(bias_ptr + 2 * hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        u_o += tl.load(bias_ptr + 3 * hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    if HAS_C_0:
        c_prev += tl.load(c_0_ptr + image, mask=mask & (step + 0 * channel == 0)[None, :], other=0.0)
    w_ci = load_peephole(peephole_ptr, 0, channel, pixel, mask, hidden, pixels, PEEPHOLE)
    w_cf = load_peephole(peephole_ptr, 1, channel, pixel, mask, hidden, pixels, PEEPHOLE)
    w_co = load_peephole(peephole_ptr, 2, channel, pixel, mask, hidden, pixels, PEEPHOLE)
    i, f, g, o, c_t, h = gate_forward(u_i, u_f, u_g, u_o, c_prev, w_ci, w_cf, w_co, PEEPHOLE > 0, CURRENT)

    # h first: the next step waits for it.
    kind: tl.constexpr = h_ptr.dtype.element_ty
    h_t = h.to(kind)
    tl.store(state_ptr + (step + 1) % 2 * rows * hidden + image, round_to_tf32(h_t) if ROUND else h_t, mask=mask)
    tl.store(c, c_t, mask=mask)
    if KEEP:
        tl.store(z, i.to(kind), mask=mask)
        tl.store(z + part_channels, f.to(kind), mask=mask)
        tl.store(z + 2 * part_channels, g.to(kind), mask=mask)
        tl.store(z + 3 * part_channels, o.to(kind), mask=mask)
    h_row = ((b * steps + step) * hidden * pixels + pixel)[:, None]
    tl.store(h_ptr + h_row + (channel * pixels)[None, :], h_t, mask=mask)


@triton.jit(do_not_specialize=["t_first", "t_last", "steps", "units"])
def forward_kernel(
    z_ptrs,  # a part of the hidden transition each, [T, B*H*W, 4*F_p]: the input's; with KEEP gates overwrite them
    h_ptr,  # [B, T, F, H, W], written
    c_ptr,  # [T, B*H*W, F] float32, written; without KEEP one c that every step overwrites
    c_0_ptr,  # [B*H*W, F] float32, read if HAS_C_0
    state_ptr,  # [2, B*H*W, F], scratch: h_{t-1} in slot t % 2; slot 0 holds h_0 if HAS_H_0
    weights,  # descriptor of the packed weights
    bias_ptr,  # [4F], gate-major, read if HAS_BIAS
    peephole_ptr,  # [3, F, 1 or H*W] float32, read if PEEPHOLE
    partial_ptr,  # [slots, BLOCK_M, BLOCK_N] float32, scratch; one slot a program if not SPLIT
    segment_ptr,  # [segments, SEGMENT] int32
    program_ptr,  # [programs + 1] int32: each program's segments
    finish_ptr,  # [finished, FINISH] int32
    counter_ptr,  # [1] int32, 0 at the launch: the grid barrier's, if PERSISTENT
    t_first,
    t_last,
    steps,
    rows,  # B*H*W
    height,
    width,
    hidden,
    units,  # rows of finish_ptr times BLOCK_M // FINISH_M
    CONVOLVE: tl.constexpr,
    UPDATE: tl.constexpr,
    PERSISTENT: tl.constexpr,  # all programs are resident: barriers between steps and phases
    SPLIT: tl.constexpr,  # tiles are summed from pieces: a phase of its own finishes them
    KEEP: tl.constexpr,
    HAS_H_0: tl.constexpr,
    HAS_C_0: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PEEPHOLE: tl.constexpr,
    CURRENT: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH_RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIXEL_RUN: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FINISH_M: tl.constexpr,  # pixels of a tile that are finished at a time
    FINISH_N: tl.constexpr,  # and their channels
):
    """Steps ``t_first .. t_last - 1``."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = tl.load(program_ptr + program)
    last = tl.load(program_ptr + program + 1)
    pixels = height * width
    fault = 0.0
    arrivals = 0
    for t in range(t_first, t_last):
        step = widen(t)
        if CONVOLVE:
            h_prev = state_ptr + step % 2 * rows * hidden
            for s in range(first, last):
                segment = segment_ptr + s * SEGMENT
                slot = tl.load(segment + 3)
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                acc = accumulate(
                    acc, segment, (step > 0) | HAS_H_0, h_prev, weights, rows, height, width,
                    DEPTH_RUN, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                store_partial(partial_ptr, slot, acc, BLOCK_M, BLOCK_N)
                if not SPLIT:  # nobody else has a share in this tile
                    tl.debug_barrier()
                    for row_first in range(0, BLOCK_M, FINISH_M):
                        update_state(
                            step, finish_ptr + tl.load(segment + 6) * FINISH, slot, 1, tl.load(segment), row_first,
                            partial_ptr, z_ptrs, h_ptr, c_ptr, c_0_ptr, state_ptr, bias_ptr, peephole_ptr,
                            steps, rows, pixels, hidden, fault, KEEP, HAS_C_0, HAS_BIAS, PEEPHOLE, CURRENT, ROUND,
                            PIXEL_RUN, CHANNEL_RUN, BLOCK_M, FINISH_N, FINISH_M,
                        )  # fmt: skip
                    tl.debug_barrier()
            if PERSISTENT and SPLIT:
                arrivals += programs
                fault = grid_barrier(counter_ptr, arrivals, fault)
        if UPDATE:
            for unit in range(program, units, programs):
                row = finish_ptr + unit // (BLOCK_M // FINISH_M) * FINISH
                row_first = unit % (BLOCK_M // FINISH_M) * FINISH_M
                update_state(
                    step, row, tl.load(row + 1), tl.load(row + 2), tl.load(row), row_first,
                    partial_ptr, z_ptrs, h_ptr, c_ptr, c_0_ptr, state_ptr, bias_ptr, peephole_ptr,
                    steps, rows, pixels, hidden, fault, KEEP, HAS_C_0, HAS_BIAS, PEEPHOLE, CURRENT, ROUND,
                    PIXEL_RUN, CHANNEL_RUN, BLOCK_M, FINISH_N, FINISH_M,
                )  # fmt: skip
        if PERSISTENT:
            arrivals += programs
            fault = grid_barrier(counter_ptr, arrivals, fault)
