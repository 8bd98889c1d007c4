"""Layers on images that are shared out by rows between processes, for images too large for one GPU."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from .cell import MKConvLSTMCell
from .halo import Halo
from .layer import MKConvLSTM


def shard_height(layer: MKConvLSTM, group: dist.ProcessGroup | None = None) -> MKConvLSTM:
    """Have ``layer`` compute on images of which each rank of ``group`` holds some rows.

    From then on x, flow, states and outputs are [..., H_rank, W], this rank's rows, which lie below those of the rank
    before; H_rank may differ. The input's convolutions exchange rows once for all T, the hidden ones in every step, and
    backward their gradients: as many rows as the kernels reach, (K - 1) / 2 for one of K x K. The weights are whole on
    every rank, and so is what a rank computes of their gradients: its rows' share, to be added up over the ranks, as
    by ``DistributedDataParallel`` (which divides by their number too).

    All ranks make the same calls, forward and backward, in the same order. The recurrence runs on ``reference``.

    Args:
        layer: changed in place; an :class:`MKConvLSTM` or :class:`MKConvLSTMCell`.
        group: None for all processes.

    Returns:
        ``layer``.

    Raises:
        TypeError: it is no such layer.
        ValueError: what it computes needs whole images: group or layer norm, a norm of the gates, peepholes by pixel, a
            mask network that is no plain ``nn.Conv2d``. A call raises it for batch norm in training, and where a rank
            has fewer rows than the kernels reach.
        RuntimeError, ValueError: torch's own, where there is no process group, or this process is not in ``group``.
    """
    if not isinstance(layer, (MKConvLSTM, MKConvLSTMCell)):
        raise TypeError(f"layer: got {type(layer).__name__}, wanted an MKConvLSTM or MKConvLSTMCell")
    cells = layer.cells if isinstance(layer, MKConvLSTM) else [layer]
    for cell in cells:
        if reason := needs_whole_images(cell):
            raise ValueError(f"layer: got one with {reason}, which needs whole images, wanted one without")
    if dist.get_rank(group) < 0:
        raise ValueError("group: got one without this process, wanted one that it is in")
    halo = Halo(group)
    for cell in cells:
        for part in (cell.input_transition, cell.hidden_transition, cell.attention):
            if part is not None:
                part.halo = halo
    return layer


def needs_whole_images(cell: MKConvLSTMCell) -> str | None:
    """What of ``cell`` cannot be computed from some rows and their neighbours, in words; None if nothing."""
    kinds = (cell.input_transition.norm_kind, cell.hidden_transition.norm_kind)
    if norms := [k for k in kinds if k not in (None, "batch")]:
        return f"{norms[0].removesuffix('_pixel')} norm"
    if cell.gate_norm is not None:
        return "a norm of the gates"
    if cell.peephole is not None and cell.peephole.shape[2:].numel() > 1:
        return "a peephole for each pixel"
    if cell.attention is not None:
        network = cell.attention.network
        if not isinstance(network, nn.Conv2d) or network.padding_mode != "zeros":
            return "a mask network that is no plain convolution"
    return None
