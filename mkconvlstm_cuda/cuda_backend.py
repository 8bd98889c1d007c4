"""The ``cuda`` backend: the fused recurrence where a family of kernels has it, else ``aten``'s loop with fused gates.

``sm90``: half types on Hopper. ``sm80``: half types, and float32 where torch's switches allow TF32, on any GPU from
sm_80 on. ``simt``: float64, and float32 where the switches demand full precision.
"""

from __future__ import annotations

from torch import Tensor

from . import aten, compiled, library, simt, sm80, sm90, triton_backend
from .convolution import TransitionWeights
from .interleaving import split_gates


def available() -> str | None:
    """None where the CUDA library is loaded, else why it is not."""
    return library.load("cuda")


def supports(problem) -> str | None:
    """None where the kernels compute ``problem`` (:class:`dispatch.Problem`), else why not."""
    if problem.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, and the input is on {problem.device.type}"
    if reason := library.refusal(problem.device):
        return reason
    if problem.live_parts:
        return f"its hidden transition has {problem.live_parts}, which only 'reference' computes"
    return None


def fastest(problem) -> bool:
    """Whether a family is faster for ``problem`` than Triton's kernels."""
    return sm90.fastest(problem) or simt.fastest(problem)


def forward(
    z: list[Tensor],
    hidden: TransitionWeights,
    h_0: Tensor | None,
    c_0: Tensor | None,
    peephole: Tensor | None,
    output_peephole: str,
    keep: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`aten.forward`; ``bias`` [4F] is added to z."""
    for kernels in sm90.KERNELS:
        if sm90.refusal(z, hidden, peephole, "forward", kernels) is None:
            return sm90.forward(z, hidden, h_0, c_0, keep, bias, kernels)
    for family in (sm80, simt):
        if family.refusal(z, hidden) is None:
            return family.forward(z, hidden, h_0, c_0, peephole, output_peephole, keep, bias)
    if bias is not None:
        for part, b in zip(z, split_gates(bias.to(z[0].dtype), hidden.parts), strict=True):
            part += b[:, None, None]
    return aten.forward(z, hidden, h_0, c_0, peephole, output_peephole, keep, gate_step=compiled.gate_step)


def backward(gates: list[Tensor], h: Tensor, c: Tensor, hidden: TransitionWeights, h_0, c_0, peephole, *args):
    """See :func:`aten.backward`; one more argument says whether the gradient of b is wanted, None if kernels sum none.

    Triton's kernels run where Hopper's only ran forward, or are slower.
    """
    _, dh, dc_n, lengths, needs_bias = args
    if sm90.refusal(gates, hidden, peephole, "backward", "resident") is None:
        return sm90.backward(gates, c, hidden, h_0, c_0, dh, dc_n, lengths, needs_bias, "resident")
    serves = [sm90.refusal(gates, hidden, peephole, direction) is None for direction in ("backward", "forward")]
    has_triton = any(serves) and triton_backend.available() is None
    batch, _, _, *image = gates[0].shape
    if serves[0] and (not has_triton or sm90.fills(batch, *image, sum(hidden.sizes), gates[0].device)):
        return sm90.backward(gates, c, hidden, h_0, c_0, dh, dc_n, lengths, needs_bias)
    args = (gates, h, c, hidden, h_0, c_0, peephole, *args)
    if has_triton:
        return triton_backend.backward(*args)
    for family in (sm80, simt):
        if family.refusal(gates, hidden) is None:
            return (*family.backward(*args[:-1]), None)
    return (*aten.backward(*args[:-1], gate_step_backward=compiled.gate_step_backward), None)
