"""Fig. 3: how the loss of a forecaster grows with the speed of what it sees, for each kernel size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..models import Forecaster
from . import figures, forecasting
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings

WHERE = "Fig. 3, section III-B1"


def settings(common: dict, channels: int, speeds: list[float], seeds: int) -> dict:
    half = channels // 2
    kernels = {
        "3x3": {3: channels},
        "5x5": {5: channels},
        "7x7": {7: channels},
        "{3,5}": {3: half, 5: half},
        "{5,7}": {5: half, 7: half},
    }
    variants = {name(k, v): {"kernels": kernels[k], "speed": v} for k in kernels for v in speeds}
    return {**common, "seeds": list(range(seeds)), "speeds": speeds, "kernels": list(kernels), "variants": variants}


def name(kernels: str, speed: float) -> str:
    return f"{kernels}, speed {speed:g}"


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    options = settings["variants"][variant]
    torch.manual_seed(seed)
    model = Forecaster(1, forecasting.kernels_of(options), patch_size=settings["patch_size"]).to(device)
    task = forecasting.DigitsTask(settings, [options["speed"]], seed, device)
    return Measured(task.fit(model, progress))


def losses(settings: Settings, results: Results, kernels: str) -> np.ndarray:
    """[speeds, seeds], nats per sequence."""
    return np.array([results.over_seeds(name(kernels, v), "test_loss") for v in settings["speeds"]])


def growth(settings: Settings, results: Results, kernels: str) -> np.ndarray:
    """Slope of the loss over the speed by least squares, one a seed; nats per sequence and pixel per frame."""
    return np.polyfit(settings["speeds"], losses(settings, results, kernels), 1)[0]


def judge(settings: Settings, results: Results) -> list[Claim]:
    slopes = {k: growth(settings, results, k) for k in settings["kernels"]}
    loss = {k: losses(settings, results, k) for k in settings["kernels"]}
    unit = "nats per sequence"
    claims = [
        Claim.positive(
            "the loss for smaller kernel sizes grew significantly faster than for larger kernel sizes",
            WHERE,
            f"growth of the loss with the speed, {small} less {large}, {unit} for each pixel per frame",
            slopes[small] - slopes[large],
        )
        for small, large in (("3x3", "7x7"), ("3x3", "5x5"), ("5x5", "7x7"))
    ]
    slowest, fastest = settings["speeds"][0], settings["speeds"][-1]
    claims += [
        Claim.positive(
            "there is a correlation between moving speed and optimal kernel size: small kernels for slow digits",
            WHERE,
            f"loss of 7x7 less that of 3x3 at speed {slowest:g}, {unit}",
            loss["7x7"][0] - loss["3x3"][0],
        ),
        Claim.positive(
            "there is a correlation between moving speed and optimal kernel size: large kernels for fast digits",
            WHERE,
            f"loss of 3x3 less that of 7x7 at speed {fastest:g}, {unit}",
            loss["3x3"][-1] - loss["7x7"][-1],
        ),
    ]
    for pair in ("{3,5}", "{5,7}"):
        for single in (f"{size}x{size}" for size in pair.strip("{}").split(",")):
            claims.append(
                Claim.positive(
                    f"one kernel size alone is not optimal: {pair} beats {single} with as many channels",
                    "section III-B",
                    f"loss of {single} less that of {pair}, mean over the speeds, {unit}",
                    (loss[single] - loss[pair]).mean(axis=0),
                )
            )
    return claims


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, (absolute, relative) = figures.panels(2)
    base = losses(settings, results, "3x3")
    for kernels in settings["kernels"]:
        loss = losses(settings, results, kernels)
        figures.curve(absolute, settings["speeds"], [interval(row) for row in loss], label=kernels)
        figures.curve(relative, settings["speeds"], [interval(row) for row in loss - base], label=kernels)
    absolute.set(xlabel="mean speed, pixels per frame", ylabel="test loss, nats per sequence")
    relative.set(xlabel="mean speed, pixels per frame", ylabel="less that of 3x3 with the same seed")
    absolute.legend()
    return [figures.save(figure, folder / "speed.png")]


METHOD = """
Single digits move at a mean speed, each clip's own speed lying within 50% of it, and are reflected at the borders. A
forecaster reads 10 frames and predicts 10 (5 and 5 with `--quick`): one layer each in encoder and decoder, frames in
4x4 patches as in Shi et al., so that a 3x3 kernel carries information 4 pixels a frame. All kernel configurations
have the same number of hidden channels. The paper gives neither its channels nor its training time here; ours is
short, and losses are far above the 1313 nats that a perfect forecast of grey pixels would cost at full size.
"""

EXPERIMENT = Experiment(
    "fig3-speed",
    "does the loss of small kernels grow faster with the speed of a digit?",
    settings(forecasting.FULL, channels=32, speeds=[1.0, 2.0, 4.0, 6.0, 8.0], seeds=3),
    settings(forecasting.QUICK, channels=8, speeds=[1.0, 3.0, 6.0], seeds=3),
    measure,
    judge,
    draw,
    METHOD,
)
