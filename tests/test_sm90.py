"""The recurrence on Hopper: forward against the equations in float32, on hidden states rounded as the kernel rounds
them; backward against ``aten`` in float64.
"""

import pytest
import torch
from torch.nn import functional as F

from mkconvlstm_cuda import aten, library, sm90
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.skipif(library.load("cuda") is not None, reason=f"no CUDA library: {library.load('cuda')}"),
]

# batch, steps, (height, width), (kernel size, channels) of each branch
PROBLEMS = {
    "paper_mk35": (10, 3, (14, 14), [(3, 128), (5, 128)]),
    "paper_5": (10, 3, (14, 14), [(5, 256)]),
    "ucf_mk35": (10, 3, (14, 14), [(3, 256), (5, 256)]),  # boxes do not all fit
    "mnist_57": (16, 3, (16, 16), [(5, 64), (7, 64)]),
    "radar_35": (4, 3, (96, 96), [(3, 32), (5, 32)]),  # several tiles a block, both groups in one box
    "odd_sizes": (3, 4, (9, 7), [(3, 24), (5, 40)]),
    "larger_kernel_first": (2, 3, (13, 21), [(5, 16), (3, 8)]),
    "one_tile": (1, 3, (5, 5), [(3, 8)]),
    "one_step": (2, 1, (6, 6), [(3, 32)]),
    "one_pixel": (1, 2, (1, 1), [(3, 16), (5, 16)]),
}
# A gate is rounded once, where it is stored; h and c come from what is not yet rounded. Backward multiplies gradients
# that are rounded as they are stored.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def make(problem, dtype, state):
    batch, steps, size, kernels = PROBLEMS[problem]
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    hidden = sum(channels for _, channels in kernels)
    z = [randn(steps, batch, *size, 4 * n).to(dtype).permute(1, 0, 4, 2, 3) for _, n in kernels]
    branches = tuple(
        BranchWeights(
            (randn(4 * n, hidden, k, k) / (hidden * k * k) ** 0.5).to(dtype), randn(4 * n).to(dtype) if state else None
        )
        for k, n in kernels
    )
    h_0 = torch.tanh(randn(batch, hidden, *size)).to(dtype) if state else None
    c_0 = randn(batch, hidden, *size) if state else None
    return z, TransitionWeights(branches), h_0, c_0


def equations(z, weights, h_0, c_0):
    """h, c [B, T, F, H, W] and each branch's gates [B, T, 4*F_r, H, W], in float32."""
    batch, steps, _, height, width = z[0].shape
    zeros = torch.zeros((batch, sum(weights.sizes), height, width), device="cuda")
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


def poison(*shapes):
    """Leave NaN where the next tensors of these sizes will be allocated."""
    for elements, dtype in shapes:
        torch.full((elements,), float("nan"), dtype=dtype, device="cuda")


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward(problem, dtype, state):
    z, weights, h_0, c_0 = make(problem, dtype, state)
    want_h, want_c, want_gates = equations(z, weights, h_0, c_0)
    results = []
    for keep in (True, True, False):
        parts = [part.clone(memory_format=torch.preserve_format) for part in z]
        poison((want_h.numel(), dtype), (want_c.numel(), torch.float32), (2 * want_h.numel(), dtype))
        results.append((*sm90.forward(parts, weights, h_0, c_0, keep, None), parts))
    h, c, gates = results[0]
    assert h.is_contiguous()
    for got, want in [(h, want_h), (c, want_c), *zip(gates, want_gates, strict=True)]:
        assert (got.float() - want).norm() <= TOLERANCE[dtype] * want.norm()
    for other_h, other_c, _ in results[1:]:  # the same bits each time, and without the gates
        assert torch.equal(h, other_h)
        assert torch.equal(c[:, -other_c.shape[1] :], other_c)


def gradients(gates, c, weights, h_0, c_0, dh, dc_n, lengths):
    """dz of each branch, dc_0 and dh_0, in float64."""
    h_0, c_0, dh, dc_n, c = (None if t is None else t.double() for t in (h_0, c_0, dh, dc_n, c))
    dz = [part.double() for part in gates]
    weights = weights.to(torch.float64)
    dh_0, dc_0 = aten.backward(dz, torch.zeros_like(c), c, weights, h_0, c_0, None, "previous", dh, dc_n, lengths)
    return [*dz, dc_0, *([] if dh_0 is None else [dh_0])]


def strided(x):
    """``x`` [B, T, C, H, W] with channels innermost in memory."""
    return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("how", ["state", "no state", "lengths"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_backward(problem, dtype, how):
    z, weights, h_0, c_0 = make(problem, dtype, how != "no state")
    generator = torch.Generator("cuda").manual_seed(1)
    batch, steps, _, *size = z[0].shape
    shape = (batch, steps, sum(weights.sizes), *size)
    c, dh = (torch.randn(shape, generator=generator, device="cuda") for _ in range(2))
    dc_n = torch.randn((batch, *shape[2:]), generator=generator, device="cuda")
    c, dh = c.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3), dh.to(dtype)
    lengths = None
    if how == "lengths":  # and what recomputation hands over
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator, device="cuda")
        c, dh = c.to(dtype), strided(dh)
    elif how == "no state":
        dh = None
    gates = []
    for part in z:
        i, f, g, o = part.chunk(4, dim=2)
        gates.append(part.copy_(torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=2)))
    want = gradients(gates, c, weights, h_0, c_0, dh, dc_n, lengths)
    results = []
    for _ in range(2):
        dz = [part.clone(memory_format=torch.preserve_format) for part in gates]
        poison((dc_n.numel(), torch.float32), (dc_n.numel(), dtype), (1 << 22, torch.float32))
        dh_0, dc_0 = sm90.backward(dz, c, weights, h_0, c_0, dh, dc_n, lengths)
        results.append([*dz, dc_0, *([] if dh_0 is None else [dh_0])])
    assert (h_0 is None) == (dh_0 is None)
    for got, again, wanted in zip(*results, want, strict=True):
        assert (got.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
        assert torch.equal(got, again)
