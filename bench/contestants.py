"""The layers that are timed against each other, and how each is run: eagerly, in a CUDA graph, or compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mkconvlstm_cuda import MKConvLSTM, dispatch

from .peers import BatchedInputLoop, UsualLoop
from .workloads import Workload

BASELINE = "usual loop"


class Contestant:
    """A module on fixed input ``x`` [B, T, C, H, W] and output gradient ``dy`` [B, T, F, H, W].

    ``forward()`` returns h without building a graph; ``train()`` runs forward and backward and leaves gradients in
    ``x.grad`` and the parameters'.
    """

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, cudnn_search: bool = False):
        self.module, self.x, self.dy = module, x.detach().clone().requires_grad_(), dy
        self.cudnn_search = cudnn_search  # cuDNN times its algorithms for every new shape and takes the fastest

    def call(self) -> Tensor:
        y = self.module(self.x)
        return y if isinstance(y, Tensor) else y[0]

    def forward(self) -> Tensor:
        with torch.no_grad(), self.cudnn():
            return self.call()

    def cudnn(self):
        """A context with cuDNN's search as this contestant wants it."""
        return torch.backends.cudnn.flags(
            enabled=True,
            benchmark=self.cudnn_search,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        )

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None

    def train(self) -> None:
        self.clear()
        with self.cudnn():
            self.call().backward(self.dy)


class Graphed(Contestant):
    """The same, captured in CUDA graphs once and replayed; gradients lie where the capture put them."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor, cudnn_search: bool = False):
        super().__init__(module, x, dy, cudnn_search)
        self.forward_graph, self.output = self.capture(super().forward)
        if dy is not None:
            self.train_graph, _ = self.capture(super().train)
            self.gradient = self.x.grad

    def capture(self, run: Callable):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
        return graph, output

    def forward(self) -> Tensor:
        self.forward_graph.replay()
        return self.output

    def train(self) -> None:
        self.x.grad = self.gradient
        self.train_graph.replay()


class Compiled(Contestant):
    """Under ``torch.compile`` with CUDA graphs, as one who knows it would. Their memory lies in a pool of their own."""

    def __init__(self, module: nn.Module, x: Tensor, dy: Tensor):
        super().__init__(torch.compile(module, mode="reduce-overhead" if x.is_cuda else "default"), x, dy, True)


class HiddenConvolutions(nn.Module):
    """The hidden convolutions of all steps and nothing else, one after another on one h: no layer does less."""

    def __init__(self, layer: MKConvLSTM, steps: int):
        super().__init__()
        weights = [b.conv.weight.detach() for b in layer.cells[0].hidden_transition.branches]
        self.weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        self.steps = steps

    def forward(self, h: Tensor) -> Tensor:
        """``h`` [B, F, H, W], channels-last."""
        for _ in range(self.steps):
            outputs = [nn.functional.conv2d(h, w, padding="same") for w in self.weights]
        return torch.cat(outputs, dim=1)


def hidden_convolutions(workload: Workload, device: torch.device, dtype: torch.dtype) -> Graphed:
    """:class:`HiddenConvolutions` of ``workload`` in a CUDA graph, with cuDNN's search."""
    layer = MKConvLSTM(workload.channels, workload.kernels, device=device).to(dtype)
    shape = (workload.batch, workload.height, workload.width, workload.hidden_channels)
    h = torch.randn(shape, device=device).to(dtype).permute(0, 3, 1, 2)
    return Graphed(HiddenConvolutions(layer, workload.steps), h, None, True)


def ours(device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """Fused and hand-written backends that can run on ``device``, the one that "auto" likes best first."""
    problem = dispatch.Problem(device, dtype, 1, 8, 8, ((3, 3, 8),))
    return [b.name for b in dispatch.BACKENDS.values() if b.forward and dispatch.refusal(b, problem) is None]


def builders(
    workload: Workload, device: torch.device, dtype: torch.dtype, with_compile: bool = False
) -> dict[str, Callable[[Tensor, Tensor], Contestant]]:
    """For each contestant on ``workload`` how to make it from x and dy; all have the same weights."""

    def layer(**options) -> MKConvLSTM:
        torch.manual_seed(0)
        return MKConvLSTM(workload.channels, workload.kernels, mix=workload.mix, device=device, **options)

    def peer(make: type[nn.Module]) -> nn.Module:
        return make(layer()).to(device, dtype)

    table: dict[str, Callable[[Tensor, Tensor], Contestant]] = {
        BASELINE: lambda x, dy: Contestant(peer(UsualLoop), x, dy, True),
        "loop, input batched, channels-last": lambda x, dy: Contestant(peer(BatchedInputLoop), x, dy, True),
    }
    if device.type == "cuda":
        table["the same in a CUDA graph"] = lambda x, dy: Graphed(peer(BatchedInputLoop), x, dy, True)
    names = ours(device, dtype)
    for backend in names:
        table[f"ours, {backend}"] = lambda x, dy, b=backend: Contestant(layer(backend=b).to(dtype), x, dy)
    best = names[0]
    if device.type == "cuda":
        for backend in [name for name in names if name != "aten"]:
            table[f"ours, {backend}, in a CUDA graph"] = lambda x, dy, b=backend: Graphed(
                layer(backend=b).to(dtype), x, dy
            )
    table[f"ours, {best}, recompute"] = lambda x, dy: Contestant(layer(backend=best, recompute=True).to(dtype), x, dy)
    if with_compile:  # last: what its pool takes and gives back falls into no other one's peak
        table["loop, input batched, under torch.compile"] = lambda x, dy: Compiled(peer(BatchedInputLoop), x, dy)
    return table
