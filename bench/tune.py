"""Times configurations of the Triton kernels: ``python -m mkconvlstm_cuda.bench.tune radar_35 ...`` on a GPU.

What it prints for the named workloads is what ``triton_kernels.plan.choose`` was written from.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from mkconvlstm_cuda.triton_kernels import launch, plan

from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights

from .timing import stopwatch
from .workloads import WORKLOADS, Workload

WORKERS = 12  # processes that compile
CHOOSE = plan.choose  # while trials put their own in its place


def candidates(problem: plan.Problem, backward: bool, sms: int, shared_memory: int) -> Iterator[plan.Config]:
    """Configurations that fit; the one that ``plan.choose`` has now comes first."""
    yield CHOOSE(problem, backward, sms, shared_memory)
    channels = max(k.channels for k in problem.kernels)
    columns = problem.hidden if backward or problem.mix else 4 * channels
    depth = 4 * channels if backward else problem.hidden
    for block_m, block_n, block_k, split, programs in itertools.product(
        (64, 128), (64, 128, 256), (32, 64, 128), (False, True), (1, 2, 3)
    ):
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        stage = (block_m + block_n) * block_k * problem.element_size
        stages = min(5, (shared_memory // programs - 2048) // stage)
        idle = block_n > max(64, columns) or block_k > depth
        if idle or stages < 2 or block_m * block_n * programs > 128 * 256 * (2 if programs > 1 else 1):
            continue
        for count in {stages, max(2, stages - 2)}:
            yield plan.Config(block_m, block_n, block_k, split, warps, count, programs)


class Trial:
    """One workload's recurrence, forward or backward, with random data."""

    def __init__(self, workload: Workload, backward: bool, dtype: torch.dtype):
        torch.manual_seed(0)
        options = {"device": "cuda", "dtype": dtype}
        batch, self.steps, _, height, width = workload.shape
        hidden, self.backward = workload.hidden_channels, backward
        branches = tuple(
            BranchWeights(torch.randn(4 * n, hidden, k, k, **options) / (k * hidden**0.5))
            for k, n in workload.kernels.items()
        )
        mix = None
        if workload.mix:
            mix = torch.randn(4 * hidden, workload.mix_depth, 1, 1, **options) / workload.mix_depth**0.5
        self.weights = TransitionWeights(branches, mix)

        def states(channels: int, dtype: torch.dtype) -> torch.Tensor:
            t = torch.rand(self.steps, batch, height, width, channels, device="cuda", dtype=torch.float32)
            return t.to(dtype).permute(1, 0, 4, 2, 3)

        self.parts = [states(4 * n, dtype) for n in self.weights.parts]
        self.h = torch.rand(batch, self.steps, hidden, height, width, **options)
        self.c = states(hidden, torch.float32)
        self.problem = launch.problem_of(self.parts, self.weights)

    def run(self) -> None:
        if self.backward:
            launch.backward(self.parts, self.h, self.c, self.weights, None, None, None, "previous", self.h, None, None)
        else:
            launch.forward(self.parts, self.weights, None, None, None, "previous", True, None)

    def microseconds(self, config: plan.Config) -> float:
        """A step's time, the median of several runs; infinity where the configuration cannot run."""
        plan.choose = lambda *_: config
        launch.make_pass.cache_clear()
        try:
            self.run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()  # or a slow host would be what is timed
            with torch.cuda.graph(graph):
                self.run()
        except Exception as error:
            print(f"  {config}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            return float("inf")
        times = sorted(stopwatch(graph.replay, torch.device("cuda")) for _ in range(7))
        return 1e3 * times[3] / self.steps


def compile_share(name: str, backward: bool, dtype: torch.dtype, share: list[plan.Config]) -> None:
    """Fill Triton's cache on disk."""
    trial = Trial(WORKLOADS[name], backward, dtype)
    for config in share:
        trial.microseconds(config)


def tune(name: str, backward: bool, dtype: torch.dtype = torch.bfloat16, most: int = 8) -> None:
    """Print the ``most`` fastest configurations, and what ``plan.choose`` takes now."""
    trial = Trial(WORKLOADS[name], backward, dtype)
    limits = launch.device_limits(torch.device("cuda", torch.cuda.current_device()))
    configs = list(dict.fromkeys(candidates(trial.problem, backward, *limits)))
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(compile_share, name, backward, dtype, configs[n::WORKERS]) for n in range(WORKERS)]:
            done.result()
    times = {config: trial.microseconds(config) for config in configs}
    direction = "backward" if backward else "forward"
    print(f"{name}, {direction}: {len(configs)} configurations; now {times[configs[0]]:.1f} us a step")
    for config in sorted(configs, key=times.get)[:most]:
        print(f"  {times[config]:6.1f} us  {config}")


if __name__ == "__main__":
    for workload in sys.argv[1:]:
        for backward in (False, True):
            tune(workload, backward)
