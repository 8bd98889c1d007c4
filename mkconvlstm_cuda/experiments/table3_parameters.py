"""Table III: what the layer's configurations cost in parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from ..layer import MKConvLSTM
from . import figures
from .claims import Claim
from .experiment import Experiment, Measured, Progress, Results, Settings

# The paper's weights in millions; its rounding is taken to be by at most 0.1, since it prints 9.18 as 9.1.
VGG16_PARAMETERS = 138_357_544  # Simonyan & Zisserman's configuration D
VARIANTS = {
    "3x3": {"kernels": {"3": 256}, "mix": None, "paper": 4.7},
    "5x5": {"kernels": {"5": 256}, "mix": None, "paper": 13.1},
    "7x7": {"kernels": {"7": 256}, "mix": None, "paper": 25.7},
    "{3,5}": {"kernels": {"3": 128, "5": 128}, "mix": None, "paper": 8.9},
    "{3,5} + 1x1": {"kernels": {"3": 128, "5": 128}, "mix": "gate", "paper": 9.1},
}
SETTINGS = {"seeds": [0], "in_channels": 512, "variants": VARIANTS}


def measure(settings: Settings, variant: str, seed: int, device: torch.device, progress: Progress) -> Measured:
    """Counts; nothing is allocated, and no seed plays a part."""
    options = settings["variants"][variant]
    kernels = {int(size): channels for size, channels in options["kernels"].items()}
    layer = MKConvLSTM(settings["in_channels"], kernels, mix=options["mix"], device="meta")
    cell = layer.cells[0]
    count = {
        half: sum(p.numel() for p in transition.parameters())
        for half, transition in (("input", cell.input_transition), ("hidden", cell.hidden_transition))
    }
    return Measured({"input_weights": count["input"], "hidden_weights": count["hidden"], "biases": cell.bias.numel()})


def judge(settings: Settings, results: Results) -> list[Claim]:
    claims = []
    for variant, options in settings["variants"].items():
        millions = results.over_seeds(variant, "input_weights") / 1e6
        claims.append(
            Claim.within(
                f"{variant}, 256 channels on 512: {options['paper']} M weights",
                "Table III",
                "weights of the input-to-hidden transition, millions",
                millions,
                round(options["paper"] - 0.1, 3),
                round(options["paper"] + 0.1, 3),
            )
        )
    first, largest = (list(settings["variants"])[k] for k in (0, 2))
    whole = sum(results.over_seeds(first, f"{half}_weights") for half in ("input", "hidden")) / 1e6
    biases = [count for name in settings["variants"] for count in results.over_seeds(name, "biases")]
    share = 100 * results.over_seeds(largest, "input_weights") / VGG16_PARAMETERS
    claims += [
        Claim.within(
            "these are the parameters that a ConvLSTM layer requires",
            "Table III, section IV-B1",
            f"weights of the whole layer {first}, hidden-to-hidden included, millions",
            whole,
            4.6,
            4.8,
        ),
        Claim.within("1024 biases in every configuration", "Table III", "biases", biases, 1024, 1024),
        Claim.within(
            "those of a 7x7 ConvLSTM make up approximately 18% of VGG-16's",
            "section IV-B1",
            "weights of the 7x7 input-to-hidden transition over VGG-16's parameters, %",
            share,
            17,
            19,
        ),
    ]
    return claims


def draw(settings: Settings, results: Results, folder: Path) -> list[Path]:
    figure, (axes,) = figures.panels(1, width=6, height=3)
    names = list(settings["variants"])
    of_input, of_hidden = (
        [results.over_seeds(name, f"{half}_weights").mean() / 1e6 for name in names] for half in ("input", "hidden")
    )
    axes.barh(names, of_input, color="tab:blue", label="input-to-hidden: what Table III counts")
    axes.barh(names, of_hidden, left=of_input, color="tab:gray", label="hidden-to-hidden")
    axes.plot([settings["variants"][name]["paper"] for name in names], names, "kx", label="the paper")
    axes.set(xlabel="weights, millions")
    axes.invert_yaxis()
    axes.legend()
    return [figures.save(figure, folder / "parameters.png")]


METHOD = """
Counted. The paper prints rounded numbers, taken here to be right within 0.1 M. They are those of the input-to-hidden
transition; a layer has a hidden-to-hidden transition too, half as large here.
"""

EXPERIMENT = Experiment(
    "table3-parameters",
    "how many parameters each configuration has",
    SETTINGS,
    SETTINGS,
    measure,
    judge,
    draw,
    METHOD,
)
