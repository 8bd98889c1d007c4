"""Transitions: what the paper's figures and Table III say of them."""

import pytest
import torch
from torch.nn import functional as F

from mkconvlstm_cuda import Branch, MKConvLSTM, MKConvLSTMCell, Transition, inception_branches, unfolding
from mkconvlstm_cuda.convolution import (
    BranchWeights,
    TransitionWeights,
    branch_forward,
    channels_last,
    input_gradient,
    transition_parts,
)
from mkconvlstm_cuda.cpu_convolution import PackedConvolution, runs_in_onednn
from mkconvlstm_cuda.interleaving import deinterleave, interleave
from mkconvlstm_cuda.transition import parse_branches

# The paper's Table III, 512 input channels: input-to-hidden weights and biases.
TABLE_III = [
    ({3: 256}, None, 4_718_592),
    ({5: 256}, None, 13_107_200),
    ({7: 256}, None, 25_690_112),
    ({3: 128, 5: 128}, None, 8_912_896),
    ({3: 128, 5: 128}, "gate", 9_175_040),
]


@pytest.mark.parametrize(("kernels", "mix", "weights"), TABLE_III)
def test_parameter_counts_of_table_iii(kernels, mix, weights):
    layer = MKConvLSTM(512, kernels, mix=mix, device="meta")
    assert sum(p.numel() for p in layer.cells[0].input_transition.parameters()) == weights
    assert layer.cells[0].bias.numel() == 1024


def test_interleaving_gives_every_gate_a_share_of_every_branch():
    """Fig. 4b: branch 0's channels first within each gate, then branch 1's."""
    a = torch.arange(8.0).view(1, 8, 1, 1)  # 4 gates x 2 channels
    b = 100 + torch.arange(12.0).view(1, 12, 1, 1)  # 4 gates x 3 channels
    z = interleave([a, b])
    wanted = [[0, 1, 100, 101, 102], [2, 3, 103, 104, 105], [4, 5, 106, 107, 108], [6, 7, 109, 110, 111]]
    assert z.view(4, 5).tolist() == wanted
    for part, original in zip(deinterleave(z, [2, 3]), (a, b), strict=True):
        assert torch.equal(part, original)


@pytest.mark.parametrize(("mix", "shape"), [("gate", (20, 5, 1, 1)), ("full", (20, 20, 1, 1))])
def test_mix_is_a_1x1_convolution_of_the_interleaved_branches(mix, shape):
    transition = Transition(3, parse_branches("kernels", {3: 2, 5: 3}), mix, "tanh")
    assert transition.mix.weight.shape == shape
    x = torch.randn(2, 3, 6, 6)
    outputs = [F.conv2d(x, b.conv.weight, padding=b.conv.kernel_size[0] // 2) for b in transition.branches]
    gates = [torch.cat([o.view(2, 4, -1, 6, 6)[:, g] for o in outputs], 1).tanh() for g in range(4)]
    if mix == "full":
        wanted = torch.einsum("oi,nihw->nohw", transition.mix.weight[:, :, 0, 0], torch.cat(gates, 1))
    else:
        weights = transition.mix.weight[:, :, 0, 0].view(4, 5, 5)
        wanted = torch.cat([torch.einsum("oi,nihw->nohw", w, v) for w, v in zip(weights, gates, strict=True)], 1)
    torch.testing.assert_close(transition(x), wanted, rtol=1e-4, atol=1e-5)


def test_inception_is_fig_9b():
    """1x1; 1x1 -> 3x3; 1x1 -> 5x5; 3x3 max-pool -> 1x1; batch norm on every convolution."""
    branches = inception_branches(256)
    assert [b.kernel_size for b in branches] == [1, 3, 5, 1]
    assert [b.channels for b in branches] == [64] * 4
    assert [bool(b.bottleneck) for b in branches] == [False, True, True, False]
    assert [b.pool for b in branches] == [False, False, False, True]
    assert sum(b.channels for b in inception_branches(10)) == 10
    transition = MKConvLSTM(8, inception_branches(8), norm="batch").cells[0].input_transition
    convolutions = [m for m in transition.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in transition.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [n.num_features for n in norms] == [c.out_channels for c in convolutions] or len(norms) == len(convolutions)
    x = torch.randn(2, 8, 5, 5)
    pooled = transition.branches[3]
    wanted = pooled.norm(pooled.conv(F.max_pool2d(x, 3, 1, 1)))
    torch.testing.assert_close(transition(x)[:, 6:8], wanted[:, :2])


@pytest.mark.parametrize(
    ("norm", "channels", "groups"), [("layer", 64, 1), ("group", 64, 8), ("group", 96, 12), ("group", 10, 4)]
)
def test_group_and_layer_norm_groups(norm, channels, groups):
    layer = MKConvLSTM(2, {3: channels}, norm=norm)
    assert layer.cells[0].input_transition.branches[0].norm.num_groups == groups


def test_layer_norm_by_pixel_is_torchs():
    transition = Transition(2, {3: 1, 1: 2}, norm="layer_pixel", image_size=(4, 5))
    branch = transition.branches[1]
    assert branch.norm.weight.shape == (8, 4, 5)
    torch.nn.init.normal_(branch.norm.weight)
    x = torch.randn(3, 2, 4, 5)
    wanted = F.layer_norm(F.conv2d(x, branch.conv.weight), [8, 4, 5], branch.norm.weight, branch.norm.bias)
    torch.testing.assert_close(transition(x).unflatten(1, (4, 3))[:, :, 1:].flatten(1, 2), wanted)


def test_gate_norm_acts_on_the_sum():
    """``z_t = norm(X(x_t) + U(h_{t-1}) + b)``, then the gates, peepholes included."""
    cell = MKConvLSTMCell(3, {3: 4}, gate_norm=2, peephole="channel", dtype=torch.float64)
    for p in cell.parameters():
        torch.nn.init.normal_(p)
    x, h, c = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (3, 4, 4))
    z = cell.input_transition(x) + cell.hidden_transition(h) + cell.bias[:, None, None]
    z_i, z_f, z_g, z_o = F.group_norm(z, 2, cell.gate_norm.weight, cell.gate_norm.bias).chunk(4, dim=1)
    w_ci, w_cf, w_co = cell.peephole
    new_c = (z_f + w_cf * c).sigmoid() * c + (z_i + w_ci * c).sigmoid() * z_g.tanh()
    got_h, got_c = cell(x, (h, c))
    torch.testing.assert_close(got_c, new_c)
    torch.testing.assert_close(got_h, (z_o + w_co * c).sigmoid() * new_c.tanh())


@pytest.mark.parametrize("recompute", [False, True])
def test_batch_norm_statistics_move_once_a_pass(recompute):
    """Input statistics once over B and T; hidden ones at each step; recomputation in backward leaves them alone."""
    layer = MKConvLSTM(2, {3: 2}, {1: 2}, norm="batch", recompute=recompute)
    x_norm = layer.cells[0].input_transition.branches[0].norm
    h_norm = layer.cells[0].hidden_transition.branches[0].norm
    output, _ = layer(torch.randn(2, 5, 2, 4, 4))
    output.sum().backward()
    assert x_norm.num_batches_tracked == 1
    assert h_norm.num_batches_tracked == 5
    before = x_norm.running_mean.clone()
    layer.eval()
    layer(torch.randn(2, 5, 2, 4, 4))
    assert torch.equal(x_norm.running_mean, before)


def test_batch_norm_of_the_input_alone_is_recomputed_without_moving_its_statistics():
    """Live input transition, weights-only hidden one: the recomputing backend runs, and statistics move once."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = MKConvLSTM(2, {3: 2}, norm="batch", recompute=recompute, backend="aten", dtype=torch.float64)
        cell = layer.cells[0]
        cell.hidden_transition = Transition(2, parse_branches("hidden_kernels", {3: 2}), dtype=torch.float64)
        output, _ = layer(torch.randn(2, 3, 2, 4, 4, dtype=torch.float64))
        output.sin().sum().backward()
        norm = cell.input_transition.branches[0].norm
        assert norm.num_batches_tracked == 1
        assert norm.track_running_stats
        results.append([p.grad for p in layer.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dilation_reaches_further():
    layer = MKConvLSTM(1, [Branch(3, 1, dilation=2)], {1: 1}, bias=False)
    x = torch.zeros(1, 1, 1, 7, 7)
    x[..., 3, 3] = 1
    touched = layer(x)[0][0, 0, 0].nonzero().tolist()
    assert touched == [[y, x] for y in (1, 3, 5) for x in (1, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(8, 16), (2, 4), (3, 5), (32, 32, 64)], ids=str)
def test_interleaving_moves_wide_elements_to_the_right_place(sizes, dtype):
    """Copies of up to 16 bytes an element, where sizes and offsets allow, change nothing."""
    outputs = [channels_last(torch.randn(3, 4 * n, 4, 5).to(dtype)) for n in sizes]
    z = interleave(outputs)
    gates = [torch.cat([o.unflatten(1, (4, -1))[:, g] for o in outputs], 1) for g in range(4)]
    assert torch.equal(z, torch.cat(gates, 1))
    assert z.is_contiguous(memory_format=torch.channels_last)
    later = z.unflatten(0, (1, 3))[:, 1:]  # as the recurrence slices time
    for whole, part, wanted in zip(deinterleave(z, sizes), deinterleave(later, sizes), outputs, strict=True):
        assert torch.equal(whole, wanted)
        assert torch.equal(part[0], wanted[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_many_outputs_are_convolved_in_parts():
    w = BranchWeights(torch.randn(1032, 16, 3, 3, device="cuda"), torch.randn(1032, device="cuda"))
    x = channels_last(torch.randn(2, 16, 8, 8, device="cuda"))
    torch.testing.assert_close(branch_forward(x, w), F.conv2d(x, w.weight, w.bias, padding=1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_prepared_weights_change_nothing(dtype):
    """With weights laid out once for the CPU's convolutions: the same outputs and gradients, to the last bit or so."""
    torch.manual_seed(0)
    branches = (
        BranchWeights(torch.randn(8, 5, 3, 3, dtype=dtype), torch.randn(8, dtype=dtype)),
        BranchWeights(
            torch.randn(12, 4, 5, 3, dtype=dtype), None, torch.randn(4, 5, 1, 1, dtype=dtype), dilation=(2, 1)
        ),
    )
    w = TransitionWeights(branches).channels_last()
    x = channels_last(torch.randn(2, 5, 7, 6, dtype=dtype))
    dz = [channels_last(torch.randn(2, n, 7, 6, dtype=dtype)) for n in (8, 12)]
    forward, gradient = w.prepared((2, 7, 6), 9), w.prepared((2, 7, 6), 9, gradient=True)
    if runs_in_onednn(branches[0].weight):
        assert all(isinstance(b.way, PackedConvolution) for b in (*forward.branches, *gradient.branches))
    tolerance = 4 * torch.finfo(dtype).eps
    for packed, plain in zip(transition_parts(x, forward), transition_parts(x, w), strict=True):
        torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance)
    packed, plain = (input_gradient(list(dz), weights) for weights in (gradient, w))
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=50 * tolerance)


@pytest.mark.parametrize(
    ("uses", "batch", "dtype"), [(2, 1, torch.float32), (9, 0, torch.float32), (9, 1, torch.float64)]
)
def test_weights_stay_as_they_are_where_nothing_else_pays(uses, batch, dtype):
    w = TransitionWeights((BranchWeights(torch.randn(8, 5, 3, 3, dtype=dtype)),))
    assert w.prepared((batch, 7, 6), uses).branches[0].way is None


@pytest.mark.parametrize(
    ("shape", "images", "dtype", "dilation", "output", "of_input", "of_weight"),
    [
        ((256, 16, 5, 5), (160, 16, 16), torch.bfloat16, (1, 1), True, True, True),
        ((256, 16, 7, 7), (160, 16, 16), torch.float16, [1, 1], True, True, True),
        ((64, 32, 7, 7), (160, 32, 32), torch.float16, (1, 1), False, False, True),
        ((64, 256, 7, 7), (160, 32, 32), torch.float16, (1, 1), False, False, True),
        ((64, 257, 7, 7), (160, 32, 32), torch.float16, (1, 1), False, False, False),
        ((64, 32, 9, 7), (1, 32, 32), torch.float16, (1, 1), False, False, False),
        ((128, 1, 3, 3), (200, 64, 64), torch.float16, (1, 1), True, True, True),
        ((128, 32, 5, 5), (80, 96, 96), torch.bfloat16, (1, 1), False, True, False),
        ((128, 17, 3, 3), (80, 96, 96), torch.bfloat16, (1, 1), False, True, False),
        ((128, 33, 3, 3), (80, 96, 96), torch.bfloat16, (1, 1), False, False, False),
        ((256, 64, 3, 3), (80, 96, 96), torch.bfloat16, (1, 1), False, False, False),
        ((48, 32, 3, 3), (160, 96, 96), torch.bfloat16, (1, 1), False, True, False),  # 96 unfolded channels
        ((47, 32, 3, 3), (160, 96, 96), torch.bfloat16, (1, 1), False, False, False),
        ((64, 16, 5, 5), (160, 32, 32), torch.float16, (1, 1), False, True, False),  # 80 channels, rounded up to 96
        ((96, 16, 5, 5), (160, 32, 32), torch.float16, (1, 1), True, True, True),
        ((256, 16, 5, 5), (32, 16, 16), torch.float16, (1, 1), True, True, True),
        ((255, 16, 5, 5), (32, 16, 16), torch.float16, (1, 1), False, False, False),
        ((256, 16, 5, 5), (0, 16, 16), torch.float16, (1, 1), False, False, False),
        ((256, 1, 3, 3), (1 << 16, 128, 128), torch.float16, (1, 1), True, True, True),
        ((256, 1, 3, 3), ((1 << 16) + 1, 128, 128), torch.float16, (1, 1), False, False, False),
        ((256, 16, 5, 1), (160, 16, 16), torch.float16, (1, 1), False, False, False),
        ((256, 16, 1, 3), (160, 16, 16), torch.float16, (1, 1), True, True, True),
        ((256, 16, 5, 5), (160, 16, 16), torch.float16, (1, 2), False, False, False),
        ((256, 16, 5, 5), (160, 16, 16), torch.float32, (1, 1), False, False, False),
    ],
)
def test_what_pays_to_unfold(shape, images, dtype, dilation, output, of_input, of_weight):
    assert unfolding.pays(shape, images, dilation, dtype) is output
    assert unfolding.pays(shape, images, dilation, dtype, "input") is of_input
    assert unfolding.pays(shape, images, dilation, dtype, "weight") is of_weight
