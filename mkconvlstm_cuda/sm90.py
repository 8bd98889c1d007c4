"""The recurrence on Hopper GPUs: hand-written CUDA kernels, one launch over all T.

There are two kinds. "streamed": blocks read their weights anew for every tile and step. "resident": where the hidden
state is so small that the multiprocessors hold all weights in shared memory, they keep them there for all steps. A step
of small states takes half the time of Triton's then, and less than half of that of streamed weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout
from .convolution import TransitionWeights, whole_bias

KERNELS = ("resident", "streamed")  # the faster ones first
TILE_PIXELS = 128
RESIDENT = "resident_"  # in the names of these kernels' plans and operations


def refusal(
    z: Sequence[Tensor],
    hidden: TransitionWeights,
    peephole: Tensor | None,
    direction: str = "forward",
    kernels: str = "streamed",
) -> str | None:
    """None where these kernels compute this recurrence in that direction, "forward" or "backward", else why not."""
    part = z[0]
    if part.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, and the input is {part.dtype}"
    if peephole is not None:
        return "it has no peepholes"
    if hidden.mix is not None or any(b.bottleneck is not None for b in hidden.branches):
        return "its hidden transition has a 1x1 mix or bottlenecks"
    if any(tuple(b.dilation) != (1, 1) for b in hidden.branches):
        return "its hidden transition is dilated"
    if part.numel() // part.shape[2] * sum(hidden.sizes) >= 2**31:
        return "h would have 2^31 elements or more"
    branches = tuple((*b.weight.shape[2:], b.weight.shape[0] // 4) for b in hidden.branches)
    limits = device_limits(part.device)
    if isinstance(limits, str):
        return limits
    return plan_refusal(direction, part.shape[0], *part.shape[3:], branches, *limits, kernels)


def fastest(problem) -> bool:
    """Whether kernels here compute ``problem`` (:class:`dispatch.Problem`) faster than Triton's.

    Resident ones are wherever they serve; streamed ones where they have enough tiles for all of the GPU.
    """
    if problem.dtype not in (torch.float16, torch.bfloat16) or not problem.plain or problem.batch == 0:
        return False
    limits = device_limits(problem.device)
    if isinstance(limits, str):
        return False
    shape = (problem.batch, problem.height, problem.width)
    if plan_refusal("forward", *shape, problem.kernels, *limits, "resident") is None:
        return True
    many = fills(*shape, problem.hidden_channels, problem.device)
    return many and plan_refusal("forward", *shape, problem.kernels, *limits) is None


def fills(batch: int, height: int, width: int, channels: int, device: torch.device) -> bool:
    """Whether streamed kernels run on ``device``, and a step has a tile for each of its multiprocessors, forward.

    Measured on an H100, a step of 256 tiles or more takes two thirds of the time that Triton's kernels take, forward,
    and three quarters, backward; one of 32 takes half as long again, and an eighth more.
    """
    limits = device_limits(device)
    return not isinstance(limits, str) and -(-batch * height * width // TILE_PIXELS) * -(-channels // 16) >= limits[0]


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int] | str:
    """Multiprocessors, and bytes of shared memory that a block may have; or why the kernels do not run there."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        return "it runs on Hopper GPUs"
    if not hasattr(torch.ops.mkconvlstm, "sm90_forward"):
        return "the CUDA library was built without code for sm_90a"
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@functools.lru_cache(maxsize=1024)
def plan_refusal(
    direction: str,
    batch: int,
    height: int,
    width: int,
    branches: tuple[tuple[int, int, int], ...],
    multiprocessors: int,
    shared_memory: int,
    kernels: str = "streamed",
) -> str | None:
    """The same as far as sizes decide it; ``branches``: kernel height, kernel width, hidden channels of each."""
    from . import _C

    limits = {"multiprocessors": multiprocessors, "shared_memory": shared_memory}
    try:
        plan = getattr(_C, "plan_" + RESIDENT * (kernels == "resident") + direction)
        plan(batch=batch, height=height, width=width, branches=list(branches), **limits)
    except ValueError as error:
        return str(error)
    return None


def operation(direction: str, kernels: str):
    """The CUDA operation of these kernels."""
    return getattr(torch.ops.mkconvlstm, "sm90_" + RESIDENT * (kernels == "resident") + direction)


def by_time(x: Tensor | None) -> Tensor | None:
    """``x`` [B, T, C, H, W] as it lies in memory, [T, B, H, W, C]; [B, C, H, W] as [B, H, W, C]."""
    if x is None:
        return None
    return (x.permute(1, 0, 3, 4, 2) if x.dim() == 5 else x.permute(0, 2, 3, 1)).contiguous()


def in_place(x: Tensor) -> Tensor:
    """``x`` [B, T, C, H, W], whose memory is [T, B, H, W, C], in that order."""
    view = x.permute(1, 0, 3, 4, 2)
    if not view.is_contiguous():
        raise ValueError(f"wanted the memory of [T, B, H, W, C], got strides {view.stride()} of shape {view.shape}")
    return view


def aligned(x: Tensor) -> Tensor:
    """``x`` itself, or a copy of it, that begins at a multiple of 16 bytes."""
    return x.clone() if x.data_ptr() % 16 else x


def pair(values: list) -> list:
    return [*values, None] if len(values) == 1 else values


def forward(
    z: list[Tensor],
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    keep: bool,
    bias: Tensor | None,
    kernels: str = "streamed",
) -> tuple[Tensor, Tensor]:
    """All T steps.

    Args:
        z: for each branch r the pre-activations [B, T, 4*F_r, H, W] whose memory is [T, B, H, W, 4*F_r], gate-major;
            the transition's biases are added to them. Overwritten: with ``keep`` by the activated gates.
        hidden: one or two branches; "streamed", the kernel of one inside that of the other; in z's dtype.
        h_0: [B, F, H, W] in z's dtype, or None for zeros.
        c_0: [B, F, H, W] float32, or None for zeros.
        keep: keep gates and all cell states for backward.
        bias: [4F], gate-major, added to z too; or None.
        kernels: "streamed" or "resident", whose :func:`refusal` is None.

    Returns:
        h [B, T, F, H, W] contiguous; c [B, T, F, H, W] float32, with ``keep``, else the last step's
        [B, 1, F, H, W]; the memory of c is [T, B, H, W, F].
    """
    batch, steps, _, height, width = z[0].shape
    channels = sum(hidden.sizes)
    h = z[0].new_empty((batch, steps, channels, height, width))
    c = z[0].new_empty((steps if keep else 1, batch, height, width, channels), dtype=torch.float32)
    bias = whole_bias(hidden, bias)
    operation("forward", kernels)(
        *pair([in_place(part) for part in z]),
        *pair([aligned(b.weight.contiguous()) for b in hidden.branches]),
        None if bias is None else aligned(bias.float()),
        h,
        c,
        by_time(h_0),
        by_time(c_0),
        keep,
    )
    return h, c.permute(1, 0, 4, 2, 3)


def backward(
    gates: list[Tensor],
    c: Tensor,
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    dh: Tensor | None,
    dc_n: Tensor | None,
    lengths: Tensor | None,
    needs_bias: bool,
    kernels: str = "streamed",
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Backward through all T steps.

    Args:
        gates: for each branch r the activated gates, of shape and memory as :func:`forward` left them; overwritten by
            the gradients of the pre-activations.
        c: [B, T, F, H, W], float32 or of the gates' dtype, in the memory of [T, B, H, W, F].
        hidden: one or two branches, in the gates' dtype.
        h_0: None where its gradient is not wanted.
        c_0: [B, F, H, W] float32, or None for zeros.
        dh: [B, T, F, H, W] in the gates' dtype, of any strides, from outside the recurrence; or None for zeros.
        dc_n: [B, F, H, W], the gradient of the last cell state, that after ``lengths`` [B] steps where those are given;
            or None for zeros.
        needs_bias: whether the gradient of the biases is wanted.
        kernels: as for :func:`forward`.

    Returns:
        dh_0 [B, F, H, W] in the gates' dtype, or None without h_0; dc_0 [B, F, H, W] float32; with ``needs_bias`` and
        "resident" the sum of all gradients of pre-activations, [4F] float32, gate-major, else None. Streamed kernels
        would take longer for it than another one does, which reads the gradients once more.
    """
    batch, _, _, height, width = gates[0].shape
    dc = c.new_empty((batch, height, width, sum(hidden.sizes)), dtype=torch.float32)
    dh_0 = None if h_0 is None else torch.empty_like(dc, dtype=gates[0].dtype)
    sums = ()
    if kernels == "resident":
        sums = (dc.new_empty((batch * height * width, 4 * dc.shape[-1])) if needs_bias else None,)
    operation("backward", kernels)(
        *pair([in_place(part) for part in gates]),
        *pair([aligned(b.weight.contiguous()) for b in hidden.branches]),
        in_place(c),
        by_time(c_0),
        None if dh is None else dh.flatten(3),  # a copy only where rows of an image are apart
        None if dc_n is None else by_time(dc_n.float()),
        None if lengths is None else aligned(lengths.contiguous()),
        dh_0,
        dc,
        *sums,
    )
    dh_0 = None if dh_0 is None else dh_0.permute(0, 3, 1, 2)
    return dh_0, dc.permute(0, 3, 1, 2), layout.row_sums(*sums) if needs_bias and sums else None
