"""The paper's experiments on data that anyone has: `mkconvlstm experiment NAME`."""

from . import fig3_speed, fig13_gates, fig14_flow, table1_actions, table2_time, table3_parameters, table7_motion
from .claims import Claim
from .experiment import Experiment, Measured, Progress, Results, Settings
from .runner import run

MODULES = (fig3_speed, fig13_gates, fig14_flow, table1_actions, table2_time, table3_parameters, table7_motion)
EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES}
"""By name. A new experiment is a module with an `EXPERIMENT`, and its entry in `MODULES`."""

__all__ = ["EXPERIMENTS", "Claim", "Experiment", "Measured", "Progress", "Results", "Settings", "run"]
