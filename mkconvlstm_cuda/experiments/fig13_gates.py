"""Fig. 13: how many gate activations are saturated, with and without a 1x1 convolution after the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cell import MKConvLSTMCell
from ..data import patchify
from ..models import Forecaster
from ..reference import cell_step
from . import figures, forecasting
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings

WHERE = "Fig. 13, section IV-C1"
LOW, HIGH = 0.05, 0.95  # a gate below or above is called saturated
GATES = ("input", "forget", "output")
BASELINES, MIX, MIX_TANH = ("3x3", "5x5", "{3,5}"), "{3,5} + 1x1", "{3,5} + tanh + 1x1"


def settings(common: dict, channels: int, speed: float, seeds: int) -> dict:
    half = channels // 2
    pair = {3: half, 5: half}
    variants = {
        "3x3": {"kernels": {3: channels}},
        "5x5": {"kernels": {5: channels}},
        "{3,5}": {"kernels": pair},
        MIX: {"kernels": pair, "mix": "gate"},
        MIX_TANH: {"kernels": pair, "mix": "gate", "mix_activation": "tanh"},
    }
    # All gates start around 1/2: a forget gate that starts open would answer the question of which gate is higher.
    return {**common, "seeds": list(range(seeds)), "speed": speed, "forget_bias": 0.0, "variants": variants}


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    options = settings["variants"][variant]
    torch.manual_seed(seed)
    model = Forecaster(
        1,
        forecasting.kernels_of(options),
        patch_size=settings["patch_size"],
        mix=options.get("mix"),
        mix_activation=options.get("mix_activation"),
        forget_bias=settings["forget_bias"],
    ).to(device)
    task = forecasting.DigitsTask(settings, [settings["speed"]], seed, device)
    numbers = task.fit(model, progress)
    past = task.test.frames(range(settings["batch_size"]))[:, : settings["past"]]
    seen = gates(model.encoder.cells[0], patchify(past, settings["patch_size"]))
    for k, gate in enumerate(GATES):
        values = seen[:, :, k]
        numbers |= {
            f"{gate} saturated": ((values < LOW) | (values > HIGH)).float().mean().item(),
            f"{gate} mean": values.mean().item(),
            f"{gate} spread": values.mean(dim=(0, 1, 3, 4)).std().item(),
        }
    for what in ("saturated", "spread"):
        numbers[what] = float(np.mean([numbers[f"{gate} {what}"] for gate in GATES]))
    return Measured(numbers, {"maps": seen[0, -1]})


@torch.no_grad()
def gates(cell: MKConvLSTMCell, x: Tensor) -> Tensor:
    """Activations of i, f, o and of the cell's tanh, [B, T, 4, F, H, W], of ``x`` [B, T, C, H, W], in float32."""
    c = x.new_zeros(len(x), cell.hidden_channels, *x.shape[3:])
    h, seen = c, []
    for x_t in x.unbind(1):
        z = cell.input_transition(x_t) + cell.hidden_transition(h) + cell.bias[:, None, None]
        z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
        seen.append(torch.stack([z_i.sigmoid(), z_f.sigmoid(), z_o.sigmoid(), z_g.tanh()], dim=1))
        h, c = cell_step(z, c, None, "previous")
    return torch.stack(seen, dim=1)


def judge(settings: Settings, results: Results) -> list[Claim]:
    share = {variant: 100 * results.over_seeds(variant, "saturated") for variant in settings["variants"]}
    claims = [
        Claim.positive(
            "both baselines are oversaturated, taking on only black-and-white values",
            WHERE,
            f"share of saturated activations of {variant}, less one half, percentage points",
            share[variant] - 50,
        )
        for variant in BASELINES
    ]
    claims += [
        Claim.positive(
            "with additional depth, the 1x1 convolution, gate activations do not take on extreme values",
            WHERE,
            f"share of saturated activations, {variant} less {ours}, percentage points",
            share[variant] - share[ours],
        )
        for ours in (MIX, MIX_TANH)
        for variant in BASELINES
    ]
    mean = {gate: results.over_seeds(MIX_TANH, f"{gate} mean") for gate in GATES}
    return [
        *claims,
        Claim.positive(
            "tanh before the 1x1 convolution improved homogeneity within gates",
            WHERE,
            f"standard deviation of a gate's maps' means, {MIX} less {MIX_TANH}",
            results.over_seeds(MIX, "spread") - results.over_seeds(MIX_TANH, "spread"),
        ),
        Claim.positive(
            "input gate activations are generally high", WHERE, f"mean of {MIX_TANH}, less 1/2", mean["input"] - 0.5
        ),
        Claim.positive(
            "forget gate activations have a tendency to be lower",
            WHERE,
            f"mean of the input gate less that of the forget gate, {MIX_TANH}",
            mean["input"] - mean["forget"],
        ),
    ]


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    variants = list(settings["variants"])
    figure, (axes,) = figures.panels(1, width=7)
    width = 0.8 / len(GATES)
    for k, gate in enumerate(GATES):
        found = [interval(100 * results.over_seeds(variant, f"{gate} saturated")) for variant in variants]
        x = np.arange(len(variants)) + (k - 1) * width
        axes.bar(x, [i.mean for i in found], width, yerr=figures.errors(found), capsize=3, label=f"{gate} gate")
    axes.set_xticks(np.arange(len(variants)), variants)
    axes.set(ylabel=f"below {LOW} or above {HIGH}, %", ylim=(0, 100))
    axes.legend()
    paths = [figures.save(figure, folder / "saturation.png")]

    channels = results[variants[0]][0].tensors["maps"].shape[1]
    figure, panels = figures.panels(len(variants), width=2.6, height=0.9 + 2.6 * channels / 16)
    for axes, variant in zip(panels, variants, strict=True):
        maps = results[variant][0].tensors["maps"].numpy().copy()  # [4, F, H, W]
        maps[3] = (maps[3] + 1) / 2  # of (-1, 1)
        figures.show(axes, figures.tile(maps.reshape(-1, *maps.shape[2:]), 8), variant)
    figure.suptitle("rows, from above: input, forget and output gate, cell activation", fontsize=10)
    return [*paths, figures.save(figure, folder / "maps.png")]


METHOD = """
The forecaster of Fig. 3 at one speed, not the paper's classifier of UCF-101. After training, the encoder reads unseen
clips in float32, and an activation of the input, forget or output gate counts as saturated below 0.05 or above 0.95.
All gates' biases start at 0, so that no gate is higher than another before training. The maps show every channel on
the last frame of one clip, for the first seed.
"""

EXPERIMENT = Experiment(
    "fig13-gates",
    "are gates saturated, and less so with a 1x1 convolution?",
    settings(forecasting.FULL, channels=32, speed=4.0, seeds=3),
    settings(forecasting.QUICK, channels=8, speed=3.0, seeds=3),
    measure,
    judge,
    draw,
    METHOD,
)
