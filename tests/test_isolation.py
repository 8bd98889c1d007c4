"""What is wrong with one sample, or lies beyond a sequence's length, reaches no other."""

import pytest
import torch
from problems import Problem, places

from mkconvlstm_cuda import MKConvLSTM

# Many channels and a large kernel: CPUs take the Fourier transform in float32.
PROBLEMS = {
    "two kernel sizes": Problem({1: 3, 3: 5}, {"peephole": "channel"}, batch=3, size=(5, 6)),
    "large kernels": Problem({7: 16, 9: 16}, batch=3, steps=4, channels=8, size=(20, 18)),
    "mix": Problem({1: 3, 3: 5}, {"mix": "gate", "mix_activation": "tanh"}, batch=3, size=(5, 6)),
    "recompute": Problem({3: 4}, {"recompute": True}, batch=3, size=(5, 6)),
}
DTYPES = [torch.float32, torch.bfloat16]


def outputs_and_gradients(problem, layer, inputs, sample):
    """Outputs of ``sample``, and its share of the gradients of x and the state, for a loss of all samples."""
    outputs = problem.call(layer, **inputs)
    grads = torch.autograd.grad([y.float().tanh().sum() for y in outputs], list(inputs.values()))
    of_sample = [
        t[sample] if t.dim() == 5 and t.shape[0] == problem.batch else t[:, sample] for t in (*outputs, *grads)
    ]
    return [t.detach().clone() for t in of_sample]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("backend", "device"), places())
def test_a_value_that_is_not_finite_stays_in_its_sample(backend, device, name, dtype, value):
    problem = PROBLEMS[name]
    layer = problem.layer(backend, dtype, device)
    inputs = problem.inputs(layer, dtype, device)
    wanted = outputs_and_gradients(problem, layer, inputs, 0)
    with torch.no_grad():
        inputs["x"][1, 0, 0, 2, 3] = value
        inputs["h_0"][:, 2, 0, 1, 1] = value
        inputs["c_0"][:, 2, 0, 1, 1] = value
    got = outputs_and_gradients(problem, layer, inputs, 0)
    assert all(torch.isfinite(t).all() for t in got)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("backend", "device"), places())
def test_what_lies_beyond_a_sequence_does_not_matter(backend, device, bidirectional, dtype):
    """NaN in the padding: no output, state or gradient sees it, and it gets a gradient of zero."""
    problem = Problem({1: 3, 3: 5}, {"bidirectional": bidirectional, "num_layers": 2}, (1, 4, 2), batch=3, steps=4)
    layer = problem.layer(backend, dtype, device)
    inputs = problem.inputs(layer, dtype, device)
    results = []
    for padding in (0.0, float("nan")):
        with torch.no_grad():
            for sample, length in enumerate(problem.lengths):
                inputs["x"][sample, length:] = padding
        outputs = problem.call(layer, **inputs)
        grads = torch.autograd.grad([y.sum() for y in outputs], (*inputs.values(), *layer.parameters()))
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("backend", "device"), places())
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(backend, device, steps):
    layer = MKConvLSTM(2, {1: 2, 3: 2}, num_layers=2, bidirectional=True, backend=backend, device=device)
    x = torch.randn(0, steps, 2, 4, 3, device=device, requires_grad=True)
    output, (h_n, c_n) = layer(x)
    assert output.shape == (0, steps, 8, 4, 3)
    assert h_n.shape == c_n.shape == (4, 0, 4, 4, 3)
    (output.sum() + h_n.sum() + c_n.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())
