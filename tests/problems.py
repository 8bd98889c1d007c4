"""Problems that several test files share: every option of the layer, small and odd-sized, and how to run them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mkconvlstm_cuda import Branch, FlowAttention, MKConvLSTM, dispatch, inception_branches

BRANCHES = [Branch(1, 1), Branch((1, 3), 2, bottleneck=2), Branch(3, 1, dilation=2)]


@dataclass(frozen=True)
class Problem:
    """A layer's options and the input that goes with them."""

    kernels: object = field(default_factory=lambda: {1: 1, 3: 2})
    options: dict = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    state: bool = True
    batch: int = 2
    steps: int = 3
    channels: int = 2
    size: tuple[int, int] = (4, 3)

    def layer(self, backend: str = "auto", dtype: torch.dtype = torch.float64, device="cpu", seed: int = 0, **more):
        """The layer, with random weights, biases, peepholes and norms that depend on ``seed`` alone."""
        options = {**self.options, **more}
        layer = MKConvLSTM(self.channels, self.kernels, backend=backend, dtype=torch.float64, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(1, p[0].numel()) ** 0.5)
            for name, b in layer.named_buffers():
                if name.endswith("running_var"):
                    b.uniform_(0.5, 2, generator=generator)
                elif name.endswith("running_mean"):
                    b.normal_(generator=generator)
        return layer.to(device=device, dtype=dtype)

    def inputs(self, layer: MKConvLSTM, dtype: torch.dtype = torch.float64, device="cpu") -> dict[str, Tensor]:
        """x, h_0, c_0 and flow, as far as the problem has them; leaves that want gradients."""
        generator = torch.Generator().manual_seed(1)
        shapes = {"x": (self.batch, self.steps, self.channels, *self.size)}
        if self.state:
            state = (len(layer.cells), self.batch, layer.hidden_channels, *self.size)
            shapes |= {"h_0": state, "c_0": state}
        if layer.cells[0].attention is not None:
            shapes["flow"] = (self.batch, self.steps, layer.cells[0].attention.flow_channels, *self.size)
        made = {}
        for name, shape in shapes.items():
            t = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name in ("x", "flow") and not layer.batch_first:
                t = t.transpose(0, 1).contiguous()
            made[name] = t.to(device=device, dtype=dtype).requires_grad_()
        return made

    def call(self, layer: MKConvLSTM, x: Tensor, h_0=None, c_0=None, flow=None) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n, c_n."""
        state = None if h_0 is None else (h_0, c_0)
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        output, (h_n, c_n) = layer(x, state, flow=flow, lengths=lengths)
        return output, h_n, c_n

    def run(self, backend: str, dtype: torch.dtype = torch.float64, device="cpu", **more) -> dict[str, Tensor]:
        """Outputs and the gradients of all inputs and parameters, for fixed random gradients of all outputs."""
        layer = self.layer(backend, dtype, device, **more)
        inputs = self.inputs(layer, dtype, device)
        outputs = dict(zip(("output", "h_n", "c_n"), self.call(layer, **inputs), strict=True))
        generator = torch.Generator().manual_seed(2)
        dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs.values()]
        wanted = inputs | dict(layer.named_parameters())
        grads = torch.autograd.grad(tuple(outputs.values()), tuple(wanted.values()), dys)
        named = {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
        return {name: t.detach() for name, t in outputs.items()} | named


def pixel(**options) -> Problem:
    return Problem(options={"peephole": "pixel", "image_size": (4, 3), **options})


PROBLEMS = {
    "two kernel sizes": Problem(),
    "one kernel size": Problem({3: 3}),
    "no state": Problem(state=False),
    "one step, one sample": Problem(batch=1, steps=1),
    "rectangular kernels": Problem({(1, 3): 1, (5, 3): 2}),
    "other hidden kernels": Problem(options={"hidden_kernels": {5: 1, (3, 1): 2}}),
    "bottleneck and dilation": Problem(BRANCHES),
    "mix gate": Problem(options={"mix": "gate"}),
    "mix gate, tanh": Problem(options={"mix": "gate", "mix_activation": "tanh"}),
    "mix full": Problem(options={"mix": "full"}),
    "mix full, tanh": Problem(options={"mix": "full", "mix_activation": "tanh"}),
    "peephole channel": Problem(options={"peephole": "channel"}),
    "peephole channel, current": Problem(options={"peephole": "channel", "output_peephole": "current"}),
    "peephole pixel": pixel(),
    "peephole pixel, current": pixel(output_peephole="current"),
    "no bias": Problem(options={"bias": False}),
    "two layers": Problem(options={"num_layers": 2}),
    "bidirectional": Problem(options={"bidirectional": True}),
    "two layers, bidirectional, lengths": Problem(
        options={"num_layers": 2, "bidirectional": True}, lengths=(3, 1), channels=1
    ),
    "lengths": Problem(lengths=(1, 3)),
    "lengths, peephole": Problem(options={"peephole": "channel"}, lengths=(2, 3), state=False),
    "time first": Problem(options={"batch_first": False}),
    "recompute": Problem(options={"recompute": True}),
    "recompute, mix, peephole": Problem(
        options={"recompute": True, "mix": "gate", "mix_activation": "tanh", "peephole": "channel"}
    ),
    "recompute, bottleneck": Problem(BRANCHES, {"recompute": True}),
    "masks for one branch": Problem(options={"attention": FlowAttention(2, branches=(3,))}),
    "one-channel masks for all": Problem(options={"attention": FlowAttention(2, mask_channels=1)}),
    "masks, bidirectional, recompute": Problem(
        options={"attention": FlowAttention(1, kernel_size=1), "bidirectional": True, "recompute": True}
    ),
    "group norm": Problem(options={"norm": "group"}),
    "layer norm": Problem(options={"norm": "layer", "recompute": True}),
    "layer norm by pixel": Problem(options={"norm": "layer_pixel", "image_size": (4, 3)}),
    "batch norm": Problem(options={"norm": "batch"}),
    "norm of the gates": Problem(options={"gate_norm": 3, "peephole": "channel"}),
    "inception": Problem(inception_branches(4), {"norm": "batch"}),
    "pool": Problem([Branch(1, 1, pool=True), Branch(3, 1)]),
}

# What no weights stand for is served by "reference" alone.
LIVE = ("group norm", "layer norm", "layer norm by pixel", "batch norm", "norm of the gates", "inception", "pool")


def backends_here(device: str = "cpu") -> list:
    """Every backend but the reference as a pytest parameter, skipped with its reason where it cannot run."""
    params = []
    for backend in dispatch.BACKENDS.values():
        if backend.name == "reference":
            continue
        reason = backend.available()
        if device == "cpu" and backend.name in ("triton", "cuda"):
            continue  # tests marked gpu have these
        marks = [pytest.mark.skip(reason=f"{backend.name}: {reason}")] if reason else []
        params.append(pytest.param(backend.name, marks=marks))
    return params


def places() -> list:
    """(backend, device) wherever there is a backend, as pytest parameters; skipped with the reason where it is not."""
    params = [pytest.param(name, "cpu", id=f"{name}, cpu") for name in ("reference", "aten")]
    for backend in dispatch.BACKENDS.values():
        reason = backend.available() if torch.cuda.is_available() else "needs a GPU"
        marks = [pytest.mark.gpu, *([pytest.mark.skip(reason=reason)] if reason else [])]
        params.append(pytest.param(backend.name, "cuda", marks=marks, id=f"{backend.name}, cuda"))
    return params


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's relative error (Frobenius norm) is at most ``tolerance``."""
    assert got.keys() == wanted.keys()
    for name, t in got.items():
        exact = wanted[name].detach().double()
        error = float((t.detach().double() - exact).norm() / exact.norm().clamp(min=1e-30))
        assert error <= tolerance, f"{name}: relative error {error:.2e}, at most {tolerance:.0e}"


def worst(results: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative error (Frobenius norm) of a tensor."""
    return max(float((r.double() - exact[n]).norm() / exact[n].norm().clamp(min=1e-30)) for n, r in results.items())


def assert_as_close(problem: Problem, backend: str, dtype: torch.dtype, device="cpu", floor: float = 1e-6) -> None:
    """At most twice as far from float64 as ``aten``, torch's own arithmetic, in the same dtype."""
    exact = problem.run("reference", device=device)
    torchs, ours = (problem.run(name, dtype, device) for name in ("aten", backend))
    assert worst(ours, exact) <= max(2 * worst(torchs, exact), floor)


def assert_repeats(problem: Problem, backend: str, dtype: torch.dtype, device: str, times: int = 1) -> None:
    """The recurrence has the same bits with gates kept for backward and without, and every time."""
    layer = problem.layer(backend, dtype, device)
    inputs = problem.inputs(layer, dtype, device)
    kept = problem.call(layer, **inputs)
    with torch.no_grad():
        dropped = problem.call(layer, **inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))
    first = problem.run(backend, dtype, device)
    recurrent = first.keys() & {"output", "h_n", "c_n", "dh_0", "dc_0"}
    assert recurrent
    for _ in range(times):
        again = problem.run(backend, dtype, device)
        assert all(torch.equal(first[name], again[name]) for name in recurrent)


def assert_graph_replays(problem: Problem, backend: str, dtype: torch.dtype) -> None:
    """A CUDA graph of the layer computes what the layer does."""
    layer = problem.layer(backend, dtype, "cuda")
    x = problem.inputs(layer, dtype, "cuda")["x"].detach()
    with torch.no_grad():
        wanted = layer(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)[0]
        output.zero_()
        graph.replay()
    assert torch.equal(output, wanted)
