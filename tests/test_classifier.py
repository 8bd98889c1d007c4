"""VideoClassifier and its encoders: shapes, gradients, what the heads compute, weights from files."""

import pytest
import torch
from torch import nn

from mkconvlstm_cuda import FlowAttention
from mkconvlstm_cuda.classifier import VideoClassifier, accuracies, frame_cross_entropy
from mkconvlstm_cuda.encoders import VGG16, SmallEncoder, build_encoder, encode, fingerprint, resample_flow

KERNELS = {1: 2, 3: 3}


class Halving(nn.Module):
    """Takes clips, as I3D would: every second frame, every second pixel."""

    takes_clips = True

    def forward(self, clips):
        return clips[:, :, ::2, ::2, ::2]


def frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", ["lstm", "conv"])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_every_parameter_learns_from_every_frame(head, pool):
    torch.manual_seed(0)
    encoder = SmallEncoder(3, 8)
    options = {"encoder": encoder, "head": head, "pool": pool, "lstm_features": 6, "num_layers": 2}
    model = VideoClassifier(8, 4, KERNELS, bidirectional=True, **options)
    x = frames(2, 5, 3, 18, 10)
    logits = model(x)
    assert logits.shape == (2, 5, 4)
    frame_cross_entropy(logits, torch.tensor([1, 3])).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_heads_are_what_the_paper_says():
    torch.manual_seed(0)
    x = frames(2, 4, 3, 6, 5)
    for pool, reduce in (("mean", lambda h: h.mean(dim=(3, 4))), ("max", lambda h: h.amax(dim=(3, 4)))):
        model = VideoClassifier(3, 4, KERNELS, pool=pool, lstm_features=6)
        wanted = model.readout(model.lstm(reduce(model.layer(x)[0]))[0])
        torch.testing.assert_close(model(x), wanted)
    model = VideoClassifier(3, 4, KERNELS, head="conv")
    convolution, norm = model.readout
    maps = torch.einsum("kf,btfhw->btkhw", convolution.weight[:, :, 0, 0], model.layer(x)[0])
    mean, variance = maps.mean(dim=(0, 1, 3, 4)), maps.var(dim=(0, 1, 3, 4), unbiased=False)
    wanted = ((maps - mean[:, None, None]) / (variance[:, None, None] + norm.eps).sqrt()).mean(dim=(3, 4))
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_later_frames_cannot_change_earlier_predictions():
    torch.manual_seed(0)
    model = VideoClassifier(3, 4, KERNELS).eval()
    x = frames(1, 5, 3, 6, 6)
    whole = model(x)
    torch.testing.assert_close(model(x[:, :3]), whole[:, :3])
    x[:, 0] += 1
    assert not torch.allclose(model(x)[:, -1], whole[:, -1])


def test_encoders_see_frames_or_clips():
    x = frames(2, 4, 3, 8, 6)
    small = SmallEncoder(3, 8, strides=(2, 1, 1))
    torch.testing.assert_close(encode(small, x)[1, 2], small(x[1, 2][None])[0])
    bytes_ = (255 * x).round().byte()
    torch.testing.assert_close(encode(small, bytes_), encode(small, bytes_.float() / 255))
    torch.testing.assert_close(encode(Halving(), x), x[:, ::2, :, ::2, ::2])
    for wrong in (nn.Flatten(), nn.Flatten(0, 1)):
        with pytest.raises(ValueError, match="encoder: got output of shape"):
            encode(wrong, x)


def test_flow_reaches_masks_at_the_features_size():
    torch.manual_seed(0)
    model = VideoClassifier(3, 4, KERNELS, encoder=Halving(), attention=FlowAttention(branches=(3,)))
    x, flow = frames(1, 4, 3, 8, 8), frames(1, 4, 2, 8, 8, seed=1)
    assert model(x, flow).shape == (1, 2, 4)
    assert not torch.allclose(model(x, flow), model(x, -9 * flow))
    small = resample_flow(flow, (2, 4, 4))
    torch.testing.assert_close(small[0, 1, :, 0, 2], flow[0, 2:, :, :2, 4:6].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(model(x, small), model(x, flow))


def test_vgg16_takes_torchvisions_weights(tmp_path):
    """Layer 28 is conv5_3: torchvision's numbers, shapes and normalisation."""
    encoder = VGG16()
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert len(shapes) == 26
    assert sum(p.numel() for p in encoder.parameters()) == 14_714_688
    torch.save({**encoder.state_dict(), "classifier.0.weight": torch.zeros(4, 4)}, tmp_path / "vgg16.pth")
    again = build_encoder("vgg16", tmp_path / "vgg16.pth")
    x = frames(1, 3, 32, 48)
    with torch.no_grad():
        maps = again(x)
        torch.testing.assert_close(maps, encoder(x))
    assert maps.shape == (1, 512, 2, 3)
    assert maps.min() == 0
    assert fingerprint(again) == fingerprint(encoder) != fingerprint(VGG16())


def test_weights_are_only_read(tmp_path):
    from safetensors.torch import save_file

    encoder = SmallEncoder()
    save_file(encoder.state_dict(), tmp_path / "small.safetensors")
    assert fingerprint(build_encoder("small", tmp_path / "small.safetensors")) == fingerprint(encoder)
    torch.save({"0.weight": encoder}, tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    for name in ("module.pt", "text.pt", "text.safetensors", "list.pt", "other.pt"):
        with pytest.raises(ValueError, match="encoder weights"):
            build_encoder("small", tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no file"):
        build_encoder("small", tmp_path / "nothing.pt")


def test_encoders_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(
        "import torch\ndef good(): return torch.nn.Identity()\ndef bad(): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(build_encoder("my_encoders:good"), nn.Identity)
    for name, error in (("my_encoders:bad", TypeError), ("my_encoders:none", ValueError), ("nowhere:x", ValueError)):
        with pytest.raises(error, match="encoder"):
            build_encoder(name)
    with pytest.raises(ValueError, match="got 'resnet'"):
        build_encoder("resnet")


def test_accuracy_is_averaged_over_frames():
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 9.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    by_frame, by_clip = accuracies(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(by_frame, torch.tensor([2 / 3, 1]))
    torch.testing.assert_close(by_clip, torch.tensor([1.0, 1]))
    loss = frame_cross_entropy(logits.bfloat16(), torch.tensor([0, 1]))
    wanted = [nn.functional.cross_entropy(clip, torch.full((3,), k)) for k, clip in enumerate(logits)]
    torch.testing.assert_close(loss, torch.stack(wanted))
    for function in (accuracies, frame_cross_entropy):
        with pytest.raises(ValueError, match="labels: got shape"):
            function(logits, torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"head": "mlp"}, "head: got 'mlp'"),
        ({"pool": "sum"}, "pool: got 'sum'"),
        ({"lstm_features": 0}, "lstm_features: got 0"),
        ({"batch_first": False}, "batch_first"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        VideoClassifier(**{"in_channels": 3, "num_classes": 2, "kernels": KERNELS, **options})
