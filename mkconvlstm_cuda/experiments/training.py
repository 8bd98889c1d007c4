"""The training loop that experiments share: Adam; on a GPU in a CUDA graph, as small models wait for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .experiment import Progress

WARM_UP_STEPS = 30  # of the learning rate
EAGER_STEPS = 3  # before the capture: kernels are compiled and cuDNN chooses
PROGRESS_STEPS = 20  # between two looks at the GPU, which keep the host from running far ahead

Batch = Sequence[Tensor]


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    steps: int,
    learning_rate: float,
    precision: str,
    progress: Progress,
) -> list[float]:
    """Trains `model` where its parameters are, with Adam; the rate rises over 30 steps and falls over the second half.

    Args:
        model: in training mode when this returns.
        batch: the tensors of step s, of the same shapes in every step, on the model's device.
        loss: of the model and a batch, a scalar.
        steps: how many.
        learning_rate: its highest value.
        precision: "float32", or "bfloat16" for autocast.
        progress: called now and then with the share that is done.

    Returns:
        the loss of every step. Raises FloatingPointError if the last ones are not finite.
    """
    model.train()
    parameters = list(model.parameters())
    device = parameters[0].device
    gpu = device.type == "cuda"
    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.98), capturable=gpu, fused=gpu)

    def step(tensors: Batch) -> Tensor:
        with autocast(device, precision):
            value = loss(model, tensors)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # in the graph too, whose gradients shall lie in its own memory
        return value.detach()

    losses = torch.zeros(steps, device=device)
    advance = Graphed(step) if gpu else step
    for s in range(steps):
        rate.fill_(learning_rate * min(1, (s + 1) / WARM_UP_STEPS, 2 * (1 - s / steps) + 0.01))
        losses[s] = advance(batch(s))
        if s % PROGRESS_STEPS == 0:
            losses[s].item()
            progress(s / steps)
    if not losses[-PROGRESS_STEPS:].isfinite().all():
        raise FloatingPointError(f"training diverged: the last losses are {losses[-5:].tolist()}")
    return losses.tolist()


class Graphed:
    """A function of tensors, called a few times as it is, then captured in a CUDA graph and replayed.

    The tensors keep their shapes; what it gives is overwritten by the next call.
    """

    def __init__(self, function: Callable[[Batch], Tensor]):
        self.function, self.calls, self.graph = function, 0, None
        self.side = torch.cuda.Stream()

    def __call__(self, tensors: Batch) -> Tensor:
        if self.calls < EAGER_STEPS:
            self.calls += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.function(tensors)
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        if self.graph is None:
            self.tensors = [t.clone() for t in tensors]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(self.tensors)
        for kept, new in zip(self.tensors, tensors, strict=True):
            kept.copy_(new)
        self.graph.replay()
        return self.result


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Computing in `precision`, "float32" or "bfloat16"; without a cache, which a graph would read after it is gone."""
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision: got {precision!r}, wanted 'float32' or 'bfloat16'")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor], precision: str
) -> float:
    """The loss of a model in eval mode, averaged over batches of the same size."""
    model.eval()
    with autocast(batches[0][0].device, precision):
        return torch.stack([loss(model, tensors).float() for tensors in batches]).mean().item()
