"""The oracle: its own equations, its gradients, and other people's implementations."""

import pytest
import torch
from problems import LIVE, PROBLEMS, Problem
from torch.autograd import gradcheck, gradgradcheck

from mkconvlstm_cuda import Branch, MKConvLSTM, MKConvLSTMCell, functional


def as_function(problem: Problem, backend: str):
    """The layer as a function of plain tensors, and those tensors."""
    layer = problem.layer(backend)
    inputs = problem.inputs(layer)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *tensors):
            return problem.call(self.layer, **dict(zip(inputs, tensors, strict=True)))

    call = Call()

    def function(*tensors):
        named = zip(parameters, tensors[len(inputs) :], strict=True)
        return torch.func.functional_call(call, {f"layer.{n}": t for n, t in named}, tensors[: len(inputs)])

    return function, (*inputs.values(), *parameters.values())


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradcheck(name):
    function, tensors = as_function(PROBLEMS[name], "reference")
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradgradcheck(name):
    function, tensors = as_function(PROBLEMS[name], "reference")
    assert gradgradcheck(function, tensors, fast_mode=True)


def test_gradcheck_element_by_element():
    problem = Problem({1: 1, 3: 1}, {"peephole": "channel"}, batch=1, steps=2, size=(3, 2))
    function, tensors = as_function(problem, "reference")
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in LIVE])
def test_gradcheck_of_aten(name):
    function, tensors = as_function(PROBLEMS[name], "aten")
    assert gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", ["two kernel sizes", "mix gate, tanh", "recompute", "lengths, peephole", "no state"])
def test_double_backward_of_aten_goes_through_the_reference(name):
    function, tensors = as_function(PROBLEMS[name], "aten")
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("case", ["tied weights", "x computed from h_0"])
def test_a_differentiable_backward_counts_each_path_once(case):
    """``create_graph=True`` changes no gradient, also where the input's part and the recurrence share a tensor."""
    torch.manual_seed(0)
    w, x, h_0 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 2, 3, 3), *2 * ((1, 2, 4, 4),)))
    u = w if case == "tied weights" else torch.randn_like(w)
    x = x if case == "tied weights" else h_0.sin()
    h, _ = functional.mkconvlstm(x[:, None].expand(-1, 3, -1, -1, -1), [w], [u], state=(h_0, h_0.cos()), backend="aten")
    plain, graphed = (
        torch.autograd.grad(h.square().sum(), (w, h_0), create_graph=c, retain_graph=True) for c in (False, True)
    )
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_equations_written_out():
    """Eqs. 6-10 for one pixel, one channel, with numbers that a reader can follow."""
    cell = MKConvLSTMCell(1, {1: 1}, peephole="channel", dtype=torch.float64, backend="reference")
    with torch.no_grad():
        cell.input_transition.branches[0].conv.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1))
        cell.hidden_transition.branches[0].conv.weight.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8]).view(4, 1, 1, 1))
        cell.bias.copy_(torch.tensor([0.01, 0.02, 0.03, 0.04]))
        cell.peephole.copy_(torch.tensor([1.1, 1.2, 1.3]).view(3, 1, 1, 1))
    x, h, c = (torch.tensor(v, dtype=torch.float64) for v in (2.0, -1.0, 0.5))
    for output_peephole in ("previous", "current"):
        cell.output_peephole = output_peephole
        i = torch.sigmoid(0.1 * x + 0.5 * h + 1.1 * c + 0.01)
        f = torch.sigmoid(0.2 * x + 0.6 * h + 1.2 * c + 0.02)
        new_c = f * c + i * torch.tanh(0.3 * x + 0.7 * h + 0.03)
        o = torch.sigmoid(0.4 * x + 0.8 * h + 1.3 * (c if output_peephole == "previous" else new_c) + 0.04)
        state = (h.view(1, 1, 1, 1), c.view(1, 1, 1, 1))
        got_h, got_c = cell(x.view(1, 1, 1, 1), state)
        torch.testing.assert_close(got_c.squeeze(), new_c)
        torch.testing.assert_close(got_h.squeeze(), o * torch.tanh(new_c))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_equals_torch_lstm_without_space(backend, bidirectional):
    """H = W = K = 1 is nn.LSTM, with layers, directions, state and gradients."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(5, 4, num_layers=2, bidirectional=bidirectional, batch_first=True, dtype=torch.float64)
    ours = MKConvLSTM(5, {1: 4}, num_layers=2, bidirectional=bidirectional, backend=backend, dtype=torch.float64)
    suffixes = [f"_l{layer}{side}" for layer in range(2) for side in ("", "_reverse")[: 1 + bidirectional]]
    with torch.no_grad():
        for cell, suffix in zip(ours.cells, suffixes, strict=True):
            cell.input_transition.branches[0].conv.weight[:, :, 0, 0] = getattr(lstm, f"weight_ih{suffix}")
            cell.hidden_transition.branches[0].conv.weight[:, :, 0, 0] = getattr(lstm, f"weight_hh{suffix}")
            cell.bias.copy_(getattr(lstm, f"bias_ih{suffix}") + getattr(lstm, f"bias_hh{suffix}"))
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    h_0, c_0 = (torch.randn(len(ours.cells), 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted, (wanted_h, wanted_c) = lstm(x, (h_0, c_0))
    spatial = [t[..., None, None] for t in (x, h_0, c_0)]
    got, (got_h, got_c) = ours(spatial[0], (spatial[1], spatial[2]))
    dy = torch.randn_like(wanted)
    pairs = [(got[..., 0, 0], wanted), (got_h[..., 0, 0], wanted_h), (got_c[..., 0, 0], wanted_c)]
    pairs += zip(
        *(torch.autograd.grad((y, h, c), (x, h_0, c_0), (dy, h.detach(), c.detach()))
          for y, h, c in ((pairs[0][0], pairs[1][0], pairs[2][0]), (wanted, wanted_h, wanted_c))),
        strict=True,
    )  # fmt: skip
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def keras_like(kernels, channels: int, backend: str) -> MKConvLSTM:
    """Keras' ConvLSTM2D as its own tests set it up: kernels 0.01, recurrent kernels 0.02, unit forget bias."""
    layer = MKConvLSTM(channels, kernels, backend=backend)
    with torch.no_grad():
        for cell in layer.cells:
            for b in cell.input_transition.branches:
                b.conv.weight.fill_(0.01)
            for b in cell.hidden_transition.branches:
                b.conv.weight.fill_(0.02)
    return layer


def ramp(*shape: int, divisor: float) -> torch.Tensor:
    """0, 1, 2, ... / divisor, laid out channels-last as Keras does; [..., C, H, W]."""
    t = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) / divisor
    return t.movedim(-1, -3)


@pytest.mark.parametrize("kernels", [{3: 4}, [Branch(3, 1), Branch(3, 3)]], ids=["one branch", "two branches"])
@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_reproduces_keras(backend, kernels):
    """The sums that Keras' own tests of ConvLSTMCell and ConvLSTM2D expect."""
    layer = keras_like(kernels, 3, backend)
    x, state = ramp(2, 5, 5, 3, divisor=10), ramp(2, 5, 5, 4, divisor=10)[None]
    h, (_, c) = layer.step(x, (state, state))
    assert h.sum().item() == pytest.approx(188.89502, rel=1e-6)
    assert c.sum().item() == pytest.approx(2170.444, rel=1e-6)
    state = ramp(2, 5, 5, 4, divisor=100)[None]
    output, _ = layer(ramp(2, 3, 5, 5, 3, divisor=100), (state, state))
    assert output[:, -1].sum().item() == pytest.approx(119.812454, rel=1e-6)
