"""The recurrence on Hopper: both kinds of kernels, each on what it serves."""

import pytest
import torch
from hopper import TOLERANCE, equations, gradients, make, make_backward, sides

from mkconvlstm_cuda import layout, library, sm90
from mkconvlstm_cuda.convolution import images_of
from mkconvlstm_cuda.interleaving import join_gates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.skipif(library.load("cuda") is not None, reason=f"no CUDA library: {library.load('cuda')}"),
]

# batch, steps, (height, width), (kernel size or height and width, channels) of each branch
PROBLEMS = {
    "paper_mk35": (10, 3, (14, 14), [(3, 128), (5, 128)]),
    "paper_5": (10, 3, (14, 14), [(5, 256)]),
    "ucf_mk35": (10, 3, (14, 14), [(3, 256), (5, 256)]),  # boxes do not all fit
    "mnist_57": (16, 3, (16, 16), [(5, 64), (7, 64)]),
    "radar_35": (4, 3, (96, 96), [(3, 32), (5, 32)]),  # several tiles a block, both groups in one box
    "rotating_short": (12, 9, (32, 32), [(3, 64)]),  # tiles go to other blocks at each step
    "rotating_boxes": (10, 5, (33, 32), [(3, 128)]),  # and the last one has no pixel
    "rotating_patches": (30, 3, (3, 150), [(5, 72)]),
    "rotating_one_box": (12, 3, (1, 365), [(11, 72)]),  # at a time
    "one_box_of_rows": (19, 3, (1, 101), [(5, 24)]),
    "one_box_of_patches": (15, 3, (1, 98), [(3, 8), (11, 8)]),
    "odd_sizes": (3, 4, (9, 7), [(3, 24), (5, 40)]),
    "larger_kernel_first": (2, 3, (13, 21), [(5, 16), (3, 8)]),
    "one_tile": (1, 3, (5, 5), [(3, 8)]),
    "one_step": (2, 1, (6, 6), [(3, 32)]),
    "one_pixel": (1, 2, (1, 1), [(3, 16), (5, 16)]),
    "small_35": (1, 6, (32, 32), [(3, 32), (5, 32)]),
    "small_batch": (8, 5, (13, 16), [(5, 16), (3, 8)]),
    "wide": (1, 4, (3, 150), [(5, 24)]),
    "wide_boxes": (1, 4, (3, 150), [(5, 72)]),
    "patches": (2, 3, (11, 700), [(3, 16), (5, 40)]),  # lines too long for tiles of rows
    "patches_odd": (1, 4, (7, 1030), [(5, 24)]),  # and the last tile has no pixel
    "patches_rotating": (1, 4, (90, 410), [(3, 8), (5, 8)]),
    "short_tiles": (4, 4, (90, 89), [((1, 3), 8)]),  # two a block, the last one of the batch without a pixel
    "pointwise": (2, 4, (33, 32), [(1, 192)]),
    "few_products": (2, 4, (33, 32), [(1, 128)]),  # fewer than the ring of weights holds
    "one_product": (2, 4, (33, 32), [(1, 64)]),
    "crossed_kernels": (2, 4, (10, 11), [((3, 5), 16), ((7, 3), 24)]),
    "channels_in_two_boxes": (1, 4, (12, 9), [(3, 56), (3, 64)]),
    "half_chunks": (2, 3, (13, 12), [(3, 72), (5, 136)]),  # of either branch, in tiles of both
    "half_chunks_of_a_tile": (2, 1, (20, 33), [(3, 24), (5, 104)]),
}


def served(direction):
    """(kernels, problem) of all problems, and of the two kinds of kernels those that serve them."""
    for name, (batch, _, size, kernels) in PROBLEMS.items():
        branches = tuple((*sides(kernel), channels) for kernel, channels in kernels)
        for kind in ("streamed", "resident"):
            if sm90.plan_refusal(direction, batch, *size, branches, 132, 232448, kind) is None:
                yield kind, name


def poison(*shapes):
    """Leave NaN where the next tensors of these sizes will be allocated."""
    for elements, dtype in shapes:
        torch.full((elements,), float("nan"), dtype=dtype, device="cuda")


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("state", ["h_0 and c_0", "h_0", "c_0", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kernels", "problem"), list(served("forward")))
def test_forward(kernels, problem, dtype, state):
    z, weights, h_0, c_0 = make(PROBLEMS[problem], dtype, state != "none", "cuda")
    h_0, c_0 = (t if name in state else None for name, t in (("h_0", h_0), ("c_0", c_0)))
    want_h, want_c, want_gates = equations(z, weights, h_0, c_0)
    results = []
    for keep in (True, True, False):
        parts = [part.clone(memory_format=torch.preserve_format) for part in z]
        poison((want_h.numel(), dtype), (want_c.numel(), torch.float32), (2 * want_h.numel(), dtype))
        results.append((*sm90.forward(parts, weights, h_0, c_0, keep, None, kernels), parts))
    h, c, gates = results[0]
    assert h.is_contiguous()
    for got, want in [(h, want_h), (c, want_c), *zip(gates, want_gates, strict=True)]:
        assert (got.float() - want).norm() <= TOLERANCE[dtype] * want.norm()
    for other_h, other_c, _ in results[1:]:  # the same bits each time, and without the gates
        assert torch.equal(h, other_h)
        assert torch.equal(c[:, -other_c.shape[1] :], other_c)


@pytest.mark.parametrize(
    "how", ["state", "no state", "no gradient of c", "lengths", "recomputed", "recomputed, no state"]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kernels", "problem"), list(served("backward")))
def test_backward(kernels, problem, dtype, how):
    z, weights, h_0, c_0 = make(PROBLEMS[problem], dtype, not how.endswith("no state"), "cuda")
    gates, c, dh, dc_n, lengths = make_backward(z, sum(weights.sizes), dtype, how)
    want = gradients(gates, c, weights, h_0, c_0, dh, dc_n, lengths)
    results = []
    for _ in range(2):
        dz = [part.clone(memory_format=torch.preserve_format) for part in gates]
        poison((c[:, 0].numel(), torch.float32), (c[:, 0].numel(), dtype), (1 << 22, torch.float32))
        dh_0, dc_0, dbias = sm90.backward(dz, c, weights, h_0, c_0, dh, dc_n, lengths, True, kernels)
        if dbias is None:
            assert kernels == "streamed"
            dbias = join_gates([layout.channel_sums(images) for images in images_of(dz)])
        results.append([*dz, dc_0, dbias, *([] if dh_0 is None else [dh_0])])
    assert (h_0 is None) == (dh_0 is None)
    for got, again, wanted in zip(*results, want, strict=True):
        assert (got.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
        assert torch.equal(got, again)
    dz = [part.clone(memory_format=torch.preserve_format) for part in gates]
    assert sm90.backward(dz, c, weights, h_0, c_0, dh, dc_n, lengths, False, kernels)[2] is None
    assert all(map(torch.equal, dz, results[0]))
