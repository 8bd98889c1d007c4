"""A fuzz problem's layer and inputs, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .fuzz_problems import INPUTS, OUTPUTS, Problem
from .layer import MKConvLSTM

TF32_EPS = 2.0**-10


@lru_cache(maxsize=4)
def state_of(p: Problem, device: torch.device) -> dict[str, Tensor]:
    """The state of the problem's layer: values that are representable in the problem's dtype, in float64."""
    generator = torch.Generator(device).manual_seed(p.seed)
    state = {}
    for name, t in MKConvLSTM(**p.options(), device="meta").state_dict().items():
        new = torch.zeros(t.shape, dtype=torch.float64 if t.is_floating_point() else t.dtype, device=device)
        if name.endswith("running_var"):
            new.uniform_(0.5, 2, generator=generator)
        elif t.is_floating_point() and not name.endswith("running_mean"):
            new.normal_(0, 1 if t.dim() < 3 else max(1, t[0].numel()) ** -0.5, generator=generator)
        state[name] = new.to(getattr(torch, p.dtype)).double() if t.is_floating_point() else new
    return state


def build(p: Problem, backend: str, device: torch.device, exact: bool) -> MKConvLSTM:
    """The problem's layer, in its dtype or (``exact``) in float64."""
    dtype = torch.float64 if exact else getattr(torch, p.dtype)
    layer = MKConvLSTM(**p.options(), backend=backend, device="meta", dtype=dtype)
    state = state_of(replace(p, backend="reference"), device)
    own = {n: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in state.items()}
    layer.load_state_dict(own, assign=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not any(word in name for word in p.frozen if word not in INPUTS))
    return layer.train(p.training)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """``t`` [..., C, H, W] with other strides. What lies between its elements is NaN."""
    if layout == "channels last":
        return t.movedim(-3, -1).contiguous().movedim(-1, -3)
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
        return view.copy_(t)
    if layout == "offset":
        return t.new_full((t.numel() + 1,), float("nan"))[1:].view(t.shape).copy_(t)
    if layout == "expanded":
        return t[:1].contiguous().expand(t.shape) if t.shape[0] else t
    return t.contiguous()


def rounding(p: Problem, device: torch.device) -> float:
    """The relative error of what the problem's products are made of."""
    dtype = getattr(torch, p.autocast or p.dtype)
    return TF32_EPS if p.tf32 and dtype == torch.float32 and device.type == "cuda" else torch.finfo(dtype).eps


def values(p: Problem, shape: Sequence[int], layout: str, number: int, dtype: torch.dtype, device) -> Tensor:
    """Random values, representable in ``dtype``, in float64; equal along the first dimension if expanded."""
    generator = torch.Generator(device).manual_seed(p.seed + number)
    t = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=device)
    if p.nudge:
        other = torch.Generator(device).manual_seed(p.seed + number + 100 * p.nudge)
        t *= 1 + rounding(p, device) * torch.randn(t.shape, generator=other, dtype=torch.float64, device=device)
    t = t.to(dtype).double()
    return t[:1].expand(t.shape) if layout == "expanded" and t.shape[0] else t


def make_inputs(p: Problem, layer: MKConvLSTM, device: torch.device, exact: bool) -> dict[str, Tensor]:
    """x, h_0, c_0 and flow, as far as the problem has them."""
    image, dtype = (p.height, p.width), getattr(torch, p.dtype)
    leading = (p.batch, p.steps) if p.batch_first else (p.steps, p.batch)
    shapes = {"x": (*leading, p.channels, *image)}
    if p.state:
        shapes |= dict.fromkeys(("h_0", "c_0"), (len(layer.cells), p.batch, layer.hidden_channels, *image))
    if p.mask_channels is not None:
        shapes["flow"] = (*leading, layer.cells[0].attention.flow_channels, *image)
    made = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        layout = p.state_layout if name in ("h_0", "c_0") else p.x_layout
        t = values(p, shape, layout, number, dtype, device).to(torch.float64 if exact else dtype)
        made[name] = lay_out(t, layout).requires_grad_(p.gradients and name not in p.frozen)
    return made


def call(p: Problem, layer: MKConvLSTM, inputs: dict[str, Tensor], exact: bool) -> dict[str, Tensor]:
    """Outputs and wanted gradients by name."""
    device = inputs["x"].device
    state = (inputs["h_0"], inputs["c_0"]) if p.state else None
    cast = None if p.autocast is None or exact else getattr(torch, p.autocast)
    with torch.set_grad_enabled(p.gradients), torch.autocast(device.type, dtype=cast, enabled=cast is not None):
        output, (h_n, c_n) = layer(inputs["x"], state, inputs.get("flow"), p.lengths)
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    wanted = {n: t for n, t in (inputs | dict(layer.named_parameters())).items() if t.requires_grad}
    ys = [y for name, y in results.items() if name in p.outputs and y.requires_grad]
    if p.gradients and wanted and ys:
        dys = []
        for number, y in enumerate(ys, 5):
            dy = values(p, y.shape, p.gradient_layout, number, torch.bfloat16, device).to(y.dtype)
            dys.append(lay_out(dy, p.gradient_layout))
        tensors = tuple(wanted.values())
        if p.twice:
            torch.autograd.grad(ys, tensors, dys, retain_graph=True, allow_unused=True)
        grads = torch.autograd.grad(ys, tensors, dys, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]
        results |= {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: t.detach() for name, t in results.items()}


class GatesIn(TorchFunctionMode):
    """Within it sigmoid and tanh have results of ``dtype``, as in a loop of torch operations in that dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.sigmoid, torch.tanh):
            return func(args[0].to(self.dtype)).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=4)
def exact_results(p: Problem, device: torch.device) -> dict[str, Tensor]:
    """The reference's results in float64."""
    layer = build(p, "reference", device, True)
    return call(p, layer, make_inputs(p, layer, device, True), True)


@lru_cache(maxsize=4)
def torch_results(p: Problem, device: torch.device) -> dict[str, Tensor]:
    """What torch's own arithmetic makes of the problem: the reference in its dtype.

    The gradients of half types are those of gates in half types, which is what a loop of torch operations keeps for
    backward. The reference keeps them in float32, which takes twice the memory.
    """
    dtype, results = getattr(torch, p.autocast or p.dtype), {}
    for mode in (GatesIn(dtype), nullcontext()) if dtype.itemsize == 2 else (nullcontext(),):
        layer = build(p, "reference", device, False)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=p.tf32), mode:
            new = call(p, layer, make_inputs(p, layer, device, False), False)
        results = new | {name: t for name, t in results.items() if name not in OUTPUTS}
    return results
