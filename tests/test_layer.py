"""The layer around the recurrence: layouts, lengths, streaming, dtypes, autocast, stacking."""

import copy

import numpy
import pytest
import torch
from problems import PROBLEMS, Problem, assert_close
from torch.nn.utils import prune

from mkconvlstm_cuda import FlowAttention, MKConvLSTM, MKConvLSTMCell, functional

BACKENDS = ["reference", "aten"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def random_layer(*args, **options) -> MKConvLSTM:
    torch.manual_seed(0)
    return MKConvLSTM(*args, dtype=torch.float64, **options)


def test_output_and_states_have_nn_lstm_shapes(backend):
    layer = MKConvLSTM(3, {3: 4, 5: 2}, num_layers=2, bidirectional=True, backend=backend)
    output, (h_n, c_n) = layer(torch.randn(2, 5, 3, 7, 6))
    assert output.shape == (2, 5, 12, 7, 6)
    assert h_n.shape == c_n.shape == (4, 2, 6, 7, 6)
    torch.testing.assert_close(h_n[2], output[:, -1, :6])  # top layer, forwards: its last step
    torch.testing.assert_close(h_n[3], output[:, 0, 6:])  # backwards: its last step is the first frame
    assert output.is_contiguous()
    assert layer.last_backend == backend


def test_time_first_is_a_transposition(backend):
    batch_first = random_layer(2, {3: 3}, backend=backend)
    time_first = random_layer(2, {3: 3}, backend=backend, batch_first=False)
    x = torch.randn(2, 4, 2, 5, 5, dtype=torch.float64)
    wanted, (h, c) = batch_first(x)
    got, (time_h, time_c) = time_first(x.transpose(0, 1))
    assert got.is_contiguous()
    for a, b in ((got.transpose(0, 1), wanted), (time_h, h), (time_c, c)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"peephole": "channel", "mix": "gate"}], ids=str)
def test_streaming_equals_the_whole_sequence(backend, options):
    layer = random_layer(2, {3: 3, 5: 2}, backend=backend, **options)
    x = torch.randn(2, 4, 2, 5, 6, dtype=torch.float64)
    wanted, (h_n, c_n) = layer(x)
    state, frames = None, []
    for x_t in x.unbind(1):
        h_t, state = layer.step(x_t, state)
        frames.append(h_t)
    for a, b in ((torch.stack(frames, 1), wanted), (state[0], h_n), (state[1], c_n)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_sequence_in_two_parts_passes_gradients_through_the_state(backend):
    layer = random_layer(2, {3: 3}, backend=backend)
    x = torch.randn(1, 6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    first, state = layer(x[:, :2])
    second, _ = layer(x[:, 2:], state)
    (parts,) = torch.autograd.grad(torch.cat([first, second], 1).sin().sum(), x)
    (whole,) = torch.autograd.grad(layer(x)[0].sin().sum(), x)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-12)


def test_cell_is_one_step_of_the_layer(backend):
    layer = random_layer(2, {3: 3}, backend=backend, peephole="channel")
    cell = layer.cells[0]
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    h, c = cell(x)
    h, c = cell(x, (h, c))
    output, (_, c_n) = layer(x[:, None].expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(h, output[:, -1])
    torch.testing.assert_close(c, c_n[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_are_sequences_cut_short(backend, bidirectional):
    """Outputs and states equal those of each sequence alone; what lies beyond its end, NaN even, is never seen."""
    layer = random_layer(2, {3: 2}, backend=backend, bidirectional=bidirectional, num_layers=2)
    x = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    lengths = [5, 1, 3]
    poisoned = x.clone()
    for b, n in enumerate(lengths):
        poisoned[b, n:] = float("nan")
    poisoned.requires_grad_()
    output, (h_n, c_n) = layer(poisoned, lengths=torch.tensor(lengths))
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    for b, n in enumerate(lengths):
        alone, (h, c) = layer(x[b : b + 1, :n])
        torch.testing.assert_close(output[b : b + 1, :n], alone, rtol=1e-12, atol=1e-12)
        assert not output[b, n:].any()
        assert not poisoned.grad[b, n:].any()
        torch.testing.assert_close(h_n[:, b : b + 1], h, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c_n[:, b : b + 1], c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
        lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x.flip(-1).flip(-1)[..., :, :],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
    ids=["W before H", "channels-last", "every second step", "flipped", "time-major view"],
)
def test_any_strides(backend, view):
    layer = random_layer(3, {3: 2, 5: 2}, backend=backend)
    x = torch.randn(2, 3, 3, 5, 4, dtype=torch.float64)
    plain, strided = x.clone().requires_grad_(), view(x).detach().requires_grad_()
    torch.testing.assert_close(strided, plain)
    wanted, _ = layer(plain)
    got, _ = layer(strided)
    assert got.is_contiguous()
    wanted.sin().sum().backward()
    got.sin().sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_outputs_and_states(backend, dtype):
    layer = MKConvLSTM(2, {3: 3}, backend=backend, dtype=dtype)
    output, (h_n, c_n) = layer(torch.randn(1, 2, 2, 4, 4, dtype=dtype))
    assert output.dtype == h_n.dtype == dtype
    assert c_n.dtype == torch.promote_types(dtype, torch.float32)
    layer(torch.randn(1, 2, 2, 4, 4, dtype=dtype), (h_n, c_n))  # a state goes back in as it came out
    layer(torch.randn(1, 2, 2, 4, 4, dtype=dtype), (h_n, c_n.to(dtype)))


def test_autocast_computes_in_its_dtype_and_keeps_parameters(backend):
    problem = Problem(options={"peephole": "channel"})
    layer = problem.layer(backend, torch.float32)
    inputs = problem.inputs(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, c_n = problem.call(layer, **inputs)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (output.float().sum() + c_n.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    exact = problem.call(problem.layer("reference"), **problem.inputs(problem.layer("reference")))[0].detach()
    assert float((output.detach().double() - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (1, 1, 2, 1, 1), (1, 2, 2, 1, 9), (2, 1, 2, 2, 2)], ids=str)
def test_small_and_empty_batches(backend, shape):
    layer = random_layer(2, {3: 2, 5: 1}, backend=backend)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output, (h_n, c_n) = layer(x)
    assert output.shape == (*shape[:2], 3, *shape[3:])
    assert h_n.shape == c_n.shape == (1, shape[0], 3, *shape[3:])
    (output.sum() + c_n.sum()).backward()
    assert x.grad.shape == shape
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"mix": "gate"}, {"num_layers": 2}], ids=str)
def test_empty_batches_with_lengths(backend, options):
    layer = random_layer(2, {3: 2, 5: 1}, backend=backend, **options)
    output, (h_n, _) = layer(torch.randn(0, 3, 2, 4, 4, dtype=torch.float64), lengths=[])
    (output.sum() + h_n.sum()).backward()
    assert output.shape == (0, 3, 3, 4, 4)
    assert not any(p.grad.any() for p in layer.parameters())


def test_meta_device(backend):
    layer = MKConvLSTM(2, {3: 2, 5: 1}, backend=backend, device="meta")
    output, (h_n, _) = layer(torch.randn(2, 3, 2, 4, 5, device="meta"))
    (output.sum() + h_n.sum()).backward()
    assert (output.device.type, output.shape) == ("meta", (2, 3, 3, 4, 5))


@pytest.mark.parametrize("options", [{}, {"mix": "gate", "mix_activation": "tanh"}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_backward_inside_autocast_changes_nothing(options, recompute):
    """Forward outside of autocast chose float32; what is on while backward runs is somebody else's affair."""
    problem = Problem(options={"recompute": recompute, **options})
    grads = []
    for enabled in (False, True):
        layer = problem.layer("aten", torch.float32)
        output, _, _ = problem.call(layer, **problem.inputs(layer, torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output.square().sum().backward()
        grads.append({name: p.grad for name, p in layer.named_parameters()})
    assert_close(*grads, 1e-6)


def test_nan_in_one_sample_stays_there(backend):
    layer = random_layer(2, {3: 2}, backend=backend)
    x = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64)
    clean, _ = layer(x)
    x[1, 1] = float("nan")
    output, _ = layer(x)
    assert output[1, 1:].isnan().any()
    torch.testing.assert_close(output[[0, 2]], clean[[0, 2]])


def test_dropout_acts_between_layers_in_training_only():
    layer = random_layer(2, {3: 8}, num_layers=2, dropout=1.0)
    x = torch.randn(1, 2, 2, 4, 4, dtype=torch.float64)
    trained, _ = layer(x)
    layer.cells[1].input_transition.branches[0].conv.weight.data.zero_()  # nothing can come through either way
    torch.testing.assert_close(trained, layer(x)[0])
    single = random_layer(2, {3: 8}, dropout=1.0)
    assert single(x)[0].any()
    layer = random_layer(2, {3: 8}, num_layers=2, dropout=0.5).eval()
    torch.testing.assert_close(layer(x)[0], layer(x)[0], rtol=0, atol=0)
    layer.train()
    assert (layer(x)[0] != layer(x)[0]).any()


def test_initialisation():
    layer = MKConvLSTM(4, {3: 3, 5: 5}, peephole="channel", forget_bias=2.5)
    cell = layer.cells[0]
    assert cell.bias.view(4, 8).tolist() == [[0.0] * 8, [2.5] * 8, [0.0] * 8, [0.0] * 8]
    assert not cell.peephole.any()
    bound = (4 * 9) ** -0.5
    assert 0.9 * bound < cell.input_transition.branches[0].conv.weight.abs().max() <= bound
    before = copy.deepcopy(layer.state_dict())
    cell.reset_parameters()
    assert any((before[k] != v).any() for k, v in layer.state_dict().items())


def test_state_dict_goes_between_backends_and_through_a_file(tmp_path):
    problem = PROBLEMS["mix gate, tanh"]
    source = problem.layer("aten")
    torch.save(source.state_dict(), tmp_path / "layer.pt")
    target = problem.layer("reference", seed=7)
    target.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    inputs = problem.inputs(source)
    for a, b in zip(problem.call(source, **inputs), problem.call(target, **inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_deepcopy_and_repr():
    layer = MKConvLSTM(2, {3: 2, (1, 5): 1}, attention=FlowAttention(branches=((1, 5),)), num_layers=2)
    twin = copy.deepcopy(layer)
    x, flow = torch.randn(1, 2, 2, 5, 5), torch.randn(1, 2, 2, 5, 5)
    torch.testing.assert_close(layer(x, flow=flow)[0], twin(x, flow=flow)[0])
    assert "num_layers=2" in repr(layer)
    assert "hidden_channels=3" in repr(layer)


def test_no_grad_and_inference_mode_give_the_same(backend):
    layer = random_layer(2, {3: 2}, backend=backend)
    x = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    wanted, (_, c_n) = layer(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output, (_, c) = layer(x)
        assert not output.requires_grad
        torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(c, c_n, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"peephole": "pixel", "image_size": (4, 3)}], ids=["plain", "peephole"])
def test_functional_is_the_layer(backend, options):
    problem = Problem({3: 2, 1: 1}, options)
    layer = problem.layer(backend)
    cell = layer.cells[0]
    inputs = problem.inputs(layer)
    wanted = problem.call(layer, **inputs)
    h, (h_n, c_n) = functional.mkconvlstm(
        inputs["x"],
        [b.conv.weight for b in cell.input_transition.branches],
        [b.conv.weight for b in cell.hidden_transition.branches],
        cell.bias,
        peephole=cell.peephole,
        state=(inputs["h_0"][0], inputs["c_0"][0]),
        backend=backend,
    )
    assert_close({"h": h, "h_n": h_n, "c_n": c_n}, {"h": wanted[0], "h_n": wanted[1][0], "c_n": wanted[2][0]}, 1e-12)


def test_masks_scale_the_input_of_their_branch_only():
    """m = 1 changes nothing, m = 0 removes the branch's input; the other branch never notices."""

    class Constant(torch.nn.Module):
        logit = 40.0

        def forward(self, flow):
            return flow.new_full((flow.shape[0], 3, *flow.shape[2:]), self.logit)

    torch.manual_seed(0)
    network = Constant()
    layer = MKConvLSTM(3, {3: 2, 5: 2}, attention=FlowAttention(2, branches=(5,), network=network), dtype=torch.float64)
    torch.manual_seed(0)
    plain = MKConvLSTM(3, {3: 2, 5: 2}, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x, flow = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64), torch.zeros(1, 2, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x, flow=flow)[0], plain(x)[0])
    layer.cells[0].attention.network.logit = -800.0
    plain.cells[0].input_transition.branches[1].conv.weight.data.zero_()
    torch.testing.assert_close(layer(x, flow=flow)[0], plain(x)[0])


def test_flow_beyond_the_end_of_a_sequence_is_never_seen(backend):
    layer = random_layer(3, {3: 2, 5: 2}, attention=FlowAttention(branches=(5,)), backend=backend)
    x, flow = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64), torch.randn(2, 4, 2, 5, 5, dtype=torch.float64)
    grads = []
    for beyond in (0.0, float("nan")):
        flow[0, 2:] = beyond
        layer.zero_grad()
        layer(x, flow=flow, lengths=[2, 4])[0].sum().backward()
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    assert_close(*grads, 1e-12)


def test_cell_takes_flow_for_one_step():
    cell = MKConvLSTMCell(2, {3: 2}, attention=FlowAttention(2), dtype=torch.float64)
    h, c = cell(torch.randn(1, 2, 4, 4, dtype=torch.float64), flow=torch.randn(1, 2, 4, 4, dtype=torch.float64))
    assert h.shape == c.shape == (1, 2, 4, 4)


def test_training_reduces_a_loss(backend):
    torch.manual_seed(0)
    layer = MKConvLSTM(1, {3: 4, 5: 4}, backend=backend, recompute=backend == "aten")
    readout = torch.nn.Conv2d(8, 1, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], 1e-2)
    frames = torch.zeros(4, 7, 1, 8, 8)
    for b in range(4):
        for t in range(7):
            frames[b, t, 0, b + 2, (b + t) % 8] = 1  # a dot that moves right
    losses = []
    for _ in range(40):
        output, _ = layer(frames[:, :-1])
        loss = torch.nn.functional.mse_loss(readout(output.flatten(0, 1)), frames[:, 1:].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


def test_a_given_network_for_masks_stays_as_it_is():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1))
    layer = MKConvLSTM(3, {3: 2}, attention=FlowAttention(network=network, mask_channels=1), bidirectional=True)
    for _ in range(2):
        for cell in layer.cells:
            for ours, given in zip(cell.attention.network.parameters(), network.parameters(), strict=True):
                assert torch.equal(ours, given)
                assert ours is not given
        before = layer.cells[0].hidden_transition.branches[0].conv.weight.clone()
        layer.reset_parameters()
        assert not torch.equal(layer.cells[0].hidden_transition.branches[0].conv.weight, before)


def test_backend_can_be_set_later():
    layer = MKConvLSTM(3, {3: 2}, num_layers=2)
    assert layer.backend == "auto"
    layer.backend = "reference"
    layer(torch.randn(1, 2, 3, 4, 4))
    assert layer.last_backend == "reference"
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        layer.backend = "gpu"


@pytest.mark.parametrize("options", [{}, {"mix": "full"}, {"norm": "group"}, {"norm": "batch"}], ids=str)
@pytest.mark.parametrize("which", ["input_transition", "hidden_transition"])
def test_hooks_that_would_never_run_are_refused(which, options):
    layer = MKConvLSTM(3, {3: 2, 5: 3}, **options)
    transition = getattr(layer.cells[0], which)
    pruned = transition.mix if "mix" in options else transition.branches[1].conv
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    x = torch.randn(1, 2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="has forward hooks"):
        layer(x)
    prune.remove(pruned, "weight")
    layer(x)


def test_integers_of_numpy_are_integers():
    n = numpy.int64
    layer = MKConvLSTM(n(3), {n(3): n(2), (n(1), n(5)): n(3)}, num_layers=n(2), gate_norm=n(4))
    layer.load_state_dict(MKConvLSTM(3, {3: 2, (1, 5): 3}, num_layers=2, gate_norm=4).state_dict())
    lengths = numpy.array([2, 3])
    output, _ = layer(torch.randn(2, 3, 3, 4, 4), lengths=lengths)
    assert (output[0, 2] == 0).all()
    assert repr(layer.cells[0].input_transition.branches[0].conv).startswith("Conv2d(3, 8, kernel_size=(3, 3)")


def test_dropout_of_one_layer_is_said_to_do_nothing():
    with pytest.warns(UserWarning, match="dropout: got 0.5 with one layer"):
        MKConvLSTM(3, {3: 2}, dropout=0.5)


def test_weights_may_be_a_parameter_list():
    w_x, w_h = (torch.nn.ParameterList([torch.randn(8, n, 3, 3)]) for n in (3, 2))
    x = torch.randn(1, 2, 3, 4, 4)
    assert torch.equal(functional.mkconvlstm(x, w_x, w_h)[0], functional.mkconvlstm(x, list(w_x), list(w_h))[0])
