"""The recurrence backward: each step's mix and data gradient of all kernel sizes, then the gates of the step before."""

import triton
import triton.language as tl

from .convolve import FINISH, SEGMENT, accumulate, store_partial, sum_gates, sum_slots
from .gates import (
    gate_backward,
    grid_barrier,
    load_gates,
    load_peephole,
    locate,
    part_pointer,
    store_gates,
    tanh_backward,
    widen,
)


@triton.jit
def store_branch_gradients(
    step,
    row,  # -> what is to be finished, [FINISH] int32
    row_first,
    partial_ptr,
    v_ptr,
    du_ptrs,
    rows,
    hidden,
    TANH: tl.constexpr,
    ROUND: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FINISH_M: tl.constexpr,
    FINISH_N: tl.constexpr,
):
    """Gradients of a branch's outputs at ``step``, of FINISH_M pixels of a tile; pointers as in the kernel."""
    p = tl.load(row) * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    channel_first = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    column_first = tl.multiple_of(tl.load(row + 5), CHANNEL_RUN)
    part_first = tl.multiple_of(tl.load(row + 7), CHANNEL_RUN)
    part_channels = tl.multiple_of(tl.load(row + 8), CHANNEL_RUN)
    channel = channel_first + tl.arange(0, FINISH_N)
    in_part = tl.multiple_of(channel_first - part_first, CHANNEL_RUN) + tl.arange(0, FINISH_N)
    mask = (p < rows)[:, None] & (channel < channel_end)[None, :]
    if TANH:
        v = v_ptr + ((step * rows + p) * (4 * hidden))[:, None] + channel[None, :]
        v_i, v_f, v_g, v_o = load_gates(v, hidden, mask)
    du_i, du_f, du_g, du_o = sum_gates(
        partial_ptr, tl.load(row + 1), tl.load(row + 2), row_first, column_first, True,
        BLOCK_M, BLOCK_N, FINISH_M, FINISH_N,
    )  # fmt: skip
    if TANH:
        du_i = tanh_backward(du_i, v_i)
        du_f = tanh_backward(du_f, v_f)
        du_g = tanh_backward(du_g, v_g)
        du_o = tanh_backward(du_o, v_o)
    du = part_pointer(du_ptrs, tl.load(row + 6))
    du += (p.to(tl.int64) * (4 * part_channels))[:, None] + in_part[None, :]
    store_gates(du, part_channels, mask, du_i, du_f, du_g, du_o, ROUND)


@triton.jit
def update_gradients(
    step,
    row,  # -> what is to be finished, [FINISH] int32
    slot,  # the tile's partial sums: the gradient of h_t through step t + 1
    slots,
    m_tile,
    row_first,
    partial_ptr,
    z_ptrs,
    c_ptr,
    c_0_ptr,
    dh_ptr,
    dh_stride_b,
    dh_stride_t,
    dh_stride_f,
    dh_stride_p,
    dc_ptr,
    dc_n_ptr,
    dh_0_ptr,
    lengths_ptr,
    peephole_ptr,
    steps,
    rows,
    pixels,
    hidden,
    fault,
    HAS_DH: tl.constexpr,
    HAS_DC_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_H_0: tl.constexpr,
    HAS_C_0: tl.constexpr,
    PEEPHOLE: tl.constexpr,
    CURRENT: tl.constexpr,
    ROUND: tl.constexpr,
    PIXEL_RUN: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FINISH_M: tl.constexpr,
    FINISH_N: tl.constexpr,
):
    """Gate backward of FINISH_M pixels of a tile, ``row_first ..``; at step -1 dh_0; pointers as in the kernel."""
    p = m_tile * BLOCK_M + row_first + tl.arange(0, FINISH_M)
    # A hint counts only where its value is made: what a called function is told of an argument is lost.
    channel_first = tl.multiple_of(tl.load(row + 3), CHANNEL_RUN)
    channel_end = tl.multiple_of(tl.load(row + 4), CHANNEL_RUN)
    column_first = tl.multiple_of(tl.load(row + 5), CHANNEL_RUN)
    part = tl.load(row + 6)
    part_first = tl.multiple_of(tl.load(row + 7), CHANNEL_RUN)
    part_channels = tl.multiple_of(tl.load(row + 8), CHANNEL_RUN)
    b, pixel, channel, mask = locate(p, channel_first, channel_end, rows, pixels, PIXEL_RUN, FINISH_N)
    in_part = tl.multiple_of(channel_first - part_first, CHANNEL_RUN) + tl.arange(0, FINISH_N)
    image = (p.to(tl.int64) * hidden)[:, None] + channel[None, :]
    kind: tl.constexpr = z_ptrs[0].dtype.element_ty
    if step < 0:
        if HAS_H_0:
            dh = sum_slots(partial_ptr, slot, slots, row_first, column_first, BLOCK_M, BLOCK_N, FINISH_M, FINISH_N)
            tl.store(dh_0_ptr + image, (dh + fault).to(kind), mask=mask)
    else:
        # All loads before the first use, so that they wait together.
        z = part_pointer(z_ptrs, part) + ((step * rows + p) * (4 * part_channels))[:, None] + in_part[None, :]
        i, f, g, o = load_gates(z, part_channels, mask)
        c = c_ptr + step * rows * hidden + image
        c_t = tl.load(c, mask=mask, other=0.0)
        c_prev = tl.load(c - widen(rows) * hidden, mask=mask & (step + 0 * channel > 0)[None, :], other=0.0).to(
            tl.float32
        )
        dc = tl.load(dc_ptr + image, mask=mask & (step + 0 * channel < steps - 1)[None, :], other=0.0)
        if HAS_DH:
            dh_row = (b * dh_stride_b + step * dh_stride_t + pixel * dh_stride_p)[:, None]
            dh_out = tl.load(dh_ptr + dh_row + (channel * dh_stride_f)[None, :], mask=mask, other=0.0)
        dh = sum_slots(partial_ptr, slot, slots, row_first, column_first, BLOCK_M, BLOCK_N, FINISH_M, FINISH_N)
        dh += fault
        if HAS_DH:
            dh += dh_out.to(tl.float32)
        if HAS_C_0:
            c_prev += tl.load(c_0_ptr + image, mask=mask & (step + 0 * channel == 0)[None, :], other=0.0)
        if HAS_DC_N:  # the gradient of c from outside, at each sequence's last step
            length = tl.load(lengths_ptr + b, mask=p < rows, other=0) if HAS_LENGTHS else tl.where(p < rows, steps, 0)
            dc += tl.load(dc_n_ptr + image, mask=mask & (length == step + 1)[:, None], other=0.0)
        w_ci = load_peephole(peephole_ptr, 0, channel, pixel, mask, hidden, pixels, PEEPHOLE)
        w_cf = load_peephole(peephole_ptr, 1, channel, pixel, mask, hidden, pixels, PEEPHOLE)
        w_co = load_peephole(peephole_ptr, 2, channel, pixel, mask, hidden, pixels, PEEPHOLE)
        dz_i, dz_f, dz_g, dz_o, dc = gate_backward(
            i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c_prev, c_t.to(tl.float32),
            dh, dc, w_ci, w_cf, w_co, PEEPHOLE > 0, CURRENT,
        )  # fmt: skip
        store_gates(z, part_channels, mask, dz_i, dz_f, dz_g, dz_o, ROUND)
        tl.store(dc_ptr + image, dc, mask=mask)


@triton.jit(do_not_specialize=["first_step", "last_step", "steps", "units_first", "units"])
def backward_kernel(
    z_ptrs,  # a part of the hidden transition each, [T, B*H*W, 4*F_p]: gates, overwritten by their gradients
    v_ptr,  # [T, B*H*W, 4F], gate-major: what the mix multiplied, read if TANH
    du_ptrs,  # a branch each, [B*H*W, 4*F_r], scratch: gradients of their outputs, if there are two stages
    c_ptr,  # [T, B*H*W, F]
    c_0_ptr,  # [B*H*W, F] float32, read if HAS_C_0
    dh_ptr,  # [B, T, F, H*W], strides below: gradient of h from outside, read if HAS_DH
    dh_stride_b,
    dh_stride_t,
    dh_stride_f,
    dh_stride_p,
    dc_ptr,  # [B*H*W, F] float32, written: dc_0 at the end
    dc_n_ptr,  # [B*H*W, F] float32, read if HAS_DC_N
    dh_0_ptr,  # [B*H*W, F] of the gates' type, written if HAS_H_0
    lengths_ptr,  # [B] int64, read if HAS_LENGTHS
    weights,  # descriptor of the packed weights
    peephole_ptr,  # [3, F, 1 or H*W] float32, read if PEEPHOLE
    partial_ptr,  # [slots, BLOCK_M, BLOCK_N] float32, scratch; one slot a program if not SPLIT
    segment_ptr,  # [segments, SEGMENT] int32
    program_ptr,  # [programs * STAGES + 1] int32: each program's segments, stage by stage
    finish_ptr,  # [finished, FINISH] int32
    counter_ptr,  # [1] int32, 0 at the launch: the grid barrier's, if PERSISTENT
    first_step,
    last_step,
    steps,
    rows,  # B*H*W
    height,
    width,
    hidden,
    units_first,  # the first stage's rows of finish_ptr times BLOCK_M // FINISH_M
    units,  # and those of all stages
    STAGES: tl.constexpr,  # 1; 2 with a mix: the transposed mix, then the branches' data gradients
    STAGE_FIRST: tl.constexpr,
    STAGE_LAST: tl.constexpr,
    CONVOLVE: tl.constexpr,
    UPDATE: tl.constexpr,
    PERSISTENT: tl.constexpr,  # all programs are resident: barriers between steps, stages and phases
    SPLIT: tl.constexpr,  # tiles of branches are summed from pieces: a phase of its own finishes them, as the mix's
    TANH: tl.constexpr,  # before the mix
    HAS_DH: tl.constexpr,
    HAS_DC_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_H_0: tl.constexpr,
    HAS_C_0: tl.constexpr,
    PEEPHOLE: tl.constexpr,
    CURRENT: tl.constexpr,
    ROUND: tl.constexpr,  # gradients to TF32, to nearest
    PRECISION: tl.constexpr,
    DEPTH_RUN: tl.constexpr,
    EVEN_K: tl.constexpr,
    PIXEL_RUN: tl.constexpr,
    CHANNEL_RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FINISH_M: tl.constexpr,  # pixels of a tile that are finished at a time
    FINISH_N: tl.constexpr,  # and their channels, of one part
):
    """Steps T-1 - ``first_step`` down to T - ``last_step``, of each some stages; step -1 makes dh_0."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first = tl.load(program_ptr + program * STAGES)
    middle = tl.load(program_ptr + program * STAGES + 1)
    last = tl.load(program_ptr + program * STAGES + STAGES)
    pixels = height * width
    fault = 0.0
    arrivals = 0
    for done in range(first_step, last_step):
        step = steps - 1 - widen(done)
        for stage in tl.static_range(STAGE_FIRST, STAGE_LAST):
            mixing = stage < STAGES - 1
            if CONVOLVE:
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for s in range(middle if stage == 1 else first, last if stage == 1 else middle):
                    segment = segment_ptr + s * SEGMENT
                    image = part_pointer(du_ptrs if stage == 1 else z_ptrs, tl.load(segment + 16))
                    if stage == 0:
                        image += (step + 1) * rows * tl.multiple_of(tl.load(segment + 17), DEPTH_RUN)
                    acc = tl.where(tl.load(segment + 4) != 0, 0.0, acc)  # the first segment of a sum
                    acc = accumulate(
                        acc, segment, step < steps - 1, image, weights, rows, height, width,
                        False, DEPTH_RUN, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
                    )  # fmt: skip
                    if tl.load(segment + 5) != 0:  # the last
                        slot = tl.load(segment + 3)
                        store_partial(partial_ptr, slot, acc, BLOCK_M, BLOCK_N)
                        if not (SPLIT or mixing):  # nobody else has a share in this tile
                            tl.debug_barrier()
                            for n in range(tl.load(segment + 6), tl.load(segment + 7)):
                                for row_first in range(0, BLOCK_M, FINISH_M):
                                    update_gradients(
                                        step, finish_ptr + n * FINISH, slot, 1, tl.load(segment), row_first,
                                        partial_ptr, z_ptrs, c_ptr, c_0_ptr, dh_ptr, dh_stride_b, dh_stride_t,
                                        dh_stride_f, dh_stride_p, dc_ptr, dc_n_ptr, dh_0_ptr, lengths_ptr,
                                        peephole_ptr, steps, rows, pixels, hidden, fault,
                                        HAS_DH, HAS_DC_N, HAS_LENGTHS, HAS_H_0, HAS_C_0, PEEPHOLE, CURRENT, ROUND,
                                        PIXEL_RUN, CHANNEL_RUN, BLOCK_M, BLOCK_N, FINISH_M, FINISH_N,
                                    )  # fmt: skip
                            tl.debug_barrier()
                if PERSISTENT and (SPLIT or mixing):
                    arrivals += programs
                    fault = grid_barrier(counter_ptr, arrivals, fault)
            if UPDATE and (SPLIT or mixing):
                before = units_first if stage == 1 else 0
                for unit in range(before + program, units if stage == 1 else units_first, programs):
                    row = finish_ptr + unit // (BLOCK_M // FINISH_M) * FINISH
                    row_first = unit % (BLOCK_M // FINISH_M) * FINISH_M
                    if mixing:
                        if step < steps - 1:
                            store_branch_gradients(
                                step + 1, row, row_first, partial_ptr, v_ptr, du_ptrs, rows, hidden, TANH, ROUND,
                                CHANNEL_RUN, BLOCK_M, BLOCK_N, FINISH_M, FINISH_N,
                            )  # fmt: skip
                    else:
                        update_gradients(
                            step, row, tl.load(row + 1), tl.load(row + 2), tl.load(row), row_first, partial_ptr,
                            z_ptrs, c_ptr, c_0_ptr, dh_ptr, dh_stride_b, dh_stride_t, dh_stride_f, dh_stride_p,
                            dc_ptr, dc_n_ptr, dh_0_ptr, lengths_ptr, peephole_ptr, steps, rows, pixels, hidden,
                            fault, HAS_DH, HAS_DC_N, HAS_LENGTHS, HAS_H_0, HAS_C_0, PEEPHOLE, CURRENT, ROUND,
                            PIXEL_RUN, CHANNEL_RUN, BLOCK_M, BLOCK_N, FINISH_M, FINISH_N,
                        )  # fmt: skip
            if PERSISTENT:
                arrivals += programs
                fault = grid_barrier(counter_ptr, arrivals, fault)
