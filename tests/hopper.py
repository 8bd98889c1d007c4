"""What the tests of the recurrence on Hopper share: its operands, and what the kernels should make of them: forward by
the equations in float32, on hidden states rounded as the kernels round them; backward by ``aten`` in float64.
"""

import math

import torch
from torch.nn import functional as F

from mkconvlstm_cuda import aten
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights
from mkconvlstm_cuda.interleaving import join_gates

# A gate is rounded once, where it is stored; h and c come from what is not yet rounded. Backward multiplies gradients
# that are rounded as they are stored.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def sides(kernel):
    """Height and width."""
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def make(problem, dtype, state, device):
    """z, weights, h_0 and c_0 of ``problem``; without ``state`` no biases either."""
    batch, steps, size, kernels = problem
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device)

    hidden = sum(channels for _, channels in kernels)
    z = [randn(steps, batch, *size, 4 * n).to(dtype).permute(1, 0, 4, 2, 3) for _, n in kernels]
    branches = tuple(
        BranchWeights(
            (randn(4 * n, hidden, *sides(k)) / (hidden * math.prod(sides(k))) ** 0.5).to(dtype),
            randn(4 * n).to(dtype) if state else None,
        )
        for k, n in kernels
    )
    h_0 = torch.tanh(randn(batch, hidden, *size)).to(dtype) if state else None
    c_0 = randn(batch, hidden, *size) if state else None
    return z, TransitionWeights(branches), h_0, c_0


def equations(z, weights, h_0, c_0):
    """h, c [B, T, F, H, W] and each branch's gates [B, T, 4*F_r, H, W], in float32."""
    batch, steps, _, height, width = z[0].shape
    zeros = torch.zeros((batch, sum(weights.sizes), height, width), device=z[0].device)
    h, c = (zeros if state is None else state.float() for state in (h_0, c_0))
    hs, cs, all_gates = [], [], []
    for t in range(steps):
        gates = []
        for part, b in zip(z, weights.branches, strict=True):
            bias = None if b.bias is None else b.bias.float()
            a = part[:, t].float() + F.conv2d(h, b.weight.float(), bias, padding=b.padding)
            i, f, g, o = a.chunk(4, dim=1)
            gates.append((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()))
        i, f, g, o = (torch.cat(gate, dim=1) for gate in zip(*gates, strict=True))
        c = f * c + i * g
        h = (o * c.tanh()).to(z[0].dtype).float()
        hs.append(h)
        cs.append(c)
        all_gates.append([torch.cat(part, dim=1) for part in gates])
    return torch.stack(hs, 1), torch.stack(cs, 1), [torch.stack(part, 1) for part in zip(*all_gates, strict=True)]


def gradients(gates, c, weights, h_0, c_0, dh, dc_n, lengths):
    """dz of each branch, dc_0, their sums [4F], gate-major, and dh_0, in float64."""
    h_0, c_0, dh, dc_n, c = (None if t is None else t.double() for t in (h_0, c_0, dh, dc_n, c))
    dz = [part.double() for part in gates]
    weights = weights.to(torch.float64)
    dh_0, dc_0 = aten.backward(dz, torch.zeros_like(c), c, weights, h_0, c_0, None, "previous", dh, dc_n, lengths)
    return [*dz, dc_0, join_gates([part.sum((0, 1, 3, 4)) for part in dz]), *([] if dh_0 is None else [dh_0])]


def strided(x):
    """``x`` [B, T, C, H, W] with channels innermost in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def make_backward(z, hidden_channels, dtype, how):
    """gates, c, dh, dc_n and lengths for ``how``; ``z`` is overwritten.

    "state", "no state" (nor dh), "no gradient of c", "lengths", or "recomputed": lengths, and c in half precision.
    """
    generator = torch.Generator(z[0].device).manual_seed(1)
    batch, steps, _, *size = z[0].shape
    shape = (batch, steps, hidden_channels, *size)
    c, dh = (torch.randn(shape, generator=generator, device=z[0].device) for _ in range(2))
    dc_n = torch.randn((batch, *shape[2:]), generator=generator, device=z[0].device)
    c, dh = c.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3), dh.to(dtype)
    lengths = None
    if how in ("lengths", "recomputed"):
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator, device=z[0].device)
        dh = strided(dh)
    if how.startswith("recomputed"):
        c = c.to(dtype)
    if how.endswith("no state"):
        dh = None
    if how == "no gradient of c":
        dc_n = None
    gates = []
    for part in z:
        i, f, g, o = part.chunk(4, dim=2)
        gates.append(part.copy_(torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=2)))
    return gates, c, dh, dc_n, lengths
