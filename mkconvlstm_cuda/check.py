"""``mkconvlstm check``: gradients and agreement of every backend that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import gradcheck

from . import dispatch
from .layer import MKConvLSTM

# The reference may be this far from float64 (relative, Frobenius norm) on the cases below ...
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 2e-3
# ... and any tensor of another backend FACTOR times as far as the reference's in the same dtype and on the same device,
# or a few units of rounding, within which being closer is luck.
FACTOR = 2.0
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
TF32_ROUNDING = 2**-10

COVERS = "output, states and every gradient, relative to float64"


@dataclass(frozen=True)
class Case:
    """One small problem: a layer and its input [B, T, C, H, W]."""

    name: str
    shape: tuple[int, int, int, int, int]
    kernels: dict
    options: dict


CASES = (
    Case("two kernel sizes", (2, 4, 5, 9, 7), {3: 5, 5: 6}, {}),
    Case("one kernel size", (3, 3, 4, 6, 11), {3: 9}, {}),
    Case("rectangular, three branches", (1, 5, 3, 8, 8), {1: 3, (3, 5): 4, 7: 2}, {}),
    Case("peepholes", (2, 3, 4, 5, 6), {3: 4, 5: 3}, {"peephole": "channel"}),
    Case("pixel peepholes, o sees c_t", (2, 3, 4, 5, 6), {3: 7}, {"peephole": "pixel", "output_peephole": "current"}),
    Case("1x1 mix after tanh", (2, 3, 4, 6, 6), {3: 4, 5: 4}, {"mix": "gate", "mix_activation": "tanh"}),
    Case("recompute", (2, 4, 4, 6, 6), {3: 4, 5: 4}, {"recompute": True}),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    backend: str
    check: str
    dtype: str
    error: float | None  # relative, of the output, state or gradient that is nearest to its limit; None for gradcheck
    limit: float | None  # of that tensor
    note: str  # "" or why it was not run or failed
    passed: bool | None  # None: not run


def build(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> MKConvLSTM:
    """The case's layer with weights that depend on the case alone."""
    image_size = case.shape[3:] if case.options.get("peephole") == "pixel" else None
    options = dict(image_size=image_size, backend=backend, dtype=torch.float64, **case.options)
    layer = MKConvLSTM(case.shape[2], case.kernels, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            fan_in = max(1, p[0].numel())
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan_in**0.5)
    return layer.to(device=device, dtype=dtype)


def problem_tensors(case: Case, layer: MKConvLSTM, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, h_0, c_0 as leaves that want gradients."""
    batch, _, _, height, width = case.shape
    state = (1, batch, layer.hidden_channels, height, width)
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (case.shape, state, state)]
    return [t.to(device=device, dtype=dtype).requires_grad_() for t in tensors]


def outputs_and_gradients(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """h, h_n, c_n and the gradients of x, h_0, c_0 and every parameter, for fixed random output gradients."""
    layer = build(case, backend, device, dtype)
    x, h_0, c_0 = problem_tensors(case, layer, device, dtype)
    h, (h_n, c_n) = layer(x, (h_0, c_0))
    generator = torch.Generator().manual_seed(2)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in (h, h_n, c_n)]
    grads = torch.autograd.grad((h, h_n, c_n), [x, h_0, c_0, *layer.parameters()], dys)
    return [h.detach(), h_n.detach(), c_n.detach(), *grads]


def distances(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative error (Frobenius norm) of each tensor; infinity where one is not finite."""
    errors = [float((r.double().cpu() - e.cpu()).norm() / e.cpu().norm()) for r, e in zip(results, exact, strict=True)]
    return [e if e == e else float("inf") for e in errors]


def run(device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> Iterator[Result]:
    """Every backend on every case and dtype, and gradcheck where it has float64; a :class:`Result` each."""
    exact = {c.name: outputs_and_gradients(c, "reference", torch.device("cpu"), torch.float64) for c in CASES}
    for backend in reversed(dispatch.BACKENDS.values()):  # the oracle first
        if reason := backend.available():
            yield Result(backend.name, "available", "", None, None, reason, None)
            continue
        yield gradcheck_result(backend.name, device)
        for dtype in dtypes:
            for case in CASES:
                yield agreement(case, backend.name, device, dtype, exact[case.name])


def agreement(case: Case, backend: str, device: torch.device, dtype: torch.dtype, exact: list[Tensor]) -> Result:
    """The backend's distance from float64 against the reference's in the same dtype."""
    name = str(dtype).removeprefix("torch.")
    try:
        results = outputs_and_gradients(case, backend, device, dtype)
    except dispatch.Refusal as refusal:
        return Result(backend, case.name, name, None, None, str(refusal).split(": ", 2)[-1], None)
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    errors = distances(results, exact)
    if backend == "reference":
        limits = [TF32_TOLERANCE if tf32 else TOLERANCES[dtype]] * len(errors)
    else:
        least = TF32_ROUNDING if tf32 else ROUNDING[dtype]
        own = distances(outputs_and_gradients(case, "reference", device, dtype), exact)
        limits = [max(FACTOR * o, least) for o in own]
    error, limit = max(zip(errors, limits, strict=True), key=lambda pair: pair[0] / pair[1])
    return Result(backend, case.name, name, error, limit, "", error <= limit)


def gradcheck_result(backend: str, device: torch.device) -> Result:
    """Numerical against analytical gradients, float64, of input, both states and every parameter."""
    case = Case("gradcheck", (1, 2, 2, 3, 4), {1: 1, 3: 1}, {"peephole": "channel"})
    layer = build(case, backend, device, torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, h_0, c_0, *parameters):
        h, (h_n, c_n) = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, (h_0, c_0)))
        return h, h_n, c_n

    inputs = problem_tensors(case, layer, device, torch.float64)
    inputs += [p.detach().clone().requires_grad_() for p in layer.parameters()]
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            gradcheck(function, inputs)
    except dispatch.Refusal as refusal:
        return Result(backend, case.name, "float64", None, None, str(refusal).split(": ", 2)[-1], None)
    except RuntimeError as failure:  # gradcheck's verdict
        return Result(backend, case.name, "float64", None, None, str(failure).splitlines()[0], False)
    return Result(backend, case.name, "float64", None, None, "", True)
