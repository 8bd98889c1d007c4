"""Section IV-A's question on generated actions: which kernels tell motions apart best, by a classifier as in Fig. 6."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..actions import Actions, MovingActions
from ..classifier import VideoClassifier, accuracies, frame_cross_entropy
from . import figures
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings
from .forecasting import kernels_of
from .training import autocast, train


def settings(channels: int, **common) -> dict:
    half = channels // 2
    variants = {
        "3x3": {"kernels": {3: channels}, "mix": None},
        "5x5": {"kernels": {5: channels}, "mix": None},
        "{3,5}": {"kernels": {3: half, 5: half}, "mix": None},
        "{3,5} + 1x1": {"kernels": {3: half, 5: half}, "mix": "gate"},
    }
    return {**common, "variants": variants}


FULL = settings(
    16,
    seeds=[0, 1, 2, 3, 4],
    steps=600,
    batch_size=64,
    test_clips=960,
    learning_rate=3e-3,
    precision="bfloat16",
    directions=16,
    speeds=[2.0, 4.0, 6.0, 8.0, 10.0, 12.0],
    num_frames=6,
    image_size=64,
    digit_size=8,
    patch_size=4,
)
"""Sizes in pixels, speeds in pixels per frame. The encoder cuts frames into patches, as section IV-C2 does: it sees no
further than its cell, and what a digit's motion takes to be seen is left to the layer's kernels. Fast digits, of two
cells each, have left their place by the next frame. So many classes that no kernel tells them all apart."""

QUICK = settings(
    8,
    **{name: value for name, value in FULL.items() if name != "variants"}
    | {"seeds": [0, 1, 2], "steps": 30, "batch_size": 8, "test_clips": 48, "precision": "float32"}
    | {"directions": 4, "speeds": [2.0, 7.0], "num_frames": 5, "image_size": 32},
)


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    """Two variants with the same seed see the same clips, so that they can be compared pair by pair."""
    names = ("directions", "speeds", "num_frames", "image_size", "digit_size")
    options = {name: settings[name] for name in names}
    training, test = (MovingActions(split=split, seed=seed, device=device, **options) for split in ("train", "test"))
    if settings["test_clips"] < test.num_classes:
        raise ValueError(f"test_clips: got {settings['test_clips']}, wanted one of each of {test.num_classes} classes")
    torch.manual_seed(seed)
    model = VideoClassifier(
        settings["patch_size"] ** 2,
        training.num_classes,
        kernels_of(settings["variants"][variant]),
        encoder=torch.nn.PixelUnshuffle(settings["patch_size"]),
        mix=settings["variants"][variant]["mix"],
        pool="max",
        lstm_features=64,
    ).to(device)
    size = settings["batch_size"]

    def loss(model: VideoClassifier, batch: Actions) -> Tensor:
        return frame_cross_entropy(model(batch[0]), batch[1]).mean()

    options = {name: settings[name] for name in ("steps", "learning_rate", "precision")}
    losses = train(model, lambda s: training.batch(range(s * size, (s + 1) * size)), loss, progress=progress, **options)
    last = losses[-max(1, len(losses) // 10) :]
    return Measured({"training_loss": sum(last) / len(last), **judged(model, test, settings)})


@torch.no_grad()
def judged(model: VideoClassifier, test: MovingActions, settings: Settings) -> dict[str, float | list[float] | str]:
    """On unseen digits: loss (nats), top-1 accuracies in percent, over frames also for every speed."""
    model.eval()
    sums = []
    for first in range(0, settings["test_clips"], settings["batch_size"]):
        batch = test.batch(range(first, min(first + settings["batch_size"], settings["test_clips"])))
        with autocast(batch.frames.device, settings["precision"]):
            logits = model(batch.frames)
        sums.append(torch.stack([frame_cross_entropy(logits, batch.labels), *accuracies(logits, batch.labels)]))
    loss, by_frame, by_clip = torch.cat(sums, dim=1).double().cpu()
    speed = torch.arange(len(loss)) % test.num_classes % len(test.speeds)
    return {
        "test_loss": loss.mean().item(),
        "frame_accuracy": 100 * by_frame.mean().item(),
        "clip_accuracy": 100 * by_clip.mean().item(),
        **{f"frame_accuracy, speed {v:g}": 100 * by_frame[speed == s].mean().item() for s, v in enumerate(test.speeds)},
        "backend": str(model.layer.last_backend),
    }


def judge(settings: Settings, results: Results) -> list[Claim]:
    accuracy = {variant: results.over_seeds(variant, "frame_accuracy") for variant in settings["variants"]}

    def better(words: str, where: str, more: str, less: str) -> Claim:
        what = f"top-1 accuracy over frames, {more} less {less}, percentage points"
        return Claim.positive(words, where, what, accuracy[more] - accuracy[less])

    words = "our multi-kernel configuration clearly outperforms both baseline variants"
    slow, fast = (
        results.over_seeds("5x5", f"frame_accuracy, speed {v:g}")
        - results.over_seeds("3x3", f"frame_accuracy, speed {v:g}")
        for v in (settings["speeds"][0], settings["speeds"][-1])
    )
    return [
        better(words, "Table I", "{3,5}", "3x3"),
        better(words, "Table I", "{3,5}", "5x5"),
        better("the larger 5x5 baseline performed better than the 3x3 baseline", "section IV-A3", "5x5", "3x3"),
        better("stacked 1x1 convolutions improve the simple multi-kernel", "Table I", "{3,5} + 1x1", "{3,5}"),
        Claim.positive(
            "a small kernel is unable to link a fast-moving object",
            "section III-B",
            f"lead of 5x5 over 3x3 at {settings['speeds'][-1]:g} pixels per frame less that at "
            f"{settings['speeds'][0]:g}, percentage points",
            fast - slow,
        ),
    ]


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, (over_speed, over_seeds) = figures.panels(2)
    for variant in settings["variants"]:
        found = [results.over_seeds(variant, f"frame_accuracy, speed {v:g}") for v in settings["speeds"]]
        figures.curve(over_speed, settings["speeds"], [interval(values) for values in found], label=variant)
    whole = [interval(results.over_seeds(variant, "frame_accuracy")) for variant in settings["variants"]]
    means = [found.mean for found in whole]
    over_seeds.errorbar(means, list(settings["variants"]), xerr=figures.errors(whole), fmt="o", capsize=3)
    over_speed.set(xlabel="speed, pixels per frame", ylabel="top-1 accuracy over frames, %")
    over_seeds.set(xlabel="top-1 accuracy over frames, %")
    over_speed.legend()
    return [figures.save(figure, folder / "actions.png")]


EXPERIMENT = Experiment(
    "table1-actions",
    "do several kernel sizes tell motions apart better than one?",
    FULL,
    QUICK,
    measure,
    judge,
    draw,
)
