"""The pointwise step: gates, cell state, hidden state and their gradients, against torch's autograd in float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mkconvlstm_cuda import library

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["channels_first", "channels_last", "mixed", "misaligned"]
# peephole shape, and whether the output gate sees c_t
PEEPHOLES = [(None, False), ("channel", False), ("channel", True), ("pixel", False), ("pixel", True)]
# Odd sizes; whole vectors; 14 x 14, where only half a vector fits into a channel; more channels than a CPU's tile has;
# one element; nothing; no pixels. And how the channels are shared out among branches.
SHAPES = {
    (2, 3, 5, 7): (2, 1),
    (3, 16, 4, 8): (16,),
    (2, 24, 14, 14): (8, 16),
    (1, 75, 4, 5): (70, 5),
    (1, 1, 1, 1): (1,),
    (5, 1, 1, 3): (1,),
    (0, 4, 3, 3): (3, 1),
    (2, 4, 0, 3): (1, 3),
}
# The kernels compute in float32 or wider and round once, so an error is a rounding of what is stored.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def equations(z, c_prev, peephole, current):
    """One step in torch operations: pre-activations [B, 4F, H, W] -> activated gates, c and h [B, F, H, W]."""
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    w_ci, w_cf, w_co = (0, 0, 0) if peephole is None else peephole
    i, f, g = torch.sigmoid(z_i + w_ci * c_prev), torch.sigmoid(z_f + w_cf * c_prev), torch.tanh(z_g)
    c = f * c_prev + i * g
    o = torch.sigmoid(z_o + w_co * (c if current else c_prev))
    return torch.cat([i, f, g, o], dim=1), c, o * torch.tanh(c)


def inverse(gates, c_prev, c, peephole, current):
    """The pre-activations that `equations` turns into these gates."""
    i, f, g, o = gates.chunk(4, dim=1)
    w_ci, w_cf, w_co = (0, 0, 0) if peephole is None else peephole
    z_o = torch.logit(o) - w_co * (c if current else c_prev)
    return torch.cat([torch.logit(i) - w_ci * c_prev, torch.logit(f) - w_cf * c_prev, torch.atanh(g), z_o], dim=1)


def random_problem(shape, peephole):
    """float64 z, u, c_prev, peephole weights, dh_out, dh_rec and dc on the CPU."""
    torch.manual_seed(0)
    batch, channels, height, width = shape
    size = {None: None, "channel": (3, channels, 1, 1), "pixel": (3, channels, height, width)}[peephole]
    z, u = (0.7 * torch.randn(batch, 4 * channels, height, width, dtype=torch.float64) for _ in range(2))
    c_prev, dh_out, dh_rec, dc = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    return z, u, c_prev, size and 0.5 * torch.randn(size, dtype=torch.float64), dh_out, dh_rec, dc


def split(gates, sizes):
    """Gate-major [B, 4F, H, W] as one gate-major tensor for each branch."""
    return [part.flatten(1, 2) for part in gates.unflatten(1, (4, -1)).split(sizes, dim=2)]


def join(parts):
    """Inverse of `split`."""
    return torch.cat([read(part).unflatten(1, (4, -1)) for part in parts], dim=2).flatten(1, 2)


def expected_gradients(z, c_prev, peephole, current, dh, dc):
    """dz and dc_prev by autograd; everything is float64."""
    z, c_prev = z.detach().requires_grad_(), c_prev.detach().requires_grad_()
    _, c, h = equations(z, c_prev, peephole, current)
    return torch.autograd.grad([h, c], [z, c_prev], [dh, dc])


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Buffers:
    """Hands out tensors as slices [:, 1] of [B, 3, C, H, W] buffers filled with NaN, and checks what surrounds them."""

    def __init__(self, layout, device):
        self.layout = layout
        self.device = device
        self.made = []

    def __call__(self, values, dtype):
        batch, channels, height, width = values.shape
        channels_last = self.layout == "channels_last" or (self.layout == "mixed" and len(self.made) % 2 == 0)
        offset = 1 if self.layout == "misaligned" else 0
        storage = torch.full((offset + 3 * values.numel(),), float("nan"), dtype=dtype, device=self.device)
        if channels_last:
            buffer = storage[offset:].view(batch, 3, height, width, channels).permute(0, 1, 4, 2, 3)
        else:
            buffer = storage[offset:].view(batch, 3, channels, height, width)
        buffer[:, 1] = values
        self.made.append((storage, buffer))
        return buffer[:, 1]

    def empty_like(self, values, dtype):
        return self(torch.full_like(values, float("nan")), dtype)

    def check_surroundings(self):
        for storage, buffer in self.made:
            assert storage[: storage.numel() - buffer.numel()].isnan().all()
            assert buffer[:, [0, 2]].isnan().all()


def place(peephole, dtype, device):
    return None if peephole is None else peephole.to(device, wide(dtype))


def read(tensor):
    return None if tensor is None else tensor.double().cpu()


def assert_close(actual, expected, dtype):
    torch.testing.assert_close(read(actual), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.fixture(params=DEVICES)
def device(request):
    if reason := library.load(request.param):
        (pytest.skip if request.param == "cuda" else pytest.fail)(reason)
    return request.param


OPS = torch.ops.mkconvlstm


def check_forward(device, shape, dtype, layout, peephole_shape, current, with_u=True):
    z, u, c_prev, peephole, *_ = random_problem(shape, peephole_shape)
    sizes = SHAPES.get(shape, shape[1:2])
    buffers = Buffers(layout, device)
    z = [buffers(part, dtype) for part in split(z, sizes)]
    u = [buffers(part, dtype) for part in split(u, sizes)] if with_u else []
    c_prev = buffers(c_prev, wide(dtype))
    h, c = buffers.empty_like(c_prev, dtype), buffers.empty_like(c_prev, wide(dtype))
    peephole = place(peephole, dtype, device)
    gates_expected, c_expected, h_expected = equations(
        join(z) + (join(u) if with_u else 0), read(c_prev), read(peephole), current
    )

    OPS.gate_step_forward(z, u, c_prev, h, c, peephole, current)

    assert_close(join(z), gates_expected, dtype)
    assert_close(c, c_expected, wide(dtype))
    assert_close(h, h_expected, dtype)
    buffers.check_surroundings()


def check_backward(device, shape, dtype, layout, peephole_shape, current, rec_dtype):
    z, _, c_prev, peephole, dh, dh_prev, dc = random_problem(shape, peephole_shape)
    buffers = Buffers(layout, device)
    c_prev, peephole = buffers(c_prev, wide(dtype)), place(peephole, dtype, device)
    parts = split(equations(z, read(c_prev), read(peephole), current)[0], SHAPES.get(shape, shape[1:2]))
    gates = [buffers(part, dtype) for part in parts]
    i, f, g, _ = join(gates).chunk(4, dim=1)
    c = buffers(f * read(c_prev) + i * g, wide(dtype))
    dh, dh_prev, dc = buffers(dh, dtype), buffers(dh_prev, rec_dtype), buffers(dc, wide(dtype))
    # The gates are rounded to dtype: gradients are taken at the pre-activations that lead exactly there.
    z = inverse(join(gates), read(c_prev), read(c), read(peephole), current)
    dz_expected, dc_prev_expected = expected_gradients(
        z, read(c_prev), read(peephole), current, read(dh) + read(dh_prev), read(dc)
    )

    OPS.gate_step_backward(gates, dh, dh_prev, dc, c_prev, c, peephole, current)

    assert_close(join(gates), dz_expected, dtype)
    assert_close(dc, dc_prev_expected, wide(dtype))
    buffers.check_surroundings()


@pytest.mark.parametrize(("peephole", "current"), PEEPHOLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device, dtype, layout, peephole, current):
    for shape in SHAPES:
        check_forward(device, shape, dtype, layout, peephole, current)
    check_forward(device, (2, 3, 5, 7), dtype, layout, peephole, current, with_u=False)


@pytest.mark.parametrize(("peephole", "current"), PEEPHOLES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(device, dtype, layout, peephole, current):
    for shape in SHAPES:
        for rec_dtype in {dtype, wide(dtype)}:
            check_backward(device, shape, dtype, layout, peephole, current, rec_dtype)


@pytest.mark.parametrize("shape", [(66000, 2, 1, 1), (1, 64, 160, 160)], ids=["batch", "image"])
def test_more_work_than_one_grid_holds(device, shape):
    check_forward(device, shape, torch.float64, "channels_first", "channel", False)
    check_backward(device, shape, torch.float64, "channels_last", "channel", False, torch.float64)


def test_c_may_overwrite_c_prev(device):
    z, _, c, *_ = (None if t is None else t.to(device) for t in random_problem((2, 3, 5, 7), None))
    gates_expected, c_expected, h_expected = equations(read(z), read(c), None, False)
    h = torch.full_like(c, float("nan"))
    OPS.gate_step_forward([z], [], c, h, c, None, False)
    for actual, expected in ((z, gates_expected), (c, c_expected), (h, h_expected)):
        assert_close(actual, expected, torch.float64)


def test_absent_and_expanded_gradients(device):
    """dh as `output.sum().backward()` brings it: one element with strides of zero."""
    z, _, c_prev, _, _, _, dc = random_problem((2, 4, 4, 4), None)
    gates, c, _ = equations(z, c_prev, None, False)
    for dh in (torch.ones((), dtype=torch.float64).expand(dc.shape), None):
        dz_expected, dc_prev_expected = expected_gradients(
            z, c_prev, None, False, torch.zeros_like(dc) if dh is None else dh, dc
        )
        gates_, dc_, c_prev_, c_ = (t.to(device, copy=True) for t in (gates, dc, c_prev, c))
        dh_ = None if dh is None else torch.ones((), dtype=torch.float64, device=device).expand(dc.shape)
        OPS.gate_step_backward([gates_], dh_, None, dc_, c_prev_, c_, None, False)
        assert_close(gates_, dz_expected, torch.float64)
        assert_close(dc_, dc_prev_expected, torch.float64)


def test_refusals_name_the_argument(device):
    def step(z=(2, 8, 3, 3), u=(), c_prev=torch.float32, h=None, peephole=None):
        z = torch.zeros(z, dtype=torch.float16, device=device)
        c = torch.zeros(2, 2, 3, 3, device=device)
        h = torch.zeros(2, 2, 3, 3, dtype=torch.float16, device=device) if h is None else h
        OPS.gate_step_forward([z], u, c.to(c_prev), h, c, peephole, False)

    step()
    with pytest.raises(RuntimeError, match=r"z must be \[batch, 4 \* channels, height, width\].* got \[2, 7, 3, 3\]"):
        step(z=(2, 7, 3, 3))
    with pytest.raises(RuntimeError, match="u must be a list of 1 tensors, one a hidden branch, got 2"):
        step(u=2 * [torch.zeros(2, 4, 3, 3, dtype=torch.float16, device=device)])
    with pytest.raises(RuntimeError, match=r"u\[0\] must be \[2, 8, 3, 3\] float16 .* got \[2, 4, 3, 3\] float16"):
        step(u=[torch.zeros(2, 4, 3, 3, dtype=torch.float16, device=device)])
    with pytest.raises(RuntimeError, match=r"c_prev must be \[2, 2, 3, 3\] float32 .* got \[2, 2, 3, 3\] float16"):
        step(c_prev=torch.float16)
    with pytest.raises(RuntimeError, match="h must hold its images apart, each contiguous"):
        step(h=torch.zeros(1, 2, 3, 3, dtype=torch.float16, device=device).expand(2, 2, 3, 3))
    with pytest.raises(RuntimeError, match=r"h must hold its pixels at one stride, got strides \[6, 3, 1, 0\]"):
        step(h=torch.zeros(2, 2, 3, 1, dtype=torch.float16, device=device).expand(2, 2, 3, 3))
    with pytest.raises(RuntimeError, match=r"peephole must be \[3, 2, 1, 1\] float32 .* or \[3, 2, 3, 3\]"):
        step(peephole=torch.zeros(3, 2, 3, 1, device=device))
    with pytest.raises(RuntimeError, match="z must be a non-empty list"):
        OPS.gate_step_forward([], [], *3 * [torch.zeros(2, 2, 3, 3, device=device)], None, False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_threads_share_the_work(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_forward("cpu", (3, 40, 30, 31), torch.float32, "channels_last", None, False)
    finally:
        torch.set_num_threads(before)


def test_cpu_float32_is_within_a_few_roundings():
    """The CPU library's own exp and tanh, over their whole range: one gate at a time against float64."""
    x = torch.cat([torch.linspace(-120, 120, 200001), torch.logspace(-30, 1, 20001), -torch.logspace(-30, 1, 20001)])
    x = torch.cat([x, torch.tensor([0.0, float("inf"), -float("inf")])]).view(1, -1, 1, 1)
    z = torch.cat([x, x, x, x], dim=1)
    c_prev, h, c = torch.zeros_like(x), torch.empty_like(x), torch.empty_like(x)
    OPS.gate_step_forward([z], [], c_prev, h, c, None, False)
    gates, exact = z.chunk(4, dim=1), x.double()
    wanted = [torch.sigmoid(exact), torch.sigmoid(exact), torch.tanh(exact), torch.sigmoid(exact)]
    for gate, value in zip(gates, wanted, strict=True):
        torch.testing.assert_close(gate.double(), value, rtol=3e-7, atol=1e-37)
    torch.testing.assert_close(h.double(), gates[3].double() * torch.tanh(c.double()), rtol=4e-7, atol=1e-37)


def test_cpu_nan_stays_nan():
    z, c = torch.full((1, 4, 1, 1), float("nan")), torch.ones(1, 1, 1, 1)
    h = torch.zeros_like(c)
    OPS.gate_step_forward([z], [], c, h, c, None, False)
    assert torch.cat([z.flatten(), h.flatten(), c.flatten()]).isnan().all()


@pytest.fixture(scope="session")
def host_gates(tmp_path_factory):
    """csrc/gates.cuh for the CPU."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++) found")
    here = Path(__file__).parent
    built = tmp_path_factory.mktemp("gates") / "libgates.so"
    includes = ["-I", str(here.parent / "csrc")]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *includes]
    subprocess.run([*command, str(here / "gates_host.cpp"), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


@pytest.mark.parametrize("peepholes", [0, 1, 2], ids=["none", "previous", "current"])
def test_mathematics_on_the_host(host_gates, peepholes):
    n, current = 1000, peepholes == 2
    z, _, c_prev, w, dh, _, dc = random_problem((1, n, 1, 1), "channel")
    w_used = w if peepholes else None
    gates_expected, c_expected, h_expected = equations(z, c_prev, w_used, current)
    dz_expected, dc_prev_expected = expected_gradients(z, c_prev, w_used, current, dh, dc)

    def pointers(*tensors):
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    gates, h, c = z.clone(), torch.empty_like(c_prev), torch.empty_like(c_prev)
    host_gates.forward(ctypes.c_long(n), *pointers(gates, c_prev, h, c, w), peepholes)
    for actual, expected in ((gates, gates_expected), (c, c_expected), (h, h_expected)):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)

    host_gates.backward(ctypes.c_long(n), *pointers(gates, dh, dc, c_prev, c, w), peepholes)
    for actual, expected in ((gates, dz_expected), (dc, dc_prev_expected)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_extreme_values_on_the_host(host_gates):
    """Saturated gates stay finite, and an infinite cell state does not meet an absent peephole's zero."""
    z = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], dtype=torch.float64)
    c_prev, h, c = torch.full((1,), float("inf"), dtype=torch.float64), *torch.empty(2, 1, dtype=torch.float64)
    z[1] = 1e4
    w = torch.zeros(3, 1, dtype=torch.float64)
    arguments = [ctypes.c_void_p(t.data_ptr()) for t in (z, c_prev, h, c, w)]
    host_gates.forward(ctypes.c_long(1), *arguments, 0)
    assert z.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]
    assert c.item() == float("inf")
    assert h.item() == 0.0
