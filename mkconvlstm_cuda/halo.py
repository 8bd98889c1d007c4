"""Rows of an image that other processes hold: exchanged between neighbours, differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class Halo:
    """Gives a computation on this rank's rows of images as many rows of its neighbours as it sees.

    Args:
        group: its rank k holds the rows below those of rank k - 1, of any number; None for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    def __call__(self, function: Callable[..., Tensor], reach: int, *images: Tensor | None) -> Tensor:
        """``function(*images)``, every one [N, C, H, W] with this rank's rows, as if the images were whole.

        Each output row depends on the input's from ``reach`` above to ``reach`` below, and ``function`` keeps H
        ("same" padding). None among the ``images`` stays None. A collective call: all ranks make it in the same order,
        and backward through it too.

        Raises:
            ValueError: an image has fewer than ``reach`` rows here, and there are other ranks.
        """
        above, below = (reach * there for there in neighbours(self.group))
        if not above and not below:
            return function(*images)
        output = function(*(None if x is None else Extend.apply(x, reach, self.group) for x in images))
        return output.narrow(2, above, output.shape[2] - above - below)


def neighbours(group: dist.ProcessGroup | None) -> tuple[bool, bool]:
    """Whether a rank of ``group`` holds the rows above this one's, and whether one holds those below."""
    rank = dist.get_rank(group)
    return rank > 0, rank + 1 < dist.get_world_size(group)


def swap(upper: Tensor, lower: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor | None, Tensor | None]:
    """Send ``upper`` to the rank above and ``lower`` to the one below, both [N, C, rows, W].

    Returns what they send, in the same shape and channels-last; None where there is no such rank.
    """
    rank = dist.get_rank(group)
    transfers, received = [], []
    for peer, there, rows in zip((rank - 1, rank + 1), neighbours(group), (upper, lower), strict=True):
        if not there:
            received.append(None)
            continue
        sent = rows.permute(0, 2, 3, 1).contiguous()
        got = torch.empty_like(sent)
        if sent.numel():
            transfers.append(dist.P2POp(dist.isend, sent, group=group, group_peer=peer))
            transfers.append(dist.P2POp(dist.irecv, got, group=group, group_peer=peer))
        received.append(got.permute(0, 3, 1, 2))
    if transfers:
        for transfer in dist.batch_isend_irecv(transfers):
            transfer.wait()
    return tuple(received)


class Extend(Function):
    """Images [N, C, H, W] with ``rows`` rows of the rank above and of the one below, where there are such ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
        if x.shape[2] < rows:
            raise ValueError(
                f"x: got {x.shape[2]} rows of the images on rank {dist.get_rank(group)}, wanted at least {rows}, "
                "as many as the kernels reach up and down"
            )
        ctx.rows, ctx.group = rows, group
        above, below = swap(x[:, :, :rows], x[:, :, -rows:], group)
        return torch.cat([t for t in (above, x, below) if t is not None], dim=2)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return Fold.apply(dy, ctx.rows, ctx.group), None, None


class Fold(Function):
    """The adjoint of :class:`Extend`: each rank's own rows, plus what its neighbours have in their copies of them."""

    @staticmethod
    def forward(ctx, dy: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rows, ctx.group = rows, group
        above, below = swap(dy[:, :, :rows], dy[:, :, -rows:], group)
        first, last = (0 if t is None else rows for t in (above, below))
        dx = dy[:, :, first : dy.shape[2] - last].clone()
        if above is not None:
            dx[:, :, :rows] += above
        if below is not None:
            dx[:, :, -rows:] += below
        return dx

    @staticmethod
    def backward(ctx, ddx: Tensor) -> tuple[Tensor, None, None]:
        return Extend.apply(ddx, ctx.rows, ctx.group), None, None
