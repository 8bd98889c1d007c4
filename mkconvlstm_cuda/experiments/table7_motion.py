"""Table VII: does the kernel size matter less for limbs that move in place than for figures that travel?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data import unpatchify
from ..layer import MKConvLSTM
from ..models import sequence_cross_entropy
from . import figures, stick_figures
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings
from .forecasting import kernels_of
from .training import Batch, mean_loss, train

WHERE = "Table VII, section IV-B2"
KERNELS, MOTIONS, SPEEDS = (3, 5, 7), ("local", "global"), {"normal": 1, "fast": 3}
POOL = 2
PAPER = {"normal": (1288, 1295, 1331), "fast": (1521, 1521, 1553)}  # nats per sequence, local motion


def settings(channels: int, features: int, steps: int, batch_size: int, test_clips: int, precision: str) -> dict:
    variants = {
        name(size, motion, speed): {"kernels": {size: channels}, "motion": motion, "speed": SPEEDS[speed]}
        for motion in MOTIONS
        for speed in SPEEDS
        for size in KERNELS
    }
    return {
        "seeds": [0, 1, 2],
        "variants": variants,
        "features": features,
        "steps": steps,
        "batch_size": batch_size,
        "test_clips": test_clips,
        "learning_rate": 2e-3,
        "precision": precision,
        "past": 10,
        "horizon": 10,
        "image_size": 56,
        "travel": 2.0,
    }


def name(size: int, motion: str, speed: str) -> str:
    return f"{size}x{size}, {motion}, {speed}"


class FigureForecaster(nn.Module):
    """Encoder-decoder behind max-pooling and a two-layer ConvNet, as section IV-B2 has it.

    Frames [B, T, 1, H, W] are halved, seen by two 3x3 convolutions of `features` channels, and read by an MKConvLSTM;
    a second one continues from its state, and a 1x1 convolution gives the logits of each 2x2 patch of a frame.
    """

    def __init__(self, kernels: Mapping[int, int], features: int):
        super().__init__()
        self.front = nn.Sequential(
            nn.MaxPool2d(POOL),
            *(nn.Conv2d(1, features, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(features, features, 3, padding=1), nn.ReLU()),
        )
        self.encoder, self.decoder = MKConvLSTM(features, kernels), MKConvLSTM(1, kernels)
        self.readout = nn.Conv2d(self.encoder.hidden_channels, POOL**2, 1)
        nn.init.constant_(self.readout.bias, -2)  # most pixels are black

    def forward(self, past: Tensor, horizon: int) -> Tensor:
        """Logits [B, horizon, 1, H, W] of the frames after `past` [B, T, 1, H, W]."""
        features = self.front(past.flatten(0, 1)).unflatten(0, past.shape[:2])
        _, state = self.encoder(features)
        hidden, _ = self.decoder(features.new_zeros(len(past), horizon, 1, *features.shape[3:]), state)
        return unpatchify(self.readout(hidden.flatten(0, 1)), POOL).unflatten(0, hidden.shape[:2])


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    options = settings["variants"][variant]
    frames, size = settings["past"] + settings["horizon"], settings["batch_size"]
    travel = settings["travel"] if options["motion"] == "global" else 0.0

    def batch(s: int, split: int = 0) -> Batch:
        shape = {"speed": options["speed"], "travel": travel, "image_size": settings["image_size"]}
        return (stick_figures.clips((seed, split, s), size, frames, device=device, **shape),)

    def loss(model: FigureForecaster, tensors: Batch) -> Tensor:
        past, future = tensors[0].split([settings["past"], settings["horizon"]], dim=1)
        return sequence_cross_entropy(model(past, settings["horizon"]), future)

    torch.manual_seed(seed)
    model = FigureForecaster(kernels_of(options), settings["features"]).to(device)
    names = ("steps", "learning_rate", "precision")
    losses = train(model, batch, loss, progress=progress, **{key: settings[key] for key in names})
    unseen = [batch(s, split=1) for s in range(settings["test_clips"] // size)]
    last = losses[-max(1, len(losses) // 10) :]
    numbers = {
        "training_loss": sum(last) / len(last),
        "test_loss": mean_loss(model, unseen, loss, settings["precision"]),
        "backend": str(model.encoder.last_backend),
    }
    past = unseen[0][0][:1, : settings["past"]]
    with torch.no_grad():
        predicted = model(past, settings["horizon"]).sigmoid()
    return Measured(numbers, {"truth": unseen[0][0][0, :, 0], "predicted": predicted[0, :, 0]})


def losses(results: Results, motion: str, speed: str) -> np.ndarray:
    """[kernel sizes, seeds], nats per sequence."""
    return np.array([results.over_seeds(name(size, motion, speed), "test_loss") for size in KERNELS])


def effect(results: Results, motion: str) -> np.ndarray:
    """How much the kernel size matters, one a seed: range of the loss over sizes in % of its mean, over both speeds."""
    by_speed = [losses(results, motion, speed) for speed in SPEEDS]
    return 100 * np.mean([np.ptp(loss, axis=0) / loss.mean(axis=0) for loss in by_speed], axis=0)


def judge(settings: Settings, results: Results) -> list[Claim]:
    claims = []
    for speed in SPEEDS:
        loss = losses(results, "local", speed)
        for k in (1, 2):
            size = KERNELS[k]
            claims.append(
                Claim.positive(
                    "local motion: small kernels provide slightly better performance",
                    WHERE,
                    f"{speed} speed: loss of {size}x{size} less that of 3x3, nats per sequence "
                    f"(the paper: {PAPER[speed][k] - PAPER[speed][0]})",
                    loss[k] - loss[0],
                )
            )
    growth = {}
    for motion in MOTIONS:
        normal, fast = (losses(results, motion, speed) for speed in SPEEDS)
        growth[motion] = (fast[0] - fast[-1]) - (normal[0] - normal[-1])
    return [
        *claims,
        Claim.positive(
            "the impact of the kernel size is smaller than for global motion",
            WHERE,
            "range of the loss over the kernel sizes in % of the loss, mean over the speeds, global less local",
            effect(results, "global") - effect(results, "local"),
        ),
        Claim.positive(
            "global motion: the loss of small kernels grows faster with the speed",
            "Fig. 3, here with figures",
            "loss of 3x3 less that of 7x7, fast less normal, nats per sequence",
            growth["global"],
        ),
        Claim.positive(
            "local motion: with the speed, small kernels lose less than in global motion",
            WHERE,
            "loss of 3x3 less that of 7x7, fast less normal, global less local, nats per sequence",
            growth["global"] - growth["local"],
        ),
    ]


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, panels = figures.panels(len(MOTIONS))
    for axes, motion in zip(panels, MOTIONS, strict=True):
        for speed in SPEEDS:
            loss = losses(results, motion, speed)
            figures.curve(axes, KERNELS, [interval(row) for row in loss - loss[0]], label=f"{speed} speed")
            if motion == "local":
                paper = [nats - PAPER[speed][0] for nats in PAPER[speed]]
                axes.plot(KERNELS, paper, "x--", label=f"{speed} speed, the paper's data")
        axes.set(title=f"{motion} motion", ylabel="test loss less that of 3x3, nats per sequence")
        axes.set_xticks(KERNELS, [f"{size}x{size}" for size in KERNELS])
        axes.legend(fontsize=8)
    paths = [figures.save(figure, folder / "motion.png")]

    figure, (axes,) = figures.panels(1, width=10, height=4.4)
    rows, past = [], settings["past"]
    for motion in MOTIONS:
        shown = results[name(KERNELS[0], motion, "normal")][0].tensors
        rows += [shown["truth"][past:], shown["predicted"]]
    every = slice(0, None, 2)
    page = figures.tile(np.concatenate([row[every].numpy() for row in rows]), len(rows[0][every]))
    figures.show(axes, page, "3x3, normal speed; from above: truth and prediction of local, then of global motion")
    return [*paths, figures.save(figure, folder / "figures.png")]


METHOD = """
In place of JHMDB's poses: stick figures with the same 15 joints, whose limbs swing like pendulums about the belly,
which stays in the middle (local motion) or travels at 2 pixels a frame (global motion, limbs swinging all the same).
56x56 pixels, max-pooled, seen by a two-layer ConvNet, read by a layer with F = 256 (8 with `--quick`) on 28x28; fast
means every third frame. Generated figures have neither the noise nor the variety of people: their losses are not
comparable with the paper's, signs and shares are.
"""

EXPERIMENT = Experiment(
    "table7-motion",
    "does the kernel size matter less for limbs moving in place than for figures that travel?",
    settings(channels=256, features=64, steps=120, batch_size=8, test_clips=128, precision="bfloat16"),
    settings(channels=8, features=8, steps=15, batch_size=2, test_clips=4, precision="float32"),
    measure,
    judge,
    draw,
    METHOD,
)
