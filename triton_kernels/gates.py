"""The cell's mathematics, forward and backward, once, in float32; and what else every kernel calls."""

import triton
import triton.language as tl

SPIN_LIMIT = tl.constexpr(1 << 22)


@triton.jit
def widen(t):
    """A loop's counter as int64 (in the interpreter it is no tensor)."""
    return tl.full((), 0, tl.int64) + t


@triton.jit
def round_to_tf32(x):
    """float32 to the nearest that TF32 has; tensor cores would cut the other bits off."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Exact to float32's last few bits: a series where 1 - exp(-2|x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -y, y))


@triton.jit
def tanh_backward(dy, y):
    """The gradient of x from that of ``y``, its tanh."""
    y = y.to(tl.float32)
    return dy * (1.0 - y * y)


@triton.jit
def gate_forward(z_i, z_f, z_g, z_o, c_prev, w_ci, w_cf, w_co, HAS_PEEPHOLE: tl.constexpr, CURRENT: tl.constexpr):
    """The paper's eqs. 6-10, elementwise; ``CURRENT``: o sees c_t, else c_{t-1}. Returns i, f, g, o, c, h."""
    if HAS_PEEPHOLE:
        z_i += w_ci * c_prev
        z_f += w_cf * c_prev
    i = sigmoid(z_i)
    f = sigmoid(z_f)
    g = tanh(z_g)
    c = f * c_prev + i * g
    if HAS_PEEPHOLE:
        z_o += w_co * (c if CURRENT else c_prev)
    o = sigmoid(z_o)
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def gate_backward(i, f, g, o, c_prev, c, dh, dc, w_ci, w_cf, w_co, HAS_PEEPHOLE: tl.constexpr, CURRENT: tl.constexpr):
    """Gradients of :func:`gate_forward` from ``dh``, ``dc`` of h_t, c_t. Returns dz_i, dz_f, dz_g, dz_o, dc_{t-1}."""
    tanh_c = tanh(c)
    dz_o = dh * tanh_c * o * (1.0 - o)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    if HAS_PEEPHOLE and CURRENT:
        dc += w_co * dz_o
    dz_i = dc * g * i * (1.0 - i)
    dz_f = dc * c_prev * f * (1.0 - f)
    dz_g = dc * i * (1.0 - g * g)
    dc_prev = dc * f
    if HAS_PEEPHOLE:
        dc_prev += w_ci * dz_i + w_cf * dz_f
        if not CURRENT:
            dc_prev += w_co * dz_o
    return dz_i, dz_f, dz_g, dz_o, dc_prev


@triton.jit
def locate(
    p,  # [BLOCK_P]: rows of [B*H*W]
    channel_first,
    channel_end,
    rows,
    pixels,
    PIXEL_RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Image (int64) and pixel of each row, the channels, and which of [BLOCK_P, CHANNELS] there are."""
    channel = channel_first + tl.arange(0, CHANNELS)
    b = tl.max_constancy(p // pixels, PIXEL_RUN).to(tl.int64)
    pixel = tl.multiple_of(tl.max_contiguous(p % pixels, PIXEL_RUN), PIXEL_RUN)
    return b, pixel, channel, (p < rows)[:, None] & (channel < channel_end)[None, :]


@triton.jit
def part_pointer(pointers, part):
    """The pointer of one of a few tensors, by its number at run time."""
    chosen = pointers[0]
    for n in tl.static_range(1, len(pointers)):
        chosen = tl.where(part == n, pointers[n], chosen)
    return chosen


@triton.jit
def load_peephole(peephole_ptr, row: tl.constexpr, channel, pixel, mask, hidden, pixels, PEEPHOLE: tl.constexpr):
    """Row ``row`` of the peepholes [3, F, 1 (PEEPHOLE = 1) or H*W (PEEPHOLE = 2)] for [pixels, channels]; 0 if none."""
    w = 0.0
    if PEEPHOLE == 1:
        w = tl.load(peephole_ptr + row * hidden + channel[None, :] + 0 * pixel[:, None], mask=mask, other=0.0)
    if PEEPHOLE == 2:
        w = tl.load(peephole_ptr + (row * hidden + channel[None, :]) * pixels + pixel[:, None], mask=mask, other=0.0)
    return w


@triton.jit
def load_gates(pointers, stride, mask):
    """The four gates' values that lie at ``pointers`` and one, two and three strides on; 0 outside of ``mask``."""
    i = tl.load(pointers, mask=mask, other=0.0)
    f = tl.load(pointers + stride, mask=mask, other=0.0)
    g = tl.load(pointers + 2 * stride, mask=mask, other=0.0)
    o = tl.load(pointers + 3 * stride, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def store_gates(pointers, stride, mask, i, f, g, o, ROUND: tl.constexpr):
    """float32 ``i``, ``f``, ``g``, ``o`` to where :func:`load_gates` finds them; ``ROUND``: to TF32, to nearest."""
    kind: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, round_to_tf32(i) if ROUND else i.to(kind), mask=mask)
    tl.store(pointers + stride, round_to_tf32(f) if ROUND else f.to(kind), mask=mask)
    tl.store(pointers + 2 * stride, round_to_tf32(g) if ROUND else g.to(kind), mask=mask)
    tl.store(pointers + 3 * stride, round_to_tf32(o) if ROUND else o.to(kind), mask=mask)


@triton.jit
def add_bias(u_i, u_f, u_g, u_o, bias_ptr, channel, channel_end, hidden):
    """The gates' sums of some channels plus a bias [4F], gate-major, of any type."""
    valid = channel < channel_end
    u_i += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    u_f += tl.load(bias_ptr + hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    u_g += tl.load(bias_ptr + 2 * hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    u_o += tl.load(bias_ptr + 3 * hidden + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    return u_i, u_f, u_g, u_o


@triton.jit
def grid_barrier(counter_ptr, target, fault):
    """Wait until ``counter_ptr`` [1] has seen ``target`` arrivals: what programs wrote before, all can read after.

    Needs all programs resident at once. The wait is bounded: should it end too soon, ``fault`` becomes NaN, which the
    caller adds to its results.
    """
    tl.debug_barrier()
    seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    spins = 0
    while (seen < target) & (spins < SPIN_LIMIT):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        spins += 1
    tl.debug_barrier()
    return tl.where(seen < target, float("nan"), fault)
