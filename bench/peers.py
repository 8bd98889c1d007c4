"""What people write today: the layers that ours are timed against."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mkconvlstm_cuda import MKConvLSTM


class UsualLoop(nn.Module):
    """The usual ConvLSTM, as a Python loop: ``cat[x_t, h] -> one convolution a kernel size -> gates``, NCHW.

    Its weights are copied from ``layer``, a plain MKConvLSTM of one layer, so that both compute the same. With a 1x1
    mix, of which x and h have each their own, they are convolved apart.
    """

    def __init__(self, layer: MKConvLSTM):
        super().__init__()
        cell = layer.cells[0]
        self.hidden_channels = cell.hidden_channels
        transitions = cell.input_transition, cell.hidden_transition
        self.mixes = nn.ModuleList(copy.deepcopy(t.mix) for t in transitions if t.mix is not None)
        biases = split_gates(cell.bias.detach(), [b.conv.out_channels // 4 for b in cell.input_transition.branches])
        if self.mixes:
            self.mixes[0].bias = nn.Parameter(cell.bias.detach().clone())
            biases = [None] * len(biases)
        self.convs = nn.ModuleList()
        for x_branch, h_branch, bias in zip(
            cell.input_transition.branches, cell.hidden_transition.branches, biases, strict=True
        ):
            weight = torch.cat([x_branch.conv.weight.detach(), h_branch.conv.weight.detach()], dim=1)
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=weight.shape[2] // 2)
            conv.weight, conv.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
            self.convs.append(conv)

    def halves(self, channels: int, layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
        """The convolutions' weights for x, of so many ``channels``, and those for h."""
        weights = [conv.weight.tensor_split([channels], dim=1) for conv in self.convs]
        return tuple([half.contiguous(memory_format=layout) for half in side] for side in zip(*weights, strict=True))

    def mixed(self, side: int, parts: list[Tensor]) -> list[Tensor]:
        """``parts`` [N, 4*F_r, H, W] after the mix of x (``side`` 0) or h (1), in one; as they are without a mix."""
        return [self.mixes[side](torch.cat(join_gates(parts), dim=1))] if self.mixes else parts

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, C, H, W] -> h [B, T, F, H, W]."""
        h = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[3:])
        c = torch.zeros_like(h)
        halves = self.halves(x.shape[2], torch.contiguous_format) if self.mixes else ()
        outputs = []
        for x_t in x.unbind(1):
            if self.mixes:
                sides = [
                    self.mixed(side, [nn.functional.conv2d(images, weight, padding="same") for weight in weights])
                    for side, (images, weights) in enumerate(zip((x_t, h), halves, strict=True))
                ]
                parts = [of_x + of_h for of_x, of_h in zip(*sides, strict=True)]
            else:
                combined = torch.cat([x_t, h], dim=1)
                parts = [conv(combined) for conv in self.convs]
            i, f, g, o = join_gates(parts)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class BatchedInputLoop(UsualLoop):
    """The loop of somebody who has profiled it: input convolutions once over all T, channels-last throughout."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, T, C, H, W] -> h [B, T, F, H, W]."""
        layout = torch.channels_last
        images = x.flatten(0, 1).contiguous(memory_format=layout)
        from_x, from_h = self.halves(x.shape[2], layout)
        z = self.mixed(
            0,
            [
                nn.functional.conv2d(images, weight, conv.bias, padding="same")
                for weight, conv in zip(from_x, self.convs, strict=True)
            ],
        )
        z = [part.unflatten(0, x.shape[:2]).unbind(1) for part in z]
        h = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[3:]).contiguous(memory_format=layout)
        c = torch.zeros_like(h)
        outputs = []
        for t in range(x.shape[1]):
            u = self.mixed(1, [nn.functional.conv2d(h, weight, padding="same") for weight in from_h])
            i, f, g, o = join_gates([part[t] + more for part, more in zip(z, u, strict=True)])
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


def join_gates(parts: list[Tensor]) -> list[Tensor]:
    """i, f, g and o [N, F, H, W] from ``parts`` [N, 4*F_r, H, W], each gate-major."""
    return [torch.cat(gates, dim=1) for gates in zip(*(part.chunk(4, dim=1) for part in parts), strict=True)]


def split_gates(bias: Tensor, sizes: list[int]) -> list[Tensor]:
    """A gate-major bias [4F] as one gate-major [4*F_r] for each branch."""
    return [part.flatten() for part in bias.view(4, -1).split(sizes, dim=1)]
