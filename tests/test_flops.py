"""Operations are counted as torch counts the reference's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mkconvlstm_cuda import Branch, MKConvLSTM

OPTIONS = {
    "two kernel sizes": {},
    "dilation": {"kernels": [Branch(3, 4), Branch(3, 4, dilation=2)]},
    "other hidden kernels": {"hidden_kernels": {1: 8}},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
}
COMPUTED_AGAIN = {  # in backward, beyond what the reference computes
    "bottleneck": {"kernels": [Branch(3, 4, bottleneck=2), Branch(3, 4)]},
    "mix": {"mix": "gate"},
    "mix, tanh": {"mix": "full", "mix_activation": "tanh"},
}


def layer_of(options, **more):
    return MKConvLSTM(4, **{"kernels": {3: 4, 5: 4}, **options, **more})


def inputs_of(layer):
    x = torch.randn(2, 5, 4, 8, 8, requires_grad=True)
    h_0, c_0 = (torch.randn(len(layer.cells), 2, layer.hidden_channels, 8, 8, requires_grad=True) for _ in range(2))
    return x, (h_0, c_0)


def count(function, *args, backward=False):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output, _ = function(*args)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [*OPTIONS, *COMPUTED_AGAIN])
def test_forward_counts_as_the_reference_does(name):
    options = {**OPTIONS, **COMPUTED_AGAIN}[name]
    auto, reference = (layer_of(options, backend=backend) for backend in ("auto", "reference"))
    x, state = inputs_of(auto)
    assert count(auto, x) == count(auto, x, state) == count(reference, x)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_counts_as_the_reference_does(name):
    auto, reference = (layer_of(OPTIONS[name], backend=backend) for backend in ("auto", "reference"))
    x, state = inputs_of(auto)
    forward = count(auto, x)
    whole = count(auto, x, state, backward=True)
    assert whole == count(reference, x, state, backward=True)
    assert count(layer_of(OPTIONS[name], recompute=True), x, state, backward=True) == whole + forward
    # Without a state the reference alone multiplies the zeros before the first step by its gradient of the weights.
    less, more = count(auto, x, backward=True), count(reference, x, backward=True)
    assert less < more < whole


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"hidden_kernels": {1: 8}, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_exported_programs_count_as_the_layer_does(options, with_state, frozen):
    layer = layer_of(options)
    if frozen:
        layer.cells[0].input_transition.requires_grad_(False)
    x, state = inputs_of(layer)
    args = (x, tuple(s.detach() for s in state)) if with_state else (x,)
    exported = torch.export.export(layer, args).module()
    assert count(exported, *args) == count(layer, *args)
    assert count(exported, *args, backward=True) == count(layer, *args, backward=True)
