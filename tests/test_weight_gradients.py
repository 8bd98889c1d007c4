"""Gradients of weights by other ways than one convolution's each: of pairs of pixels, of x and h side by side."""

import pytest
import torch
from problems import PROBLEMS, Problem
from torch.nn.grad import conv2d_weight
from triton_problems import gpu

from mkconvlstm_cuda import Branch, MKConvLSTM, joint, pairs, unfolding
from mkconvlstm_cuda.backward import LayerBackward
from mkconvlstm_cuda.check import ROUNDING
from mkconvlstm_cuda.convolution import channels_last, convolution_gradients

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 5), (5, 3), (3, 7), (1, 9), (1, 11)], ids=str)
@pytest.mark.parametrize("size", [(2, 4, 6), (1, 1, 2), (3, 2, 14), (0, 3, 4)], ids=str)
def test_pairs(kernel, size, outputs):
    count, *image = size
    x, dy = (channels_last(torch.randn(count, n, *image, dtype=torch.float64)) for n in (3, outputs))
    weight = torch.randn(outputs, 3, *kernel, dtype=torch.float64)
    wanted = conv2d_weight(x, weight.shape, dy, padding=[k // 2 for k in kernel])
    torch.testing.assert_close(pairs.weight_gradient(x, dy, weight), wanted, rtol=1e-12, atol=1e-12)


def test_pairs_need_no_copy():
    x = channels_last(torch.randn(2, 3, 4, 6))
    assert pairs.paired(x).data_ptr() == x.data_ptr()
    assert pairs.paired(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pairs.paired(x)[:, 3:], x[..., 1::2])


@pytest.mark.parametrize(
    ("outputs", "channels", "kernel", "width", "dtype", "dilation", "wanted"),
    [
        (128, 32, 5, 96, torch.bfloat16, (1, 1), True),
        (4, 1, 5, 14, torch.float16, (1, 1), True),
        (128, 33, 5, 96, torch.bfloat16, (1, 1), False),
        (256, 33, 5, 96, torch.bfloat16, (1, 1), True),
        (512, 64, 5, 14, torch.bfloat16, (1, 1), True),
        (512, 65, 5, 14, torch.bfloat16, (1, 1), False),
        (128, 32, 5, 97, torch.bfloat16, (1, 1), False),
        (128, 32, 5, 96, torch.float32, (1, 1), False),
        (128, 32, 5, 96, torch.bfloat16, (1, 2), False),
        (128, 32, 3, 96, torch.bfloat16, (1, 1), True),
        (128, 17, 3, 96, torch.bfloat16, (1, 1), True),
        (128, 16, 3, 96, torch.bfloat16, (1, 1), False),
        (512, 33, 3, 96, torch.bfloat16, (1, 1), False),
        (128, 32, 1, 96, torch.bfloat16, (1, 1), False),
        (128, 32, 7, 96, torch.bfloat16, (1, 1), False),
    ],
)
def test_what_pays_in_pairs(outputs, channels, kernel, width, dtype, dilation, wanted):
    shape, images = (outputs, channels, 5, kernel), (80, 96, width)
    assert pairs.pays(shape, images, dilation, dtype) is wanted
    assert pairs.pays(shape, (1, 16, width), dilation, dtype) is (wanted and channels <= 32)
    assert not pairs.serves(torch.empty(shape, dtype=dtype), images, dilation)  # a CPU's


JOINT = {
    "two kernel sizes": True,
    "one kernel size": True,
    "no state": True,
    "one step, one sample": True,
    "rectangular kernels": True,
    "peephole pixel, current": True,
    "two layers, bidirectional, lengths": True,
    "lengths, peephole": True,
    "other hidden kernels": False,
    "bottleneck and dilation": False,
    "mix gate, tanh": False,
    "recompute": False,  # in pieces
    "masks for one branch": False,  # X is not the layer's own
}


def joined(monkeypatch) -> list:
    """The shapes of x and h side by side from now on, wherever gradients of both weights are computed together."""
    calls, plain = [], joint.joint_gradients

    def record(images, *args):
        calls.append(tuple(images.shape))
        return plain(images, *args)

    monkeypatch.setattr(joint, "joint_gradients", record)
    return calls


def everywhere(monkeypatch) -> None:
    """Also on CPUs and of any size."""
    monkeypatch.setattr(
        LayerBackward,
        "joins",
        property(lambda self: joint.possible(self.w_x, self.w_h, self.needs_input, self.needs_hidden)),
    )


@pytest.mark.parametrize("name", JOINT)
def test_joint_gradients(name, monkeypatch):
    calls = joined(monkeypatch)
    everywhere(monkeypatch)
    problem = PROBLEMS[name]
    exact, ours = problem.run("reference"), problem.run("aten")
    assert bool(calls) is JOINT[name]
    for key, wanted in exact.items():
        torch.testing.assert_close(ours[key], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["input_transition.branches.0", "hidden_transition.branches.1"])
def test_joint_gradients_of_all_weights_or_none(frozen, monkeypatch):
    calls = joined(monkeypatch)
    everywhere(monkeypatch)
    layer = PROBLEMS["two kernel sizes"].layer("aten")
    layer.get_parameter(f"cells.0.{frozen}.conv.weight").requires_grad_(False)
    layer(torch.randn(2, 3, 2, 4, 3, dtype=torch.float64))[0].sum().backward()
    assert not calls
    assert sum(p.grad is None for p in layer.parameters()) == 1


@pytest.mark.parametrize(
    ("shape", "hidden", "dtype", "wanted"),
    [
        ((1, 20, 64, 32, 32), 64, torch.bfloat16, True),
        ((2, 16, 192, 32, 32), 64, torch.float16, True),
        ((1, 2, 448, 8, 8), 64, torch.bfloat16, True),
        ((1, 2, 576, 8, 8), 64, torch.bfloat16, False),  # too many channels
        ((2, 17, 192, 32, 32), 64, torch.float16, False),  # too many pixels
        ((1, 20, 32, 32, 32), 64, torch.bfloat16, False),
        ((1, 20, 64, 32, 32), 64, torch.float32, False),
    ],
)
def test_what_pays_jointly(shape, hidden, dtype, wanted):
    assert joint.pays(shape, hidden, dtype) is wanted


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("state", [False, True])
    @pytest.mark.parametrize("kernels", [{3: 32, 5: 32}, [Branch((5, 3), 24), Branch(1, 40)]], ids=str)
    def test_layers_are_as_close_as_apart(self, kernels, state, dtype, monkeypatch):
        problem = Problem(kernels, state=state, batch=2, steps=5, channels=64, size=(16, 24))
        exact = problem.run("reference", device="cuda")
        calls = joined(monkeypatch)
        ours = problem.run("aten", dtype, "cuda")
        assert calls == [(10, 128, 16, 24)]
        monkeypatch.setattr(joint, "pays", lambda *_: False)
        apart = problem.run("aten", dtype, "cuda")
        for name, wanted in exact.items():
            errors = [float((r[name].double() - wanted).norm() / wanted.norm()) for r in (ours, apart)]
            assert errors[0] <= max(2 * errors[1], ROUNDING[dtype]), name

    def test_joint_gradients_in_a_graph(self, monkeypatch):
        """There the branches' gradients and x's run side by side."""
        calls = joined(monkeypatch)
        torch.manual_seed(0)
        layer = MKConvLSTM(64, {3: 32, 5: 32}, device="cuda").bfloat16()
        x = torch.randn(1, 8, 64, 32, 32, device="cuda").bfloat16().requires_grad_()
        wanted = [x, *layer.parameters()]

        def run():
            with torch.backends.cudnn.flags(enabled=True, deterministic=True):
                return torch.autograd.grad(layer(x)[0].square().sum(), wanted)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(10):  # each time of other values, so that nothing left from the last time will do
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
        assert len(calls) == 12

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize(("channels", "kernel"), [(1, 5), (17, 3), (24, 5), (32, (3, 5)), (32, 3)], ids=str)
    def test_pairs_are_as_close_as_cudnn(self, channels, kernel, dtype, monkeypatch):
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        weight = torch.randn(64, channels, *kernel, device="cuda", dtype=dtype)
        x, dy = (channels_last(torch.randn(8, n, 40, 30, device="cuda", dtype=dtype)) for n in (channels, 64))
        padding = [k // 2 for k in kernel]
        assert pairs.serves(weight, (8, 40, 30), (1, 1))
        wanted = conv2d_weight(x.double(), weight.shape, dy.double(), padding=padding)
        errors = []
        for ways in (pairs, None):
            monkeypatch.setattr(pairs, "serves", lambda *_, ways=ways: ways is pairs)
            monkeypatch.setattr(unfolding, "serves", lambda *_, **__: False)
            _, dw, _ = convolution_gradients(dy, x, weight, padding, (1, 1), (False, True, False))
            errors.append(float((dw.double() - wanted).norm() / wanted.norm()))
        assert errors[0] <= max(2 * errors[1], ROUNDING[dtype])
