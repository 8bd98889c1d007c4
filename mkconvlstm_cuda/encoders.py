"""Encoders: modules that turn the frames of a video into feature maps, from which a ConvLSTM reads."""

import hashlib
import importlib
import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import load_tensors
from .functional import check_tensor

_VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


class SmallEncoder(nn.Sequential):
    """Three 3x3 convolutions with ReLU, which halve the image as often as `strides` says; trained end to end.

    [N, in_channels, H, W] with values in [0, 1] -> [N, channels, h, w]; with strides (2, 2, 2), h and w are an eighth
    of H and W, rounded up.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, strides: tuple[int, int, int] = (2, 2, 2)):
        widths = (in_channels, channels // 2, channels, channels)
        layers = []
        for (inputs, outputs), stride in zip(itertools.pairwise(widths), strides, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        super().__init__(*layers)


class VGG16(nn.Module):
    """VGG-16 up to `conv5_3` and its ReLU (section IV-A2): [N, 3, H, W] in [0, 1] -> [N, 512, H/16, W/16].

    A frame of 224 x 224 gives the paper's 14 x 14 x 512. Names and numbers of the layers are torchvision's, so that its
    weights fit. Frames are normalised by the mean and standard deviation that go with those weights.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in _VGG16:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        return self.features((frames - self.mean) / self.std)


def build_encoder(name: str, weights: str | Path | None = None, in_channels: int = 3) -> nn.Module:
    """The encoder of that name, with weights from a file.

    Args:
        name: "small"; "vgg16"; or "package.module:factory", which is imported and called without arguments, and gives
            any module that `encode` takes. Name only code that you trust.
        weights: a state_dict, saved by `torch.save` (read with `weights_only=True`) or as safetensors. Layers of
            torchvision's VGG-16 above conv5_3 are left out.
        in_channels: channels of a frame, for "small".

    Raises:
        ValueError: there is no such encoder, or the weights do not fit. TypeError: the factory gave no module.
        FileNotFoundError: there is no such file.
    """
    if name == "small":
        encoder = SmallEncoder(in_channels)
    elif name == "vgg16":
        encoder = VGG16()
    elif ":" in name:
        module, _, factory = name.partition(":")
        try:
            encoder = getattr(importlib.import_module(module), factory)()
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"encoder: {name!r} cannot be imported ({error})") from error
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: {name!r} gave a {type(encoder).__name__}, wanted a torch.nn.Module")
    else:
        raise ValueError(f"encoder: got {name!r}, wanted 'small', 'vgg16' or 'package.module:factory'")
    if weights is not None:
        state = read_weights(weights)
        if isinstance(encoder, VGG16):
            state = {key: value for key, value in state.items() if key in encoder.state_dict()}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"encoder weights: {weights} do not fit {name!r}: {error}") from error
    return encoder


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a file that `torch.save` or safetensors wrote; nothing in the file is executed.

    Raises:
        OSError: there is no such file, or it cannot be read. ValueError: it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"encoder weights: there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"encoder weights: cannot read {path}: {error}") from error
    state = load_tensors(path, "encoder weights")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"encoder weights: {path} holds no state_dict")
    return state


def encode(encoder: nn.Module, frames: Tensor) -> Tensor:
    """Feature maps [B, T', C', h, w] of frames [B, T, C, H, W], uint8 or floating point in [0, 1].

    The encoder sees each frame by itself, [B * T, C, H, W] -> [B * T, C', h, w], and T' = T; or, if it has an attribute
    `takes_clips` that is true, as I3D would, whole clips [B, C, T, H, W] -> [B, C', T', h, w].

    Raises:
        ValueError: what the encoder gives has another number of dimensions.
    """
    frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames
    check_tensor("frames", frames, ("B", "T", "C", "H", "W"))
    clips = getattr(encoder, "takes_clips", False)
    features = encoder(frames.transpose(1, 2) if clips else frames.flatten(0, 1))
    wanted = "[B, C', T', h, w]" if clips else "[B * T, C', h, w]"
    if features.dim() != (5 if clips else 4) or (not clips and len(features) != frames.shape[0] * frames.shape[1]):
        raise ValueError(f"encoder: got output of shape {list(features.shape)}, wanted {wanted}")
    return features.transpose(1, 2) if clips else features.unflatten(0, frames.shape[:2])


def fingerprint(encoder: nn.Module) -> str:
    """A hash of the kind of an encoder and of all its weights: equal for equal features."""
    digest = hashlib.sha256(repr(encoder).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def resample_flow(flow: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Flow [B, T, 2, H, W] averaged to `size` = (T', h, w) of the feature maps; still in pixels of the frames.

    The paper says only that masks are made "from optical flow features" of the input (section III-D).
    """
    if (flow.shape[1], *flow.shape[3:]) == tuple(size):
        return flow
    return F.adaptive_avg_pool3d(flow.transpose(1, 2), size).transpose(1, 2)
