"""The paper's experiments on data that anyone has: `mkconvlstm experiment NAME`."""

from . import table3_parameters
from .claims import Claim
from .experiment import Experiment, Measured, Progress, Results, Settings
from .runner import run

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (table3_parameters.EXPERIMENT,)}
"""By name. A new experiment is a module with an `EXPERIMENT`, and its entry here."""

__all__ = ["EXPERIMENTS", "Claim", "Experiment", "Measured", "Progress", "Results", "Settings", "run"]
