"""The video classifiers of Agethen & Hsu, section IV-A: Fig. 6, and the variant on top of I3D."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import encode, resample_flow
from .layer import MKConvLSTM
from .transition import Kernels

HEADS = ("lstm", "conv")
POOLS = ("mean", "max")


class VideoClassifier(nn.Module):
    """Frames -> encoder -> MKConvLSTM -> head -> the logits of the classes, for every frame.

    Heads:
        "lstm" (Fig. 6): pooling over the image, an FC-LSTM over time, and a linear layer before the softmax.
        "conv" (the I3D variant, section IV-A4): a 1x1 convolution with batch norm, averaged over the image.

    Args:
        in_channels: channels of what the layer reads: of the encoder's output, if there is an encoder.
        num_classes: K.
        kernels: kernel size -> hidden channels, or a list of Branch; as for MKConvLSTM.
        encoder: a module that `encoders.encode` takes, trained end to end; None: `forward` takes feature maps, such as
            a frozen encoder gave once and for all.
        head: "lstm" or "conv".
        pool: over the image, before the FC-LSTM: "mean" or "max"; the paper does not say which.
        lstm_features: hidden features of the FC-LSTM.
        dropout: probability, on what the last linear layer or convolution reads.
        layer_options: everything else that MKConvLSTM takes (mix, norm, attention, num_layers, backend, ...).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        kernels: Kernels,
        *,
        encoder: nn.Module | None = None,
        head: str = "lstm",
        pool: str = "mean",
        lstm_features: int = 256,
        dropout: float = 0.0,
        **layer_options,
    ):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("lstm_features", lstm_features)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least 1")
        for name, value, choices in (("head", head, HEADS), ("pool", pool, POOLS)):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, wanted one of {choices}")
        if not layer_options.get("batch_first", True):
            raise ValueError("batch_first: VideoClassifier is batch first; leave it out")
        self.num_classes, self.pool = num_classes, pool
        self.encoder = encoder
        self.layer = MKConvLSTM(in_channels, kernels, **layer_options)
        placement = {name: layer_options.get(name) for name in ("device", "dtype")}
        channels = self.layer.hidden_channels * self.layer.directions
        self.dropout = nn.Dropout(dropout)
        if head == "lstm":
            self.lstm = nn.LSTM(channels, lstm_features, batch_first=True, **placement)
            self.readout = nn.Linear(lstm_features, num_classes, **placement)
        else:
            self.lstm = None
            self.readout = nn.Sequential(
                nn.Conv2d(channels, num_classes, 1, bias=False, **placement), nn.BatchNorm2d(num_classes, **placement)
            )

    def forward(self, x: Tensor, flow: Tensor | None = None) -> Tensor:
        """Logits [B, T', K]; their softmax over K is the prediction of each frame.

        Args:
            x: with an encoder, frames [B, T, C, H, W], uint8 or floating point in [0, 1]; without, feature maps
                [B, T', C', h, w]. T' is T unless the encoder takes clips and shortens them.
            flow: [B, T, 2, H, W] in pixels per frame, with flow attention; averaged to the feature maps' size.

        Raises:
            ValueError, TypeError: a shape or dtype does not fit; the message names the argument.
        """
        features = x if self.encoder is None else encode(self.encoder, x)
        if flow is not None:
            flow = resample_flow(flow, (features.shape[1], *features.shape[3:]))
        hidden, _ = self.layer(features, flow=flow)
        if self.lstm is None:
            maps = self.readout(self.dropout(hidden.flatten(0, 1)))
            return maps.mean(dim=(2, 3)).unflatten(0, hidden.shape[:2])
        pooled = hidden.mean(dim=(3, 4)) if self.pool == "mean" else hidden.amax(dim=(3, 4))
        return self.readout(self.dropout(self.lstm(pooled)[0]))


def frame_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each clip, the mean over its frames, [B] in nats; in float32 or wider.

    Args:
        logits: [B, T, K]. labels: [B] int64, one for all frames of a clip.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(logits, labels)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    every = labels[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.transpose(1, 2), every, reduction="none").mean(dim=1)


def accuracies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 accuracy of each clip, two ways, both [B] float32 in [0, 1].

    Section IV-A2: "Accuracy was averaged over all frames". Its plain reading is the first: the share of a clip's frames
    whose own prediction is right. The second is 1 where the mean of the softmax over all frames is right, else 0.

    Args, raises: as `frame_cross_entropy`.
    """
    _check(logits, labels)
    by_frame = (logits.argmax(dim=-1) == labels[:, None]).float().mean(dim=1)
    by_clip = (logits.float().softmax(dim=-1).mean(dim=1).argmax(dim=-1) == labels).float()
    return by_frame, by_clip


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 3 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels: got shape {list(labels.shape)} with logits {list(logits.shape)}, wanted [B] and [B, T, K]"
        )
