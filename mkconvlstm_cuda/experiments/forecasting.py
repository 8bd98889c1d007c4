"""Forecasters of moving digits, trained alike for every variant (section III-B1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data import MovingDigits
from ..models import Forecaster, sequence_cross_entropy
from .experiment import Progress, Settings
from .training import Batch, mean_loss, train

FULL = {
    "steps": 600,
    "batch_size": 16,
    "test_clips": 512,
    "learning_rate": 8e-3,
    "precision": "bfloat16",
    "past": 10,
    "horizon": 10,
    "image_size": 64,
    "digit_size": 22,
    "patch_size": 4,
    "speed_spread": 0.5,
}
"""What all forecasters of a full run share. Sizes in pixels, past and horizon in frames."""

QUICK = {
    **FULL,
    "steps": 40,
    "batch_size": 4,
    "test_clips": 16,
    "precision": "float32",
    "past": 5,
    "horizon": 5,
    "image_size": 32,
    "digit_size": 12,
}


def kernels_of(options: Mapping) -> dict[int, int]:
    """{kernel size: hidden channels} of a variant's options, where JSON has made strings of the sizes."""
    return {int(size): channels for size, channels in options["kernels"].items()}


class DigitsTask:
    """Moving digits to train one forecaster on and to judge it by, and how that is done.

    Two variants with the same seed see the same clips, so that their losses can be compared pair by pair.

    Args:
        settings: with the keys of `FULL`.
        speeds: mean speed of every digit, in pixels per frame.
        seed: of the clips.
        device: where everything happens.
        with_flow: whether the model is given the flow too, in units of the fastest mean speed.
    """

    def __init__(
        self, settings: Settings, speeds: Sequence[float], seed: int, device: torch.device, with_flow: bool = False
    ):
        self.settings, self.speeds, self.with_flow = settings, speeds, with_flow
        frames = settings["past"] + settings["horizon"]
        names = ("speed_spread", "image_size", "digit_size")
        options = {name: settings[name] for name in names}
        self.training, self.test = (
            MovingDigits(split=split, seed=seed, speeds=speeds, num_frames=frames, device=device, **options)
            for split in ("train", "test")
        )

    def batch(self, s: int, clips: MovingDigits | None = None) -> Batch:
        """Frames [B, T, 1, H, W] of step s, and flow [B, T, 2, H, W] where it is asked for."""
        clips, size = self.training if clips is None else clips, self.settings["batch_size"]
        indices = range(s * size, (s + 1) * size)
        if not self.with_flow:
            return (clips.frames(indices),)
        clip = clips.batch(indices)
        return clip.frames, self.scaled(clip.flow)

    def scaled(self, flow: Tensor) -> Tensor:
        """Flow in pixels per frame in units of the fastest mean speed, which suit the masks' first weights."""
        return flow / max(self.speeds)

    def loss(self, model: Forecaster, tensors: Batch) -> Tensor:
        """Cross-entropy of the future given the past, in nats per sequence."""
        frames, past = tensors[0], self.settings["past"]
        flow = tensors[1][:, :past] if self.with_flow else None
        logits = model(frames[:, :past], self.settings["horizon"], flow=flow)
        return sequence_cross_entropy(logits, frames[:, past:])

    def fit(self, model: Forecaster, progress: Progress) -> dict[str, float]:
        """Trains the model; its losses in the last tenth of the training and on unseen digits, nats per sequence."""
        torch.nn.init.constant_(model.readout.bias, -2)  # most pixels are black
        names = ("steps", "learning_rate", "precision")
        losses = train(model, self.batch, self.loss, progress=progress, **{name: self.settings[name] for name in names})
        last = losses[-max(1, len(losses) // 10) :]
        batches = [self.batch(s, self.test) for s in range(self.settings["test_clips"] // self.settings["batch_size"])]
        return {
            "training_loss": sum(last) / len(last),
            "test_loss": mean_loss(model, batches, self.loss, self.settings["precision"]),
            "backend": str(model.encoder.last_backend),
        }
