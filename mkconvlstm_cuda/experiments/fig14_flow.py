"""Fig. 14: which of two digits, a slow and a fast one, the flow masks of a small and of a large kernel let through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention import FlowAttention
from ..data import patchify
from ..models import Forecaster
from . import figures, forecasting
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings

WHERE = "Fig. 14, section IV-C3"
DIGITS = ("slow", "fast")
VARIANT = "{5,7} with masks"


def settings(common: dict, channels: int, speeds: list[float], seeds: int) -> dict:
    variants = {VARIANT: {"kernels": {5: channels // 2, 7: channels // 2}}}
    return {**common, "seeds": list(range(seeds)), "speeds": speeds, "mask_clips": 128, "variants": variants}


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    """Trains with masks on both kernels' input, then averages them over the pixels of either digit."""
    patch, past = settings["patch_size"], settings["past"]
    kernels = forecasting.kernels_of(settings["variants"][variant])
    torch.manual_seed(seed)
    attention = FlowAttention(flow_channels=2 * patch**2)
    model = Forecaster(1, kernels, patch_size=patch, attention=attention).to(device)
    task = forecasting.DigitsTask(settings, settings["speeds"], seed, device, with_flow=True)
    numbers = task.fit(model, progress)

    clip = task.test.batch(range(settings["mask_clips"]))
    flow = patchify(task.scaled(clip.flow[:, :past]), patch).flatten(0, 1)  # [N, 2 * p * p, H / p, W / p]
    owner = patchify(clip.owner[:, :past].unsqueeze(2), patch).flatten(0, 1)  # [N, p * p, H / p, W / p]
    shown = farthest_apart(clip.owner[:, past - 1])
    tensors = {"frame": clip.frames[shown, past - 1, 0]}
    with torch.no_grad():
        masks = model.encoder.cells[0].attention(flow)
    for size, mask in zip(kernels, masks, strict=True):
        by_channel = {}
        for d, digit in enumerate(DIGITS):
            on_digit = owner == d
            numbers[f"{size} on {digit}"] = mask[on_digit].mean().item()
            by_channel[digit] = (mask * on_digit).sum(dim=(0, 2, 3)) / on_digit.sum(dim=(0, 2, 3))
        numbers[f"{size} channels for slow"] = (by_channel["slow"] > by_channel["fast"]).float().mean().item()
        tensors[f"{size}"] = mask[shown * past + past - 1]
    return Measured(numbers, tensors)


def farthest_apart(owner: Tensor) -> int:
    """The clip of `owner` [B, H, W] in which the middles of the two digits are farthest from each other."""
    rows = torch.arange(owner.shape[1], device=owner.device)[:, None].expand_as(owner)
    columns = torch.arange(owner.shape[2], device=owner.device).expand_as(owner)
    middles = []
    for d in range(len(DIGITS)):
        size = (owner == d).sum(dim=(1, 2)).clamp(min=1)
        middles.append(torch.stack([((owner == d) * at).sum(dim=(1, 2)) / size for at in (rows, columns)]))
    return (middles[0] - middles[1]).norm(dim=0).argmax().item()


def judge(settings: Settings, results: Results) -> list[Claim]:
    def on(size: int, digit: str) -> np.ndarray:
        return results.over_seeds(VARIANT, f"{size} on {digit}")

    small, large = 5, 7
    preference = {size: on(size, "fast") - on(size, "slow") for size in (small, large)}
    channels = {size: results.over_seeds(VARIANT, f"{size} channels for slow") for size in (small, large)}
    return [
        Claim.positive(
            "the mask of 5x5 prefers to admit the slow moving digit",
            WHERE,
            "mean of the mask on the slow digit less that on the fast one, 5x5",
            -preference[small],
        ),
        Claim.positive(
            "the mask of 7x7 prefers to admit the fast moving digit",
            WHERE,
            "mean of the mask on the fast digit less that on the slow one, 7x7",
            preference[large],
        ),
        Claim.positive(
            "the larger kernel tends to associate with faster objects",
            WHERE,
            "preference for the fast digit (mean of the mask on it less that on the slow one), 7x7 less 5x5",
            preference[large] - preference[small],
        ),
        Claim.positive(
            "the slow digit is a white blob in 10 of 16 channels of the mask of 5x5",
            WHERE,
            "share of the channels of 5x5 that are higher on the slow digit, less one half",
            channels[small] - 0.5,
        ),
        Claim.positive(
            "the fast digit is a white blob in 11 of 16 channels of the mask of 7x7",
            WHERE,
            "share of the channels of 7x7 that are higher on the fast digit, less one half",
            0.5 - channels[large],
        ),
    ]


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, (frame, *maps, bars) = figures.panels(4, width=3.4)
    shown = results[VARIANT][0].tensors
    figures.show(frame, shown["frame"].numpy(), "last frame")
    for axes, size in zip(maps, (5, 7), strict=True):
        figures.show(axes, figures.tile(shown[str(size)].numpy(), 4), f"{size}x{size}: masks, black 0, white 1")
    for k, digit in enumerate(DIGITS):
        found = [interval(results.over_seeds(VARIANT, f"{size} on {digit}")) for size in (5, 7)]
        x = np.arange(2) + 0.4 * k
        bars.bar(x, [i.mean for i in found], 0.4, yerr=figures.errors(found), capsize=3, label=f"on the {digit} digit")
    bars.set_xticks([0.2, 1.2], ["5x5", "7x7"])
    bars.set(ylabel="mean of the mask", ylim=(0, 1))
    bars.legend(fontsize=8)
    return [figures.save(figure, folder / "masks.png")]


METHOD = """
Two digits, one slow and one fast; kernels 5x5 and 7x7, both with masks of as many channels as a patch has pixels
(16), each made by one 3x3 convolution from the flow in the same patches. The flow is the digits' own, exact, in units
of the faster mean speed. Means are over all pixels of a digit in all past frames of unseen clips, where the paper
shows the last frame of one clip.
"""

EXPERIMENT = Experiment(
    "fig14-flow",
    "does the mask of the larger kernel let the faster digit through?",
    settings(forecasting.FULL, channels=32, speeds=[1.0, 8.0], seeds=8),
    settings(forecasting.QUICK, channels=8, speeds=[1.0, 6.0], seeds=3),
    measure,
    judge,
    draw,
    METHOD,
)
