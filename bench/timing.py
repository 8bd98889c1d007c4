"""Timing by turns: every contestant runs once a round, so that clocks, heat and neighbours hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.runs) < 2:
            return self.runs[0], self.runs[0]
        first, _, third = statistics.quantiles(self.runs, n=4, method="inclusive")
        return first, third


def stopwatch(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run: CUDA events on a GPU, the wall clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def take_turns(
    contestants: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Run all contestants in turn, after one warm-up round, for about ``seconds`` in all.

    Each round starts with another contestant, so that none always follows the same one.
    """
    names = list(contestants)
    for name in names:
        stopwatch(contestants[name], device)
    runs: dict[str, list[float]] = {name: [] for name in names}
    stop = time.perf_counter() + seconds
    for r in range(max_rounds):
        if r >= min_rounds and time.perf_counter() > stop:
            break
        for name in names[r % len(names) :] + names[: r % len(names)]:
            runs[name].append(stopwatch(contestants[name], device))
    return {name: Timing(tuple(times)) for name, times in runs.items()}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s to judge layers by: the better of a large matrix product and a large convolution, on random data."""
    gpu = device.type == "cuda"
    n, images, channels, size = (8192, 64, 512, 32) if gpu else (2048, 8, 256, 32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(images, channels, size, size, device=device, dtype=dtype)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    runs = {"product": lambda: a @ b, "convolution": lambda: torch.nn.functional.conv2d(x, w, padding=1)}
    flops = {"product": 2 * n**3, "convolution": 2 * images * size**2 * 9 * channels**2}
    with torch.no_grad():
        timings = take_turns(runs, device, seconds=2.0, min_rounds=5, max_rounds=50)
    return max(flops[name] / timing.median / 1e9 for name, timing in timings.items())
