"""Flow attention (the paper's section III-D, Fig. 5): masks that tell each kernel size where to look."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .arguments import as_pair, is_integer
from .halo import Halo


@dataclass(frozen=True)
class FlowAttention:
    """What flow masks a layer shall have: ``m_r = sigmoid(network(flow))_r``, multiplied into the input of branch r.

    They act on the input-to-hidden convolutions of the first layer (the paper leaves hidden-to-hidden to future work).

    Args:
        flow_channels: channels of the flow, 2 for (dx, dy) in pixels per frame.
        branches: kernel sizes of the branches that get a mask; None for all.
        mask_channels: "input" for as many channels as the layer's input has (Fig. 14), or 1 for one mask for all.
        network: a module [N, flow_channels, H, W] -> [N, masks * mask_channels, H, W], the masks in the order of the
            branches; None for one convolution. It is copied as it is, so that every direction has its own.
        kernel_size: of that one convolution.
    """

    flow_channels: int = 2
    branches: Sequence[int | tuple[int, int]] | None = None
    mask_channels: str | int = "input"
    network: nn.Module | None = None
    kernel_size: int = 3

    def __post_init__(self):
        if not is_integer(self.flow_channels, 1):
            raise ValueError(f"flow_channels: got {self.flow_channels!r}, wanted an int of at least 1")
        if self.branches is not None and (not isinstance(self.branches, (tuple, list)) or not self.branches):
            raise ValueError(
                f"attention branches: got {self.branches!r}, wanted a list of kernel sizes, or None for all"
            )
        if self.mask_channels not in ("input", 1):
            raise ValueError(f"mask_channels: got {self.mask_channels!r}, wanted 'input' or 1")
        if not is_integer(self.kernel_size, 1) or self.kernel_size % 2 == 0:
            raise ValueError(f"attention kernel_size: got {self.kernel_size!r}, wanted an odd size of at least 1")
        if self.network is not None and not isinstance(self.network, nn.Module):
            raise TypeError(f"network: got {type(self.network).__name__}, wanted a torch.nn.Module or None")


class FlowMasks(nn.Module):
    """The mask networks of one transition.

    Args:
        attention: what to build.
        kernel_sizes: (kh, kw) of every branch of the transition.
        in_channels: C, the transition's input channels.

    Raises:
        ValueError: a kernel size in ``attention.branches`` belongs to no branch.
    """

    def __init__(self, attention: FlowAttention, kernel_sizes: Sequence[tuple[int, int]], in_channels: int, **factory):
        super().__init__()
        wanted = kernel_sizes if attention.branches is None else [as_pair(k) for k in attention.branches]
        for size in wanted:
            if size not in kernel_sizes:
                raise ValueError(f"attention.branches: got {size}, wanted kernel sizes among {list(kernel_sizes)}")
        self.masked = [size in wanted for size in kernel_sizes]
        self.mask_channels = in_channels if attention.mask_channels == "input" else 1
        self.flow_channels = attention.flow_channels
        self.is_ours = attention.network is None
        if self.is_ours:
            outputs = sum(self.masked) * self.mask_channels
            size = attention.kernel_size
            self.network = nn.Conv2d(self.flow_channels, outputs, size, padding=size // 2, **factory)
        else:
            self.network = copy.deepcopy(attention.network).to(**factory)
        self.halo: Halo | None = None  # where other ranks have the rows above and below

    def forward(self, flow: Tensor) -> list[Tensor | None]:
        """``flow`` [N, flow_channels, H, W] -> for each branch its mask [N, C or 1, H, W] in (0, 1), or None.

        Raises:
            ValueError: the network's output has another shape.
        """
        if self.halo is None:
            logits = self.network(flow)
        else:  # the network is one convolution: sharding saw to that
            logits = self.halo(self.network, self.network.dilation[0] * (self.network.kernel_size[0] // 2), flow)
        shape = (flow.shape[0], sum(self.masked) * self.mask_channels, *flow.shape[2:])
        if tuple(logits.shape) != shape:
            raise ValueError(f"attention.network: got output shape {list(logits.shape)}, wanted {list(shape)}")
        masks = iter(torch.sigmoid(logits).split(self.mask_channels, dim=1))
        return [next(masks) if masked else None for masked in self.masked]
