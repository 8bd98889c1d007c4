"""The recurrence forward: each step's convolutions of h, 1x1 mix, gates and state update, for any number of steps."""

import triton
import triton.language as tl

from .convolve import FINISH, SEGMENT, accumulate, await_loads, store_partial, sum_gates, take_gates
from .gates import (
    add_bias,
    gate_forward,
    grid_barrier,
    load_gates,
    load_peephole,
    locate,
    part_pointer,
    round_to_tf32,
    store_gates,
    tanh,
    widen,
)


@triton.jit
def store_premix(
    row,  # -> what is to be finished, [FINISH] int32
    m_tile,
    row_first,
    sums,  # four gates' [FINISH_M, FINISH_N] float32: the branches' outputs
    v_ptr,
    branch_bias_ptr,
    rows,
    hidden,
    HAS_BRANCH_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    ROUND: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FINISH_M: tl.constexpr,
    FINISH_N: tl.constexpr,
):
    """What the mix multiplies, of FINISH_M pixels of a tile, from ``row_first`` on; pointers as in the kernel."""
    p = m_tile * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    channel = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN) + tl.arange(0, FINISH_N)
    mask = (p < rows)[:, None] & (channel < channel_end)[None, :]
    u_i, u_f, u_g, u_o = sums
    if HAS_BRANCH_BIAS:
        u_i, u_f, u_g, u_o = add_bias(u_i, u_f, u_g, u_o, branch_bias_ptr, channel, channel_end, hidden)
    if TANH:
        u_i, u_f, u_g, u_o = tanh(u_i), tanh(u_f), tanh(u_g), tanh(u_o)
    v = v_ptr + (p.to(tl.int64) * (4 * hidden))[:, None] + channel[None, :]
    store_gates(v, hidden, mask, u_i, u_f, u_g, u_o, ROUND)


@triton.jit
def load_state(
    step,
    row,  # -> what is to be finished, [FINISH] int32
    m_tile,
    row_first,
    z_ptrs,
    c_ptr,
    rows,
    hidden,
    KEEP: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FINISH_M: tl.constexpr,
    FINISH_N: tl.constexpr,
):
    """Of FINISH_M pixels of a tile, from ``row_first`` on: pointers to the first gate's z and a gate's stride, pointers
    to c_t, which of them there are; z of four gates; c_{t-1}, 0 at step 0. Pointers as in the kernel.
    """
    p = m_tile * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    # A hint counts only where its value is made: what a called function is told of an argument is lost.
    channel_first = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    part = tl.load(row + 6)
    part_first = tl.multiple_of(tl.load(row + 7), CHANNEL_RUN)
    part_channels = tl.multiple_of(tl.load(row + 8), CHANNEL_RUN)
    channel = channel_first + tl.arange(0, FINISH_N)
    in_part = tl.multiple_of(channel_first - part_first, CHANNEL_RUN) + tl.arange(0, FINISH_N)
    mask = (p < rows)[:, None] & (channel < channel_end)[None, :]
    z = part_pointer(z_ptrs, part) + ((step * rows + p) * (4 * part_channels))[:, None] + in_part[None, :]
    z_i, z_f, z_g, z_o = load_gates(z, part_channels, mask)
    c = c_ptr + (p.to(tl.int64) * hidden)[:, None] + channel[None, :]
    if KEEP:
        c += step * rows * hidden
        c_prev = tl.load(c - widen(rows) * hidden, mask=mask & (step + 0 * channel > 0)[None, :], other=0.0)
    else:
        c_prev = tl.load(c, mask=mask & (step + 0 * channel > 0)[None, :], other=0.0)
    return z, part_channels, c, mask, z_i, z_f, z_g, z_o, c_prev


@triton.jit
def update_state(
    step,
    row,  # -> what is to be finished, [FINISH] int32
    m_tile,
    row_first,
    loaded,  # by load_state, of the same pixels
    sums,  # four gates' [FINISH_M, FINISH_N] float32: the hidden transition
    h_ptr,
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
    FINISH_M: tl.constexpr,
    FINISH_N: tl.constexpr,
):
    """Gates and state update of FINISH_M pixels of a tile, from ``row_first`` on; pointers as in the kernel."""
    p = m_tile * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    channel_first = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    b, pixel, channel, _ = locate(p, channel_first, channel_end, rows, pixels, PIXEL_RUN, FINISH_N)
    image = (p.to(tl.int64) * hidden)[:, None] + channel[None, :]
    z, gate_stride, c, mask, z_i, z_f, z_g, z_o, c_prev = loaded
    u_i, u_f, u_g, u_o = sums
    u_i += z_i.to(tl.float32) + fault
    u_f += z_f.to(tl.float32) + fault
    u_g += z_g.to(tl.float32) + fault
    u_o += z_o.to(tl.float32) + fault
    if HAS_BIAS:
        u_i, u_f, u_g, u_o = add_bias(u_i, u_f, u_g, u_o, bias_ptr, channel, channel_end, hidden)
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
        store_gates(z, gate_stride, mask, i, f, g, o, False)
    h_row = ((b * steps + step) * hidden * pixels + pixel)[:, None]
    tl.store(h_ptr + h_row + (channel * pixels)[None, :], h_t, mask=mask)


@triton.jit(do_not_specialize=["t_first", "t_last", "steps", "units_first", "units"])
def forward_kernel(
    z_ptrs,  # a part of the hidden transition each, [T, B*H*W, 4*F_p]: the input's; with KEEP gates overwrite them
    v_ptr,  # [B*H*W, 4F], gate-major, scratch: what the mix multiplies, if there are two stages
    h_ptr,  # [B, T, F, H, W], written
    c_ptr,  # [T, B*H*W, F] float32, written; without KEEP one c that every step overwrites
    c_0_ptr,  # [B*H*W, F] float32, read if HAS_C_0
    state_ptr,  # [2, B*H*W, F], scratch: h_{t-1} in slot t % 2; slot 0 holds h_0 if HAS_H_0
    weights,  # descriptor of the packed weights
    bias_ptr,  # [4F], gate-major, read if HAS_BIAS
    branch_bias_ptr,  # [4F], gate-major, to be added before the mix, read if HAS_BRANCH_BIAS
    peephole_ptr,  # [3, F, 1 or H*W] float32, read if PEEPHOLE
    partial_ptr,  # [slots, BLOCK_M, BLOCK_N] float32, scratch, of tiles that are cut
    segment_ptr,  # [segments, SEGMENT] int32
    program_ptr,  # [programs * STAGES + 1] int32: each program's segments, stage by stage
    finish_ptr,  # [finished, FINISH] int32
    counter_ptr,  # [1] int32, 0 at the launch: the grid barrier's, if PERSISTENT
    t_first,
    t_last,
    steps,
    rows,  # B*H*W
    height,
    width,
    hidden,
    units_first,  # the first stage's rows of finish_ptr times BLOCK_M // FINISH_M
    units,  # and those of all stages
    STAGES: tl.constexpr,  # 1; 2 with a mix: the branches' convolutions, then the mix
    STAGE_FIRST: tl.constexpr,
    STAGE_LAST: tl.constexpr,
    CONVOLVE: tl.constexpr,
    UPDATE: tl.constexpr,
    PERSISTENT: tl.constexpr,  # all programs are resident: barriers between steps, stages and phases
    SPLIT: tl.constexpr,  # tiles of branches are summed from pieces: a phase of its own finishes them, as the mix's
    TANH: tl.constexpr,  # before the mix
    HAS_BRANCH_BIAS: tl.constexpr,
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
    """Steps ``t_first .. t_last - 1``, of each the stages ``STAGE_FIRST .. STAGE_LAST - 1``."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = tl.load(program_ptr + program * STAGES)
    middle = tl.load(program_ptr + program * STAGES + 1)
    last = tl.load(program_ptr + program * STAGES + STAGES)
    pixels = height * width
    fault = 0.0
    arrivals = 0
    for t in range(t_first, t_last):
        step = widen(t)
        for stage in tl.static_range(STAGE_FIRST, STAGE_LAST):
            if CONVOLVE:
                image = v_ptr if stage == 1 else state_ptr + step % 2 * rows * hidden
                for s in range(middle if stage == 1 else first, last if stage == 1 else middle):
                    segment = segment_ptr + s * SEGMENT
                    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    acc = accumulate(
                        acc, segment, (step > 0) | (HAS_H_0 or stage == 1), image, weights, rows, height, width,
                        not (SPLIT or stage == 1), DEPTH_RUN, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                    if SPLIT or stage == 1:
                        store_partial(partial_ptr, tl.load(segment + 3), acc, BLOCK_M, BLOCK_N)
                    else:  # nobody else has a share in this tile
                        m_tile = tl.load(segment)
                        row = finish_ptr + tl.load(segment + 6) * FINISH
                        for half in tl.static_range(2):
                            row_first = half * (BLOCK_M // 2)
                            if STAGES == 2:
                                store_premix(
                                    row, m_tile, row_first, take_gates(acc, half, BLOCK_M, BLOCK_N), v_ptr,
                                    branch_bias_ptr, rows, hidden, HAS_BRANCH_BIAS, TANH, ROUND,
                                    CHANNEL_RUN, BLOCK_M, BLOCK_M // 2, FINISH_N,
                                )  # fmt: skip
                            else:
                                loaded = load_state(
                                    step, row, m_tile, row_first, z_ptrs, c_ptr, rows, hidden, KEEP,
                                    CHANNEL_RUN, BLOCK_M, BLOCK_M // 2, FINISH_N,
                                )  # fmt: skip
                                update_state(
                                    step, row, m_tile, row_first, loaded, take_gates(acc, half, BLOCK_M, BLOCK_N),
                                    h_ptr, c_0_ptr, state_ptr, bias_ptr, peephole_ptr, steps, rows, pixels, hidden,
                                    await_loads(segment, fault), KEEP, HAS_C_0, HAS_BIAS, PEEPHOLE, CURRENT, ROUND,
                                    PIXEL_RUN, CHANNEL_RUN, BLOCK_M, BLOCK_M // 2, FINISH_N,
                                )  # fmt: skip
                if PERSISTENT and (SPLIT or stage == 1):
                    arrivals += programs
                    fault = grid_barrier(counter_ptr, arrivals, fault)
            if UPDATE and (SPLIT or stage == 1):
                before = units_first if stage == 1 else 0
                for unit in range(before + program, units if stage == 1 else units_first, programs):
                    row = finish_ptr + unit // (BLOCK_M // FINISH_M) * FINISH
                    row_first = unit % (BLOCK_M // FINISH_M) * FINISH_M
                    m_tile = tl.load(row)
                    if stage == STAGES - 1:
                        loaded = load_state(
                            step, row, m_tile, row_first, z_ptrs, c_ptr, rows, hidden, KEEP,
                            CHANNEL_RUN, BLOCK_M, FINISH_M, FINISH_N,
                        )  # fmt: skip
                    column_first = tl.multiple_of(tl.load(row + 5), CHANNEL_RUN) if stage == 1 else 0
                    sums = sum_gates(
                        partial_ptr, tl.load(row + 1), tl.load(row + 2), row_first, column_first, stage == 1,
                        BLOCK_M, BLOCK_N, FINISH_M, FINISH_N,
                    )  # fmt: skip
                    if stage == STAGES - 1:
                        update_state(
                            step, row, m_tile, row_first, loaded, sums, h_ptr, c_0_ptr, state_ptr, bias_ptr,
                            peephole_ptr, steps, rows, pixels, hidden, fault, KEEP, HAS_C_0, HAS_BIAS, PEEPHOLE,
                            CURRENT, ROUND, PIXEL_RUN, CHANNEL_RUN, BLOCK_M, FINISH_M, FINISH_N,
                        )  # fmt: skip
                    else:
                        store_premix(
                            row, m_tile, row_first, sums, v_ptr, branch_bias_ptr, rows, hidden, HAS_BRANCH_BIAS,
                            TANH, ROUND, CHANNEL_RUN, BLOCK_M, FINISH_M, FINISH_N,
                        )  # fmt: skip
            if PERSISTENT:
                arrivals += programs
                fault = grid_barrier(counter_ptr, arrivals, fault)
