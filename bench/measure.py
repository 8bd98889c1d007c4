"""Runs workloads: each contestant is first checked against float64, then timed in turns with the others."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from .contestants import Compiled, Contestant, builders, hidden_convolutions
from .machine import environment
from .precision import Precision
from .timing import peak_rate, take_turns
from .workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Record:
    """What was measured of one contestant on one workload in one precision."""

    workload: str
    dtype: str  # a name of PRECISIONS
    contestant: str
    forward_ms: float  # median, no gradients
    training_ms: float  # median, forward + backward, gradients of input and weights
    forward_quartiles: tuple[float, float]
    training_quartiles: tuple[float, float]
    training_tflops: float  # convolutions alone, over the training time
    share_of_peak: float  # of timing.peak_rate in the same run and dtype
    setup_s: float  # first forward and backward: compilation, capture, loading
    kept_mib: float  # held for backward beside the input and the parameters
    peak_mib: float | None  # GPU memory while training, beside the input, its gradient and the parameters
    gpu_busy: float | None  # share of the time in which the GPU works, over training steps one after another
    output_error: float  # against float64, relative, Frobenius norm
    gradient_error: float  # the same of the input's gradient


def kept_bytes(contestant: Contestant) -> int:
    """Bytes of storage that autograd holds between forward and backward, without x and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (contestant.x, *contestant.module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = contestant.call()  # alive, so that no address is used twice
    del output
    return sum(kept.values())


def peak_bytes(contestant: Contestant) -> int | None:
    """Most GPU memory that an eager training step takes, with its gradients; None on CPUs, and of what has a pool."""
    device = contestant.x.device
    if device.type != "cuda" or isinstance(contestant, Compiled):
        return None
    contestant.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    Contestant.train(contestant)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gpu_busy(contestant: Contestant, steps: int = 4) -> float | None:
    """Share of the time, from first to last kernel of ``steps`` training steps, in which one runs; None on CPUs."""
    device = contestant.x.device
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            contestant.train()
        torch.cuda.synchronize(device)
    kernels = [e.time_range for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return covered([(k.start, k.end) for k in kernels])


def covered(intervals: list[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that ``intervals`` cover."""
    intervals = sorted(intervals)
    busy, end = 0.0, intervals[0][0]
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - intervals[0][0])


def run(
    names: Iterable[str],
    device: torch.device,
    precisions: Iterable[Precision],
    seconds: float = 10.0,
    with_compile: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Check and time ``names``' workloads on ``device``.

    Args:
        names: keys of ``WORKLOADS``.
        seconds: time for each workload, precision and pass, all contestants together.
        with_compile: also a peer under torch.compile, which takes up to minutes for each workload.
        progress: called with what is done next.

    Returns:
        What :func:`report.write` takes: machine, software, peak rates and one :class:`Record` (as a dict) each.

    Raises:
        RuntimeError: a contestant is too far from float64; nothing wrong is ever timed.
    """
    rates, records, alone = {}, [], {}
    precisions = list(precisions)
    for precision in precisions:
        progress(f"peak rate, {precision.name}")
        with precision.in_force():
            rates[precision.name] = peak_rate(device, precision.dtype)
    for name in names:
        for precision in precisions:
            records += run_workload(
                WORKLOADS[name], device, precision, rates[precision.name], seconds, with_compile, progress
            )
            if device.type == "cuda":
                with precision.in_force():
                    convolutions = hidden_convolutions(WORKLOADS[name], device, precision.dtype)
                    timing = take_turns({"alone": convolutions.forward}, device, seconds / 5)["alone"]
                alone[f"{name}, {precision.name}"] = 1e3 * timing.median / WORKLOADS[name].steps
    return {
        **environment(device),
        "peak_tflops": rates,
        "records": [asdict(r) for r in records],
        "hidden_convolutions_us": alone,  # cuDNN's, of one step
    }


def run_workload(
    workload: Workload,
    device: torch.device,
    precision: Precision,
    rate: float,
    seconds: float,
    with_compile: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    only: Callable[[str], bool] = lambda contestant: True,
) -> list[Record]:
    """One workload in one precision; ``rate`` in TFLOP/s is the peak to compare with. Raises as :func:`run`.

    ``only`` says of a contestant whether it takes part.
    """
    with precision.in_force():
        return _run_workload(workload, device, precision, rate, seconds, with_compile, progress, only)


def _run_workload(
    workload: Workload,
    device: torch.device,
    precision: Precision,
    rate: float,
    seconds: float,
    with_compile: bool,
    progress: Callable[[str], None],
    only: Callable[[str], bool],
) -> list[Record]:
    label, dtype = f"{workload.name}, {precision.name}", precision.dtype
    torch.manual_seed(1)
    x = torch.randn(workload.shape, device=device).to(dtype)
    batch, steps, _, height, width = workload.shape
    dy = torch.randn(batch, steps, workload.hidden_channels, height, width, device=device).to(dtype)
    made, setup, errors, peaks, exact = {}, {}, {}, {}, None
    for name, make in builders(workload, device, dtype, with_compile).items():
        if not only(name):
            continue
        progress(f"{label}: checking {name}")
        start = time.perf_counter()
        contestant = make(x, dy)
        contestant.train()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        setup[name] = time.perf_counter() - start
        if exact is None:  # the first one is the usual loop
            exact = exact_results(contestant)
        errors[name] = tuple(
            float((got.double() - wanted).norm() / wanted.norm())
            for got, wanted in zip((contestant.forward(), contestant.x.grad), exact, strict=True)
        )
        if not max(errors[name]) <= precision.tolerance:  # NaN fails
            most = precision.tolerance
            raise RuntimeError(
                f"{label}: {name} is {errors[name]} away from float64, at most {most} is right; not timed"
            )
        made[name], peaks[name] = contestant, peak_bytes(contestant)

    progress(f"{label}: timing")
    forward = take_turns({name: c.forward for name, c in made.items()}, device, seconds)
    training = take_turns({name: c.train for name, c in made.items()}, device, seconds)
    records = []
    for name, contestant in made.items():
        tflops = 3 * workload.forward_flops / training[name].median / 1e9
        records.append(
            Record(
                workload=workload.name,
                dtype=precision.name,
                contestant=name,
                forward_ms=forward[name].median,
                training_ms=training[name].median,
                forward_quartiles=forward[name].spread,
                training_quartiles=training[name].spread,
                training_tflops=tflops,
                share_of_peak=tflops / rate,
                setup_s=setup[name],
                kept_mib=kept_bytes(contestant) / 2**20,
                peak_mib=None if peaks[name] is None else peaks[name] / 2**20,
                gpu_busy=gpu_busy(contestant),
                output_error=errors[name][0],
                gradient_error=errors[name][1],
            )
        )
    return records


def exact_results(contestant: Contestant) -> tuple[torch.Tensor, torch.Tensor]:
    """h and dx of the same weights, input and output gradient in float64."""
    exact = Contestant(copy.deepcopy(contestant.module).double(), contestant.x.double(), contestant.dy.double())
    exact.train()
    return exact.forward(), exact.x.grad
