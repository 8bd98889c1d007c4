"""Runs workloads: each contestant is first checked against float64, then timed in turns with the others."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import mkconvlstm_cuda
from mkconvlstm_cuda import MKConvLSTM, dispatch

from .peers import BatchedInputLoop, UsualLoop
from .timing import peak_rate, take_turns
from .workloads import WORKLOADS, Workload

PEERS = {"usual loop": UsualLoop, "loop, input batched, channels-last": BatchedInputLoop}
BASELINE = "usual loop"

# Largest ||y - y64|| / ||y64|| with which a contestant may be timed; of an output or the input's gradient.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Record:
    """What was measured of one contestant on one workload in one dtype."""

    workload: str
    dtype: str
    contestant: str
    forward_ms: float  # median, no gradients
    training_ms: float  # median, forward + backward, gradients of input and weights
    forward_quartiles: tuple[float, float]
    training_quartiles: tuple[float, float]
    training_tflops: float  # convolutions alone, over the training time
    share_of_peak: float  # of timing.peak_rate in the same run and dtype
    kept_mib: float  # held for backward beside the input and the parameters
    peak_mib: float | None  # GPU memory while training, beside the input, its gradient and the parameters
    output_error: float  # against float64, relative, Frobenius norm
    gradient_error: float  # the same of the input's gradient


def ours(device: torch.device) -> list[str]:
    """Fused and hand-written backends that can run on ``device``."""
    problem = dispatch.Problem(device, torch.float32, 1, 1, 8, 8, (8,), ((3, 3),), ((1, 1),))
    return [b.name for b in dispatch.BACKENDS.values() if b.forward and dispatch.refusal(b, problem) is None]


def contestants(workload: Workload, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Builders of all layers that can run ``workload``, all with the same weights, in float32."""

    def layer(**options) -> MKConvLSTM:
        torch.manual_seed(0)
        return MKConvLSTM(workload.channels, workload.kernels, device=device, **options)

    built: dict[str, Callable[[], nn.Module]] = {
        name: (lambda make=make: make(layer()).to(device)) for name, make in PEERS.items()
    }
    for backend in ours(device):
        built[f"ours, {backend}"] = lambda backend=backend: layer(backend=backend)
        built[f"ours, {backend}, recompute"] = lambda backend=backend: layer(backend=backend, recompute=True)
    return built


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y if isinstance(y, Tensor) else y[0]


def train(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward; gradients of x and of all parameters start from none."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    output_of(module, x).backward(dy)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of storage that autograd holds between forward and backward, without ``x`` and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = output_of(module, x)  # alive, so that no address is used twice
    del output
    return sum(kept.values())


def peak_bytes(module: nn.Module, x: Tensor, dy: Tensor) -> int | None:
    """Most GPU memory that a training step takes, its gradients included; None on CPUs."""
    if x.device.type != "cuda":
        return None
    module.zero_grad(set_to_none=True)
    x.grad = None
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    train(module, x, dy)
    return torch.cuda.max_memory_allocated(x.device) - before


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def run(
    names: Iterable[str],
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict:
    """Check and time ``names``' workloads on ``device``.

    Args:
        names: keys of ``WORKLOADS``.
        seconds: time for each workload, dtype and pass, all contestants together.
        progress: called with what is done next.

    Returns:
        What :func:`report.write` takes: machine, software, peak rates and one :class:`Record` (as a dict) each.

    Raises:
        RuntimeError: a contestant is too far from float64; nothing wrong is ever timed.
    """
    rates, records = {}, []
    for dtype in dtypes:
        progress(f"peak rate, {short(dtype)}")
        rates[short(dtype)] = peak_rate(device, dtype)
    for name in names:
        for dtype in dtypes:
            records += run_workload(WORKLOADS[name], device, dtype, rates[short(dtype)], seconds, progress)
    return {**environment(device), "peak_tflops": rates, "records": [asdict(r) for r in records]}


def run_workload(
    workload: Workload, device: torch.device, dtype: torch.dtype, rate: float, seconds: float, progress
) -> list[Record]:
    torch.manual_seed(1)
    x = torch.randn(workload.shape, device=device).to(dtype).requires_grad_()
    built = contestants(workload, device)
    modules = {name: build().to(dtype) for name, build in built.items()}
    dy = torch.randn_like(output_of(modules[BASELINE], x)).detach()

    progress(f"{workload.name}, {short(dtype)}: float64")
    exact_x = x.detach().double().requires_grad_()
    exact_layer = copy.deepcopy(modules[BASELINE]).double()
    exact = output_of(exact_layer, exact_x)
    exact.backward(dy.double())
    exact = exact.detach()
    tolerance = TOLERANCES[dtype]
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        tolerance = TF32_TOLERANCE
    errors = {}
    for contestant, module in modules.items():
        progress(f"{workload.name}, {short(dtype)}: checking {contestant}")
        train(module, x, dy)
        output = output_of(module, x).detach()
        errors[contestant] = relative_error(output, exact), relative_error(x.grad, exact_x.grad)
        if not max(errors[contestant]) <= tolerance:  # NaN fails
            raise RuntimeError(
                f"{workload.name}, {short(dtype)}: {contestant} is {errors[contestant]} away from float64, "
                f"at most {tolerance} is right; not timed"
            )

    def inference(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    progress(f"{workload.name}, {short(dtype)}: timing")
    forward = take_turns({n: lambda m=m: inference(m) for n, m in modules.items()}, device, seconds)
    training = take_turns({n: lambda m=m: train(m, x, dy) for n, m in modules.items()}, device, seconds)
    records = []
    for contestant, module in modules.items():
        tflops = 3 * workload.forward_flops / training[contestant].median / 1e9
        kept, peak = kept_bytes(module, x), peak_bytes(module, x, dy)
        records.append(
            Record(
                workload.name,
                short(dtype),
                contestant,
                forward[contestant].median,
                training[contestant].median,
                forward[contestant].spread,
                training[contestant].spread,
                tflops,
                tflops / rate,
                kept / 2**20,
                None if peak is None else peak / 2**20,
                *errors[contestant],
            )
        )
    return records


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict:
    """Machine and software, with a hash of the kernels' sources, so that a stale report can be told."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = getattr(torch.cuda, "driver_version", lambda: None)()
    else:
        name, driver = cpu_name(), None
    return {
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "python": platform.python_version(),
        "mkconvlstm_cuda": mkconvlstm_cuda.__version__,
        "kernels": kernels_hash(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kernels_hash(root: Path | None = None) -> str | None:
    """SHA-256 over ``csrc/`` and ``triton_kernels/`` of a source tree; None where there is no such tree."""
    root = root or Path(__file__).resolve().parent.parent
    if not (root / "csrc").is_dir():
        return None
    digest = hashlib.sha256()
    suffixes = {".py", ".cu", ".cuh", ".cpp", ".h", ".in"}
    for folder in ("csrc", "triton_kernels"):
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in suffixes):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
