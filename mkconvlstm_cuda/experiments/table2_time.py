"""Table II: the time of the layer in training and in testing, for each configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..layer import MKConvLSTM
from . import figures
from .claims import Claim, interval
from .experiment import Experiment, Measured, Progress, Results, Settings

WHERE = "Table II, section IV-B1"
MODES = ("training", "testing")
CONFIGURATIONS = {  # with the paper's seconds
    "3x3": {"shares": {3: 1}, "mix": None, "training": 3.424, "testing": 2.821},
    "5x5": {"shares": {5: 1}, "mix": None, "training": 4.430, "testing": 3.290},
    "{3,5}": {"shares": {3: 2, 5: 2}, "mix": None, "training": 4.007, "testing": 3.008},
    "{3,5} + 1x1": {"shares": {3: 2, 5: 2}, "mix": "gate", "training": 4.176, "testing": 3.072},
}
FULL = {
    "seeds": [0, 1, 2, 3, 4],
    "variants": {
        "this layer, bfloat16": {"dtype": "bfloat16", "layer": "own"},
        "this layer, float32": {"dtype": "float32", "layer": "own"},
        "usual loop, float32": {"dtype": "float32", "layer": "loop"},
    },
    "configurations": CONFIGURATIONS,
    "batch_size": 10,
    "steps": 20,
    "in_channels": 512,
    "channels": 256,
    "image_size": 14,
    "iterations": 20,
}
QUICK = {
    **FULL,
    "seeds": [0, 1, 2],
    "variants": {name: v for name, v in FULL["variants"].items() if v["dtype"] == "float32"},
    "batch_size": 1,
    "steps": 5,
    "in_channels": 32,
    "channels": 32,
    "iterations": 3,
}


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    """Median milliseconds of every configuration, all of them by turns; on a GPU in CUDA graphs."""
    from ..bench.contestants import Contestant, Graphed
    from ..bench.peers import UsualLoop
    from ..bench.timing import take_turns

    options = settings["variants"][variant]
    dtype = getattr(torch, options["dtype"])
    size = (settings["batch_size"], settings["steps"], settings["in_channels"], *2 * (settings["image_size"],))
    torch.manual_seed(seed)
    x = torch.randn(size, device=device, dtype=dtype)
    dy = torch.randn(*size[:2], settings["channels"], *size[3:], device=device, dtype=dtype)
    race, numbers = {}, {}
    for name, configuration in settings["configurations"].items():
        kernels = {int(k): settings["channels"] // share for k, share in configuration["shares"].items()}
        layer = MKConvLSTM(settings["in_channels"], kernels, mix=configuration["mix"])
        layer = (UsualLoop(layer) if options["layer"] == "loop" else layer).to(device, dtype)
        contestant = (Graphed if device.type == "cuda" else Contestant)(layer, x, dy, options["layer"] == "loop")
        race[f"{name}, training"], race[f"{name}, testing"] = contestant.train, contestant.forward
    progress(0.3)
    rounds = settings["iterations"]
    for name, timing in take_turns(race, device, 0, min_rounds=rounds, max_rounds=rounds).items():
        numbers[name] = timing.median
    return Measured(numbers)


def judge(settings: Settings, results: Results) -> list[Claim]:
    claims = []
    for variant in settings["variants"]:
        for mode in MODES:
            small, large, both, mixed = (
                results.over_seeds(variant, f"{name}, {mode}") for name in settings["configurations"]
            )
            claims += [
                Claim.positive(
                    f"{mode}: the time of two kernel sizes is between those of the two single kernels",
                    WHERE,
                    f"distance of {{3,5}} to the nearer of 3x3 and 5x5, negative outside, ms; {variant}",
                    np.minimum(both - small, large - both),
                ),
                Claim.within(
                    f"{mode}: the overhead of the stacked 1x1 is in the order of 1%",
                    WHERE,
                    f"{{3,5}} + 1x1 over {{3,5}}, less 1, % (the paper's own times: 4.2 and 2.1); {variant}",
                    100 * (mixed / both - 1),
                    0,
                    5,
                ),
            ]
    return claims


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, panels = figures.panels(len(MODES))
    names = list(settings["configurations"])
    rows, width = np.arange(len(names)), 0.8 / (1 + len(settings["variants"]))
    for axes, mode in zip(panels, MODES, strict=True):
        paper = [1e3 * settings["configurations"][name][mode] for name in names]
        axes.bar(rows, paper, width, color="lightgray", label="the paper")
        for k, variant in enumerate(settings["variants"], start=1):
            found = [interval(results.over_seeds(variant, f"{name}, {mode}")) for name in names]
            bars = axes.bar(rows + k * width, [i.mean for i in found], width, label=variant)
            axes.bar_label(bars, [f"{i.mean:.3g}" for i in found], fontsize=7)
        axes.set_xticks(rows + 0.4 - width / 2, names)
        axes.set(title=mode, ylabel="ms for one iteration", yscale="log")
    panels[0].legend(fontsize=8)
    return [figures.save(figure, folder / "time.png")]


METHOD = """
Table II's layer on one device: 512 channels in, 256 hidden, batch 10, T = 20, 14x14 (`results.json` has the sizes
that ran). All configurations by turns; medians, a seed being one round of initialisation and measurement. On a GPU in
CUDA graphs. "This layer" is the backend that `auto` takes; the "usual loop" is a Python loop over cuDNN's (or
oneDNN's) convolutions, which is nearer to what the paper timed.
"""

EXPERIMENT = Experiment(
    "table2-time", "what does a layer with two kernel sizes cost in time?", FULL, QUICK, measure, judge, draw, METHOD
)
