"""Convolutions through the Fourier transform, judged against float64: they may err twice as much as torch's float32."""

import pytest
import torch
from problems import LIVE, PROBLEMS
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from mkconvlstm_cuda import cpu_convolution, fourier, library
from mkconvlstm_cuda.check import ROUNDING
from mkconvlstm_cuda.convolution import channels_last

OPS = torch.ops.mkconvlstm
# N, C, O, H, W, K, m: whole tiles and cut ones, odd and even sides, few channels and more than a vector holds
SHAPES = [
    (2, 3, 4, 16, 16, 7, 8),
    (1, 17, 33, 14, 14, 5, 7),
    (3, 1, 2, 5, 9, 3, 4),
    (2, 40, 5, 7, 6, 5, 16),
    (1, 2, 3, 1, 4, 9, 2),
    (2, 6, 6, 4, 4, 1, 3),
]


@pytest.fixture(autouse=True)
def loaded():
    assert library.load("cpu") is None


@pytest.fixture
def problem(request):
    torch.manual_seed(0)
    n, c, o, height, width, kernel, m = request.param
    x, dy = (channels_last(torch.randn(n, size, height, width)) for size in (c, o))
    return x, dy, torch.randn(o, c, kernel, kernel) / (c * kernel**2) ** 0.5, torch.randn(o), m


def assert_as_close_as(actual, torchs, exact):
    errors = [float((t.double() - exact).norm() / exact.norm()) for t in (actual, torchs)]
    assert actual.shape == exact.shape
    assert errors[0] <= max(2 * errors[1], ROUNDING[torch.float32])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, fourier.CHUNK_BYTES])
@pytest.mark.parametrize("problem", SHAPES, ids=str, indirect=True)
def test_convolution_and_gradients(problem, keep, chunk_bytes, monkeypatch):
    monkeypatch.setattr(fourier, "CHUNK_BYTES", chunk_bytes)
    x, dy, w, bias, m = problem
    padding = w.shape[2] // 2
    forward = fourier.FourierConvolution(w, bias, m, keep)
    exact = F.conv2d(x.double(), w.double(), bias.double(), padding=padding)
    for _ in range(2):
        assert_as_close_as(forward(x), F.conv2d(x, w, bias, padding=padding), exact)
    assert torch.equal(forward(x.contiguous()), forward(x))
    assert forward(x).is_contiguous(memory_format=torch.channels_last)

    dx = fourier.FourierConvolution(w, None, m, keep, gradient=True)(dy)
    exact = conv2d_input(x.shape, w.double(), dy.double(), padding=padding)
    assert_as_close_as(dx, conv2d_input(x.shape, w, dy, padding=padding), exact)

    dw = fourier.weight_gradient(x, dy.contiguous(), w.shape[2], m)
    exact = conv2d_weight(x.double(), w.shape, dy.double(), padding=padding)
    assert_as_close_as(dw, conv2d_weight(x, w.shape, dy, padding=padding), exact)


@pytest.mark.parametrize("side", [1, 2, 3, 8, 11, 14, 31, 32])
def test_analysis_is_the_transform(side):
    """The kept frequencies, column by column, against torch's; and with the others' conjugates they are all."""
    torch.manual_seed(0)
    images = channels_last(torch.randn(1, 3, side, side))
    spectrum = torch.full((fourier.frequencies(side), 2, 1, 3), float("nan"))
    OPS.fourier_analyze(images, side, 0, side, side, spectrum)
    half = side // 2
    kept = [(u, v) for v in range(half + 1) for u in range(half + 1 if 2 * v in (0, side) else side)]
    assert {*kept, *((-u % side, -v % side) for u, v in kept)} == {(u, v) for u in range(side) for v in range(side)}
    expected = torch.fft.fft2(images[0].double())
    expected = torch.stack([expected[:, u, v] for u, v in kept])
    actual = torch.complex(*spectrum[:, :, 0].double().unbind(1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * side)


def test_refusals_keep_to_the_tensors():
    def analyze(images=(1, 3, 8, 8), step=4, before=1, extent=6, side=6, spectrum=(20, 2, 4, 3), dtype=torch.float32):
        images, spectrum = channels_last(torch.zeros(images, dtype=dtype)), torch.zeros(spectrum)
        OPS.fourier_analyze(images, step, before, extent, side, spectrum)

    analyze()
    with pytest.raises(RuntimeError, match="must be float32 on the CPU"):
        analyze(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="wanted 1 <= step <= side <= 32, got step 4, side 33"):
        analyze(side=33)
    with pytest.raises(RuntimeError, match=r"spectrum must be \[20, 2, 4, 3\], .* got \[20, 2, 3, 3\]"):
        analyze(spectrum=(20, 2, 3, 3))
    with pytest.raises(RuntimeError, match="before and extent within the side 6"):
        analyze(extent=7)
    with pytest.raises(RuntimeError, match="bias must be"):
        OPS.fourier_synthesize(
            torch.zeros(20, 2, 2, 4, 3), torch.zeros(2), 4, 6, channels_last(torch.zeros(1, 3, 8, 8))
        )


def test_plan():
    small = fourier.Problem((2, 4, 3), 2, 3, 5)
    recurrent, batched = fourier.Problem((4, 16, 16), 64, 128, 7, 10), fourier.Problem((20, 14, 14), 512, 512, 5)
    assert fourier.plan(small) is None
    assert fourier.plan(recurrent) == 8
    assert fourier.plan(batched) == 7
    for none in (
        fourier.Problem((0, 16, 16), 64, 128, 7),
        fourier.Problem((4, 16, 16), 64, 128, 33),
        fourier.Problem((20, 14, 14), 512, 512, 1),
        fourier.Problem((1, 14, 14), 512, 512, 5, 20),  # too large a spectrum to keep
    ):
        assert fourier.plan(none) is None


def test_where_it_is_taken(monkeypatch):
    images, w = (20, 14, 14), torch.empty(512, 512, 5, 5)
    assert cpu_convolution.tile_size(w, (1, 1), images) == 7
    assert isinstance(cpu_convolution.prepare(w, None, [2, 2], (1, 1), images, 1), fourier.FourierConvolution)
    assert cpu_convolution.tile_size(w, (2, 1), images) is None
    assert cpu_convolution.tile_size(w[..., :3], (1, 1), images) is None
    assert cpu_convolution.tile_size(w.bfloat16(), (1, 1), images) is None
    monkeypatch.setattr(library, "load", lambda kind: f"no {kind} library today")
    assert cpu_convolution.tile_size(w, (1, 1), images) is None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in (*LIVE, "rectangular kernels")])
def test_layers_are_as_close_as_torch(name, recompute, monkeypatch):
    """Every convolution that can be is taken through the transform, however small."""
    problem = PROBLEMS[name]
    exact, torchs = problem.run("reference"), problem.run("reference", torch.float32)
    taken = []
    monkeypatch.setattr(fourier, "plan", lambda p: taken.append(p) or (None if 0 in p.images else 2))
    ours = problem.run("aten", torch.float32, recompute=recompute)
    for n in ours:
        error, torch_error = (float((r[n].double() - exact[n]).norm() / exact[n].norm()) for r in (ours, torchs))
        assert error <= max(2 * torch_error, ROUNDING[torch.float32]), n
    assert taken


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_in_less_than_float32_are_nobodys_wish(precision):
    """Lower precision for matrix products is none for convolutions: torch's own keep theirs."""
    before = torch.get_float32_matmul_precision()
    weight = torch.randn(32, 32, 7, 7)
    assert cpu_convolution.tile_size(weight, (1, 1), (4, 48, 48)) is not None
    torch.set_float32_matmul_precision(precision)
    try:
        assert cpu_convolution.tile_size(weight, (1, 1), (4, 48, 48)) is None
    finally:
        torch.set_float32_matmul_precision(before)
