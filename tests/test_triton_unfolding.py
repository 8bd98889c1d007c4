"""Convolutions of few channels, unfolded: the kernels in Triton's interpreter and on a GPU, and all that uses them."""

import pytest
import torch
from problems import Problem
from test_triton_compile import compile_launch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from triton_problems import compiled, gpu, interpreted

from mkconvlstm_cuda import Branch, layout, pairs, unfolding
from mkconvlstm_cuda.check import ROUNDING
from mkconvlstm_cuda.convolution import BranchWeights, branch_forward, channels_last, convolution_gradients, prepared
from mkconvlstm_cuda.guards import guarded

kernels = pytest.importorskip("mkconvlstm_cuda.triton_kernels.unfolding")

HALF = (torch.float16, torch.bfloat16)


def shifted(x, kernel):
    """What unfolding makes of ``x`` [N, C, H, W], by slices of padded rows: [N, kernel * C, H, W]."""
    width = x.shape[3]
    padded = F.pad(x, (kernel // 2, kernel // 2))
    return torch.cat([padded[..., j : j + width] for j in range(kernel)], dim=1)


def check_kernels(device, dtype) -> None:
    """Images of odd sizes, rows narrower than the kernel, single pixels, between zones of NaN."""
    for channels, kernel, size in (
        (1, 3, (2, 4, 7)),
        (1, 7, (3, 2, 2)),
        (3, 5, (1, 3, 9)),
        (3, 3, (2, 1, 1)),
        (16, 5, (2, 3, 5)),
        (16, 3, (1, 40, 13)),
        (32, 3, (1, 2, 3)),
    ):
        count, *image = size
        x = channels_last(torch.randn(count, channels, *image, device=device, dtype=dtype))
        with guarded() as guards:
            u = unfolding.unfold(x, kernel)
        assert u.shape[1] == unfolding.unfolded_channels(channels, kernel)
        assert u.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(u[:, : kernel * channels], shifted(x, kernel))
        assert not u[:, kernel * channels :].any()

        du = channels_last(torch.randn(u.shape, device=device, dtype=dtype))
        du[:, kernel * channels :] = float("nan")  # nobody's gradients
        wide = torch.zeros_like(x, dtype=torch.float64).requires_grad_()
        (wanted,) = torch.autograd.grad(shifted(wide, kernel), wide, du[:, : kernel * channels].double())
        with guarded() as more_guards:
            dx = x.new_empty((count, *image, channels)).permute(0, 3, 1, 2)
            unfolding.fold(du, kernel, dx)
        torch.testing.assert_close(dx, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert guards.broken() == more_guards.broken() == 0


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_unfolding(dtype):
    check_kernels("cpu", dtype)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_unfolding_on_a_gpu(self, dtype):
        check_kernels("cuda", dtype)

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("channels", [1, 3, 16, 32, 64])
    def test_layers_are_as_close_as_cudnn(self, channels, dtype, monkeypatch):
        problem = Problem({3: 32, 5: 32, 7: 32}, batch=4, steps=8, channels=channels, size=(23, 40))
        exact = problem.run("reference", device="cuda")
        taken = watch(monkeypatch)
        ours = problem.run("aten", dtype, "cuda")
        assert taken == ({"unfold"} if channels == 64 else {"fold", "unfold"})
        for other in (unfolding, pairs):
            monkeypatch.setattr(other, "pays", lambda *_: False)
        cudnns = problem.run("aten", dtype, "cuda")
        for name, wanted in exact.items():
            errors = [float((r[name].double() - wanted).norm() / wanted.norm()) for r in (ours, cudnns)]
            assert errors[0] <= max(2 * errors[1], ROUNDING[dtype]), name

    def test_many_outputs(self, monkeypatch):
        """More than are convolved at a time."""
        taken = watch(monkeypatch)
        w = BranchWeights(torch.randn(1032, 3, 5, 5, device="cuda"), torch.randn(1032, device="cuda"))
        x = channels_last(torch.randn(2, 3, 40, 40, device="cuda"))
        wanted = F.conv2d(x.double(), w.weight.double(), w.bias.double(), padding=2)
        half = BranchWeights(w.weight.half(), w.bias.half())
        y = branch_forward(x.half(), prepared(half, (2, 40, 40), 1))
        assert taken == {"unfold"}
        torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=5e-2)


def watch(monkeypatch) -> set[str]:
    """The names of what of ``unfolding`` is called from now on."""
    called = set()
    for name in ("unfold", "fold"):
        plain = getattr(unfolding, name)
        monkeypatch.setattr(unfolding, name, lambda *args, n=name, f=plain: called.add(n) or f(*args))
    return called


@pytest.fixture
def everywhere(monkeypatch):
    """Whatever has a kernel of some width is unfolded, however small, in any dtype."""
    monkeypatch.setattr(unfolding, "pays", lambda shape, *_: shape[3] > 1)


@interpreted
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("some_bytes", [1, 15000, 1 << 20])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "size"),
    [
        (1, 8, (3, 3), (3, 5, 7)),
        (3, 64, (5, 3), (2, 4, 9)),
        (16, 5, (1, 5), (2, 3, 3)),
        (7, 4, (3, 9), (1, 2, 5)),
        (3, 20, (5, 3), (2, 4, 9)),
    ],
)
def test_interpreted_convolution_and_gradients(channels, outputs, kernel, size, has_bias, some_bytes, monkeypatch):
    monkeypatch.setattr(unfolding, "UNFOLDED_BYTES", {"input": some_bytes, "weight": some_bytes})
    count, *image = size
    x = channels_last(torch.randn(count, channels, *image))
    dy = channels_last(torch.randn(count, outputs, *image))
    w = BranchWeights(torch.randn(outputs, channels, *kernel), torch.randn(outputs) if has_bias else None)
    wide = w.weight.double()
    y = branch_forward(x, prepared(w, size, 1))
    bias = None if w.bias is None else w.bias.double()
    torch.testing.assert_close(y.double(), F.conv2d(x.double(), wide, bias, padding=w.padding), rtol=1e-5, atol=1e-4)

    dx, dw, db = convolution_gradients(dy, x, w.weight, w.padding, w.dilation, (True, True, True))
    for got, wanted in (
        (dx, conv2d_input(x.shape, wide, dy.double(), padding=w.padding)),
        (dw, conv2d_weight(x.double(), w.weight.shape, dy.double(), padding=w.padding)),
        (db, dy.double().sum((0, 2, 3))),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@interpreted
@pytest.mark.usefixtures("everywhere")
def test_interpreted_nan_stays_in_its_image():
    w = BranchWeights(torch.randn(4, 3, 3, 3))
    x, dy = (channels_last(torch.randn(3, n, 4, 5)) for n in (3, 4))
    x[1], dy[1] = float("nan"), float("nan")
    y = branch_forward(x, prepared(w, (3, 4, 5), 1))
    dx, _, _ = convolution_gradients(dy, None, w.weight, w.padding, w.dilation, (True, False, False))
    for images in (y, dx):
        assert images[1].isnan().all()
        assert images[::2].isfinite().all()


@interpreted
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"mix": "gate", "mix_activation": "tanh"}], ids=str)
def test_interpreted_layers(options, monkeypatch):
    """In every convolution of both transitions that is wide enough."""
    kernels = [Branch((3, 5), 2), Branch(3, 3, bottleneck=2), Branch((5, 1), 1)]
    problem = Problem(kernels, options, channels=3, size=(4, 5))
    exact = problem.run("reference")
    taken = watch(monkeypatch)
    ours = problem.run("aten", torch.float32)
    assert taken == {"fold", "unfold"}
    for name, wanted in exact.items():
        assert float((ours[name].double() - wanted).norm() / wanted.norm()) <= 1e-5, name


@interpreted
def test_interpreted_autograd_sees_torchs_own(monkeypatch):
    monkeypatch.setattr(unfolding, "pays", lambda *_: True)
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    assert layout.has_kernels(weight.detach())
    assert not unfolding.serves(weight, (2, 4, 5), (1, 1))
    with torch.no_grad():
        assert unfolding.serves(weight, (2, 4, 5), (1, 1))


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_unfolding_kernels_compile_without_a_gpu(dtype, capability, monkeypatch):
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, _, args, options: launches.append((kernel, args, options)))
    for channels, kernel in ((1, 5), (3, 3), (16, 7), (32, 5)):
        x = channels_last(torch.randn(2, channels, 6, 14).to(dtype))
        u = unfolding.unfold(x, kernel)
        unfolding.fold(u, kernel, x)
    assert {kernel.__name__ for kernel, *_ in launches} == {"unfold_kernel", "fold_kernel"}
    for kernel, args, options in launches:
        assert "ptx" in compile_launch(kernel, args, options, capability).asm
