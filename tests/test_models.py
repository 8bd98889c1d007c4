"""Forecaster: shapes, gradients, what the decoder reads, and the paper's loss."""

import pytest
import torch

from mkconvlstm_cuda import Branch, FlowAttention
from mkconvlstm_cuda.models import Forecaster, compare_with_last_frame, sequence_cross_entropy

KERNELS = {1: 2, 3: 3}


def clip(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(("channels", "patch", "layers"), [(1, 4, 1), (3, 2, 2), (2, 1, 1)])
def test_shapes_and_gradients(conditional, channels, patch, layers):
    torch.manual_seed(0)
    model = Forecaster(channels, KERNELS, patch_size=patch, num_layers=layers, conditional=conditional)
    past = clip(2, 4, channels, 8, 12).requires_grad_()
    logits = model(past, 3)
    assert logits.shape == (2, 3, channels, 8, 12)
    logits.square().mean().backward()
    assert past.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        # The unconditional decoder's first input-to-hidden convolution sees nothing but zeros.
        assert parameter.grad is not None, name
    for part in (model.encoder, model.decoder, model.readout):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters()) > 0


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("patch", [1, 4])
def test_an_empty_batch_of_past_frames_has_an_empty_forecast(conditional, patch):
    attention = FlowAttention(2 * patch**2)
    model = Forecaster(1, KERNELS, patch_size=patch, conditional=conditional, attention=attention)
    past, flow, future = clip(0, 2, 1, 16, 8).requires_grad_(), clip(0, 2, 2, 16, 8), clip(0, 4, 1, 16, 8)
    logits = model(past, 4, flow=flow, targets=future if conditional else None)
    assert logits.shape == model.forecast(past, 4, flow=flow).shape == future.shape
    logits.sum().backward()
    assert past.grad.shape == past.shape
    assert not model.readout.weight.grad.any()


@pytest.mark.parametrize("patch", [1, 2])
def test_kernels_may_be_branches_and_options_reach_both_layers(patch):
    branches = [Branch(3, 2, bottleneck=4), Branch(5, 3)]
    size = (8 // patch, 4 // patch)
    options = {"mix": "gate", "norm": "group", "peephole": "pixel", "image_size": size, "backend": "reference"}
    model = Forecaster(1, branches, patch_size=patch, **options)
    assert model(clip(1, 2, 1, 8, 4), 2).shape == (1, 2, 1, 8, 4)
    assert model.encoder.last_backend == model.decoder.last_backend == "reference"


def test_every_layers_state_reaches_the_decoder():
    torch.manual_seed(0)
    model = Forecaster(1, KERNELS, patch_size=2, num_layers=2)
    past = clip(1, 3, 1, 4, 4)
    _, (h, c) = model.encoder(torch.nn.functional.pixel_unshuffle(past, 2))
    hidden, _ = model.decoder(torch.zeros(1, 5, 1, 2, 2), (h, c))
    wanted = torch.nn.functional.pixel_shuffle(model.readout(hidden[0]), 2)
    torch.testing.assert_close(model(past, 5)[0], wanted)


def test_forecast_takes_any_horizon_and_keeps_no_graph():
    torch.manual_seed(0)
    model = Forecaster(1, KERNELS).eval()
    past = clip(2, 3, 1, 8, 8)
    long = model.forecast(past, 25)
    assert long.shape == (2, 25, 1, 8, 8)
    assert not long.requires_grad
    assert 0 < long.min() <= long.max() < 1
    torch.testing.assert_close(long[:, :4], model(past, 4).sigmoid())


def test_teacher_forcing_with_the_models_own_predictions_changes_nothing():
    torch.manual_seed(0)
    model = Forecaster(1, KERNELS, patch_size=2, conditional=True)
    past = clip(2, 3, 1, 6, 4)
    free = model(past, 4)
    torch.testing.assert_close(model(past, 4, targets=free.sigmoid()), free)
    other = model(past, 4, targets=clip(2, 4, 1, 6, 4, seed=1))
    torch.testing.assert_close(other[:, 0], free[:, 0])
    assert not torch.allclose(other[:, 1:], free[:, 1:])


def test_flow_steers_the_encoder():
    torch.manual_seed(0)
    attention = FlowAttention(flow_channels=2 * 4, branches=(3,))
    model = Forecaster(1, KERNELS, patch_size=2, attention=attention)
    past, flow = clip(2, 3, 1, 8, 8), clip(2, 3, 2, 8, 8, seed=1).requires_grad_()
    model(past, 2, flow=flow).sum().backward()
    assert flow.grad.abs().sum() > 0
    assert not torch.allclose(model(past, 2, flow=flow), model(past, 2, flow=-flow))


def test_bfloat16_autocast():
    torch.manual_seed(0)
    model = Forecaster(1, KERNELS, patch_size=2)
    past = clip(1, 3, 1, 8, 8)
    exact = model(past, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(past, 3)
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0"),
        ({"patch_size": 1.5}, "patch_size: got 1.5"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"bidirectional": True}, "bidirectional"),
        ({"batch_first": False}, "batch_first"),
        ({"attention": FlowAttention()}, r"attention: got flow_channels=2, wanted 2 \* patch_size\*\*2 = 32"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Forecaster(**{"in_channels": 1, "kernels": KERNELS, **options})


def test_names_the_argument_of_a_wrong_shape():
    plain, conditional = Forecaster(1, KERNELS), Forecaster(1, KERNELS, conditional=True)
    past = clip(1, 2, 1, 8, 8)
    for wrong in (clip(1, 2, 3, 8, 8), clip(2, 1, 8, 8), clip(1, 0, 1, 8, 8)):
        with pytest.raises(ValueError, match="past: got shape"):
            plain(wrong, 2)
    with pytest.raises(ValueError, match="multiples of 4"):
        plain(clip(1, 2, 1, 8, 6), 2)
    with pytest.raises(ValueError, match="flow: got shape"):
        plain(past, 2, flow=clip(1, 2, 2, 8, 4))
    seeing = Forecaster(1, KERNELS, attention=FlowAttention(2 * 16))
    with pytest.raises(ValueError, match=r"flow: got shape \[1, 2, 3, 8, 8\], wanted .*flow_channels=2"):
        seeing(past, 2, flow=clip(1, 2, 3, 8, 8))
    for wrong in (0, 4.5, "4", None):
        with pytest.raises(ValueError, match=f"horizon: got {wrong!r}, wanted an integer"):
            plain(past, wrong)
    for name in ("past", "flow", "targets"):
        with pytest.raises(TypeError, match=f"{name}: got list, wanted a torch.Tensor"):
            conditional(**{"past": past, "horizon": 2, name: [past]})
    with pytest.raises(ValueError, match="only a conditional forecaster"):
        plain(past, 2, targets=past)
    with pytest.raises(ValueError, match="targets: got shape"):
        conditional(past, 3, targets=past)


def test_cross_entropy_is_the_papers_sum():
    logits, target = torch.randn(3, 4, 1, 5, 5, dtype=torch.float64), torch.rand(3, 4, 1, 5, 5, dtype=torch.float64)
    p = logits.sigmoid()
    wanted = -(target * p.log() + (1 - target) * (1 - p).log()).sum() / 3
    torch.testing.assert_close(sequence_cross_entropy(logits, target), wanted)
    assert sequence_cross_entropy(logits.bfloat16(), target).dtype == torch.float32
    with pytest.raises(ValueError, match="target: got shape"):
        sequence_cross_entropy(logits, target[:, :1])


def test_comparison_with_the_last_frame():
    past, future = torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 2, 1, 4, 4)
    past[:, -1, :, 0], future[:, 0, :, 0], future[:, 1, :, 1] = 1, 1, 1
    perfect = compare_with_last_frame(40 * future - 20, past, future)
    assert perfect["clips"] == 2
    assert perfect["pixels_per_sequence"] == 32
    assert perfect["prediction"]["mse"] < 1e-12
    assert perfect["prediction"]["csi"] == 1
    assert perfect["prediction"]["cross_entropy"] < 1e-4
    assert perfect["last_frame"]["mse_by_frame"] == [0, 0.5]
    assert perfect["last_frame"]["csi"] == pytest.approx(4 / 12)
    assert perfect["mse_ratio"] < 1e-6
    undecided = compare_with_last_frame(torch.zeros_like(future), past, future)
    assert undecided["mse_ratio"] == pytest.approx(1)
    assert undecided["prediction"]["cross_entropy"] == pytest.approx(32 * torch.log(torch.tensor(2.0)).item())
