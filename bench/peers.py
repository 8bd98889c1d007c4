"""What people write today: the layers that ours are timed against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mkconvlstm_cuda import MKConvLSTM


class UsualLoop(nn.Module):
    """The usual ConvLSTM, as a Python loop: ``cat[x_t, h] -> one convolution a kernel size -> gates``, NCHW.

    Its weights are copied from ``layer``, a plain MKConvLSTM of one layer, so that both compute the same.
    """

    def __init__(self, layer: MKConvLSTM):
        super().__init__()
        cell = layer.cells[0]
        self.hidden_channels = cell.hidden_channels
        biases = split_gates(cell.bias.detach(), [b.conv.out_channels // 4 for b in cell.input_transition.branches])
        self.convs = nn.ModuleList()
        for x_branch, h_branch, bias in zip(
            cell.input_transition.branches, cell.hidden_transition.branches, biases, strict=True
        ):
            weight = torch.cat([x_branch.conv.weight.detach(), h_branch.conv.weight.detach()], dim=1)
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.convs.append(conv)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, C, H, W] -> h [B, T, F, H, W]."""
        h = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[3:])
        c = torch.zeros_like(h)
        outputs = []
        for x_t in x.unbind(1):
            combined = torch.cat([x_t, h], dim=1)
            gates = [conv(combined).chunk(4, dim=1) for conv in self.convs]
            i, f, g, o = (torch.cat(parts, dim=1) for parts in zip(*gates, strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class BatchedInputLoop(UsualLoop):
    """The loop of somebody who has profiled it: input convolutions once over all T, channels-last throughout."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, C, H, W] -> h [B, T, F, H, W]."""
        channels, layout = x.shape[2], torch.channels_last
        images = x.flatten(0, 1).contiguous(memory_format=layout)
        options = {"padding": "same"}
        from_input = [
            nn.functional.conv2d(
                images, conv.weight[:, :channels].contiguous(memory_format=layout), conv.bias, **options
            )
            .unflatten(0, x.shape[:2])
            .unbind(1)
            for conv in self.convs
        ]
        recurrent = [conv.weight[:, channels:].contiguous(memory_format=layout) for conv in self.convs]
        h = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[3:]).contiguous(memory_format=layout)
        c = torch.zeros_like(h)
        outputs = []
        for t in range(x.shape[1]):
            gates = [
                (z[t] + nn.functional.conv2d(h, weight, **options)).chunk(4, dim=1)
                for z, weight in zip(from_input, recurrent, strict=True)
            ]
            i, f, g, o = (torch.cat(parts, dim=1) for parts in zip(*gates, strict=True))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


def split_gates(bias: Tensor, sizes: list[int]) -> list[Tensor]:
    """A gate-major bias [4F] as one gate-major [4*F_r] for each branch."""
    return [part.flatten() for part in bias.view(4, -1).split(sizes, dim=1)]
