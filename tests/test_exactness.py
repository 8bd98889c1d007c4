"""Convolutions of integers that a half type holds are exact on every backend, and every run gives the same bits."""

from contextlib import nullcontext

import pytest
import torch
from problems import Problem, places
from torch.nn import functional as F

from mkconvlstm_cuda import autograd, ops
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights, input_gradient, weight_gradients
from mkconvlstm_cuda.interleaving import join_gates

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BATCH, IMAGE = 2, (6, 5)
BRANCHES = {  # of the hidden transition: kernel sizes and hidden channels
    "one kernel size": [((3, 3), 8)],
    "two kernel sizes": [((3, 3), 8), ((5, 5), 16)],
    "three, rectangular": [((1, 1), 3), ((3, 5), 2), ((7, 3), 1)],
}
RECURRENT = [p for p in places() if p.values[0] != "reference"]  # which has no operation of its own


def integers(low, high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).double()


def weights(branches, channels, dtype, device):
    """Integers from -1 to 1, most of them 0 where there are many, so that sums stay below 2^8."""
    made = []
    for n, ((height, width), size) in enumerate(branches):
        w = integers(-1, 1, 4 * size, channels, height, width, seed=n)
        kept = integers(0, max(1, channels * height * width // 40), *w.shape, seed=50 + n) == 0
        made.append(BranchWeights((w * kept).to(device, dtype)))
    return TransitionWeights(tuple(made))


def convolved(x, w):
    """The branches' convolutions of ``x`` [N, C, H, W], in float64, each [N, 4*F_r, H, W]."""
    outputs = [F.conv2d(x.double().cpu(), b.weight.double().cpu(), padding=b.padding) for b in w.branches]
    assert max(float(y.abs().max()) for y in outputs) <= 2**8
    return outputs


def parts(images, steps, dtype, device):
    """[T*B, 4*F_r, H, W] as the backends want their parts: [B, T, 4*F_r, H, W], [T, B, H, W, 4*F_r] in memory."""
    out = []
    for y in images:
        y = y.to(device, dtype).contiguous(memory_format=torch.channels_last)
        out.append(y.unflatten(0, (steps, -1)).transpose(0, 1))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize(("backend", "device"), RECURRENT)
def test_hidden_convolution_is_exact(backend, device, name, dtype):
    """U(h_0) within the recurrence gives the same bits as its exact value handed in as z."""
    hidden = sum(size for _, size in BRANCHES[name])
    w = weights(BRANCHES[name], hidden, dtype, device)
    w = TransitionWeights(tuple(BranchWeights(b.weight / 16) for b in w.branches))  # gates that are not saturated
    h_0 = integers(-2, 2, BATCH, hidden, *IMAGE, seed=9)
    c_0 = integers(-2, 2, BATCH, hidden, *IMAGE, seed=10).to(device, torch.float32)
    exact = [y / 16 for y in convolved(h_0, TransitionWeights(tuple(BranchWeights(16 * b.weight) for b in w.branches)))]
    runs = []
    for z, state in (([torch.zeros_like(y) for y in exact], h_0), (exact, torch.zeros_like(h_0))):
        z = parts(z, 1, dtype, device)
        state = state.to(device, dtype)
        h, c = ops.sequence_forward(z, w.tensors(), *w.form, state, c_0, None, "previous", None, True, backend)
        runs.append((h, c, *z))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][0].unique().numel() > 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize(("backend", "device"), RECURRENT)
def test_hidden_convolutions_gradient_is_exact(backend, device, name, dtype):
    """Gates of one half and c = 0 make the gradients of all pre-activations small integers."""
    hidden = sum(size for _, size in BRANCHES[name])
    w = weights(BRANCHES[name], hidden, dtype, device)
    shape = (BATCH, hidden, *IMAGE)
    dh, c_0, h_0 = integers(-1, 1, *shape, seed=20) * 8, integers(-2, 2, *shape, seed=21), integers(-2, 2, *shape)
    dc = dh / 2
    of_gates = torch.stack([torch.zeros_like(dc), dc * c_0 / 4, dc / 2, torch.zeros_like(dc)], dim=1)
    sizes = [size for _, size in BRANCHES[name]]
    dz = [d.flatten(1, 2) for d in of_gates.split(sizes, dim=2)]
    values = torch.tensor([0.5, 0.5, 0.0, 0.5], dtype=torch.float64)[:, None, None, None]
    gates = parts(
        [values.expand(4, n, *IMAGE).flatten(0, 1).expand(BATCH, -1, -1, -1) for n in sizes], 1, dtype, device
    )
    h = torch.zeros(BATCH, 1, hidden, *IMAGE, dtype=dtype, device=device)
    c = torch.zeros(1, BATCH, *IMAGE, hidden, device=device).permute(1, 0, 4, 2, 3)
    dh_0, dc_0, dbias = ops.sequence_backward(
        gates, h, c, w.tensors(), *w.form, h_0.to(device, dtype), c_0.to(device, torch.float32), None, "previous",
        dh.to(device, dtype)[:, None], None, None, True, backend,
    )  # fmt: skip
    exact = sum(
        torch.nn.grad.conv2d_input(shape, b.weight.double().cpu(), d, padding=b.padding)
        for b, d in zip(w.branches, dz, strict=True)
    )
    assert exact.abs().max() <= 2**8
    assert torch.equal(dh_0.double().cpu(), exact)
    assert torch.equal(dc_0.double().cpu(), dc / 2)
    assert torch.equal(dbias.double().cpu(), join_gates([d.sum((0, 2, 3)) for d in dz]))
    for got, wanted in zip(gates, dz, strict=True):
        assert torch.equal(got[:, 0].double().cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_convolutions_over_all_steps_and_their_gradients_are_exact(device, dtype):
    steps, channels, branches = 3, 4, BRANCHES["two kernel sizes"]
    w = weights(branches, channels, dtype, device)
    x = integers(-2, 2, BATCH, steps, channels, *IMAGE, seed=30)
    images = x.transpose(0, 1).flatten(0, 1)
    exact = convolved(images, w)
    got = autograd.preactivations(x.to(device, dtype), None, w, w, dtype, None)
    for a, b in zip(got, exact, strict=True):
        assert torch.equal(a.transpose(0, 1).flatten(0, 1).double().cpu(), b)
    dz = [integers(-1, 1, *y.shape, seed=31 + n) for n, y in enumerate(exact)]
    seen = images.to(device, dtype).contiguous(memory_format=torch.channels_last)
    ours = [d.to(device, dtype).contiguous(memory_format=torch.channels_last) for d in dz]
    needs = [t is not None for t in w.tensors()]
    grads = [g for g in weight_gradients(seen, ours, w, needs) if g is not None]
    for b, d, grad in zip(w.branches, dz, grads, strict=True):
        wanted = torch.nn.grad.conv2d_weight(images, b.weight.shape, d, padding=b.padding)
        assert wanted.abs().max() <= 2**8
        assert torch.equal(grad.double().cpu(), wanted)
    wanted = sum(
        torch.nn.grad.conv2d_input(images.shape, b.weight.double().cpu(), d, padding=b.padding)
        for b, d in zip(w.branches, dz, strict=True)
    )
    assert wanted.abs().max() <= 2**8
    assert torch.equal(input_gradient(ours, w, None).double().cpu(), wanted)


REPEATED = Problem({3: 8, 5: 8}, {"peephole": "channel"}, batch=3, steps=5, channels=4, size=(12, 10))
RUNS = {"cpu": 30, "cuda": 1000}


class Run:
    """Forward and backward of one layer on fixed values."""

    def __init__(self, backend, dtype, device):
        self.layer = REPEATED.layer(backend, dtype, device)
        self.inputs = REPEATED.inputs(self.layer, dtype, device)

    def __call__(self):
        outputs = REPEATED.call(self.layer, **self.inputs)
        wanted = (*self.inputs.values(), *self.layer.parameters())
        return [y.detach() for y in outputs] + list(torch.autograd.grad([y.sum() for y in outputs], wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "device"), places())
def test_every_run_gives_the_same_bits(backend, device, dtype):
    """On GPUs while another stream keeps them busy, and from three streams by turns."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        run = Run(backend, dtype, device)
        first = run()
        if device == "cuda":
            torch.cuda.synchronize()
            busy, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(3)]
            matrix = torch.randn(1024, 1024, device=device)
        differing = []
        for n in range(RUNS[device] if backend != "reference" else 30):
            if device == "cuda":
                with torch.cuda.stream(busy):
                    matrix = (matrix @ matrix).clamp(-1, 1)
            with torch.cuda.stream(streams[n % 3]) if device == "cuda" else nullcontext():
                differing.append(torch.stack([(a != b).any() for a, b in zip(first, run(), strict=True)]))
        if device == "cuda":
            torch.cuda.synchronize()
        assert not torch.stack(differing).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [pytest.param(name, marks=gpu) for name in ("triton", "cuda", "aten")])
def test_a_cuda_graph_gives_the_same_bits(backend, dtype):
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        run = Run(backend, dtype, "cuda")
        wanted = run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        for _ in range(100):
            for t in results:
                t.zero_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
