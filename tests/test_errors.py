"""Bad calls: each is a clear error that names the argument, and the layer works as before afterwards."""

import pytest
import torch

from mkconvlstm_cuda import Branch, FlowAttention, MKConvLSTM, MKConvLSTMCell, functional, inception_branches

X = torch.randn(2, 3, 4, 6, 5)
STATE = torch.randn(1, 2, 5, 6, 5)
INTEGERS = torch.ones(2, 3, 4, 6, 5, dtype=torch.int64)

# what: (error, words of the message, constructor arguments)
CONSTRUCTION = {
    "in_channels 0": (ValueError, "in_channels: got 0", (0, {3: 2}), {}),
    "in_channels float": (ValueError, "in_channels: got 2.0", (2.0, {3: 2}), {}),
    "even kernel": (ValueError, "kernels: got kernel size 4x4, wanted odd", (4, {4: 2}), {}),
    "even side": (ValueError, "kernels: got kernel size 3x2", (4, {(3, 2): 2}), {}),
    "kernel 0": (ValueError, "kernels: got kernel size 0x0", (4, {0: 2}), {}),
    "no kernels": (ValueError, "kernels: got no branch", (4, {}), {}),
    "no branches": (ValueError, "kernels: got no branch", (4, []), {}),
    "kernels an int": (TypeError, "kernels: got 3", (4, 3), {}),
    "kernel size a string": (TypeError, "kernel size: got '3'", (4, {"3": 2}), {}),
    "three sides": (TypeError, "kernel size: got", (4, {(3, 3, 3): 2}), {}),
    "no channels": (ValueError, "kernels: got channels 0", (4, {3: 0}), {}),
    "hidden kernels' channels": (ValueError, "hidden_kernels: got 6 channels in all", (4, {3: 5}, {5: 6}), {}),
    "even hidden kernel": (ValueError, "hidden_kernels: got kernel size 2x2", (4, {3: 5}, {2: 5}), {}),
    "mix": (ValueError, "mix: got 'all'", (4, {3: 5}), {"mix": "all"}),
    "mix_activation": (ValueError, "mix_activation: got 'relu'", (4, {3: 5}), {"mix": "full", "mix_activation": "relu"}),
    "activation without mix": (ValueError, "mix_activation: got 'tanh' without", (4, {3: 5}), {"mix_activation": "tanh"}),
    "norm": (ValueError, "norm: got 'instance'", (4, {3: 5}), {"norm": "instance"}),
    "layer_pixel without size": (ValueError, "image_size: got None", (4, {3: 5}), {"norm": "layer_pixel"}),
    "gate_norm": (ValueError, "gate_norm: got 3, wanted .* divides 4F=20", (4, {3: 5}), {"gate_norm": 3}),
    "gate_norm a string": (ValueError, "gate_norm: got 'group'", (4, {3: 5}), {"gate_norm": "group"}),
    "peephole": (ValueError, "peephole: got 'all'", (4, {3: 5}), {"peephole": "all"}),
    "output_peephole": (ValueError, "output_peephole: got 'next'", (4, {3: 5}), {"output_peephole": "next"}),
    "pixel peephole without size": (ValueError, "image_size: got None", (4, {3: 5}), {"peephole": "pixel"}),
    "image_size of one": (ValueError, "image_size: got 5", (4, {3: 5}), {"peephole": "pixel", "image_size": 5}),
    "image_size of three": (ValueError, "image_size: got", (4, {3: 5}), {"peephole": "pixel", "image_size": (5, 5, 5)}),
    "attention": (TypeError, "attention: got int", (4, {3: 5}), {"attention": 2}),
    "attention branch": (ValueError, r"attention.branches: got \(7, 7\)", (4, {3: 5}), {"attention": FlowAttention(2, (7,))}),
    "num_layers": (ValueError, "num_layers: got 0", (4, {3: 5}), {"num_layers": 0}),
    "dropout": (ValueError, "dropout: got 1.5", (4, {3: 5}), {"dropout": 1.5}),
    "dropout a string": (ValueError, "dropout: got '0.1'", (4, {3: 5}), {"dropout": "0.1"}),
    "backend": (ValueError, "backend: got 'gpu', wanted one of", (4, {3: 5}), {"backend": "gpu"}),
    "dtype of integers": (TypeError, "dtype: got dtype torch.int64, wanted one of float64,", (4, {3: 5}), {"dtype": torch.int64}),
    "dtype complex": (TypeError, "dtype: got dtype torch.complex64", (4, {3: 5}), {"dtype": torch.complex64}),
    "dtype a string": (TypeError, "dtype: got dtype float32", (4, {3: 5}), {"dtype": "float32"}),
    "dtype float8": (TypeError, "dtype: got dtype torch.float8_e4m3fn", (4, {3: 5}), {"dtype": torch.float8_e4m3fn}),
    "forget_bias": (TypeError, "forget_bias: got '1'", (4, {3: 5}), {"forget_bias": "1"}),
    "negative kernel": (ValueError, "kernels: got kernel size -3x-3", (4, {-3: 2}), {}),
    "a list of mixed kinds": (TypeError, r"kernels: got \[Branch\(.*, 3\], wanted", (4, [Branch(3, 2), 3]), {}),
    "channels a float": (ValueError, "kernels: got channels 2.5", (4, {3: 2.5}), {}),
    "in_channels a bool": (ValueError, "in_channels: got True", (True, {3: 2}), {}),
    "kernel size a bool": (TypeError, "kernel size: got True", (4, {True: 2}), {}),
    "num_layers a bool": (ValueError, "num_layers: got True", (4, {3: 5}), {"num_layers": True}),
    "gate_norm a bool": (ValueError, "gate_norm: got True", (4, {3: 5}), {"gate_norm": True}),
    "bidirectional a string": (TypeError, "bidirectional: got 'no', wanted True or False", (4, {3: 5}), {"bidirectional": "no"}),
    "bias an int": (TypeError, "bias: got 1, wanted True or False", (4, {3: 5}), {"bias": 1}),
    "batch_first None": (TypeError, "batch_first: got None", (4, {3: 5}), {"batch_first": None}),
    "recompute a string": (TypeError, "recompute: got 'yes'", (4, {3: 5}), {"recompute": "yes"}),
    "forget_bias NaN": (TypeError, "forget_bias: got nan", (4, {3: 5}), {"forget_bias": float("nan")}),
    "image_size for nothing": (ValueError, "image_size: got 'large'", (4, {3: 5}), {"image_size": "large"}),
    "dropout NaN": (ValueError, "dropout: got nan", (4, {3: 5}), {"dropout": float("nan")}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_bad_construction(case):
    error, words, args, options = CONSTRUCTION[case]
    with pytest.raises(error, match=words):
        MKConvLSTM(*args, **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Branch(3, None), ValueError, "channels None"),
        (lambda: Branch(3, 2, bottleneck=0), ValueError, "bottleneck 0"),
        (lambda: Branch(3, 2, dilation=0), ValueError, "dilation 0"),
        (lambda: Branch(3, 2, dilation="x"), TypeError, "dilation: got 'x'"),
        (lambda: FlowAttention(0), ValueError, "flow_channels: got 0"),
        (lambda: FlowAttention(2, branches=()), ValueError, r"attention branches: got \(\)"),
        (lambda: FlowAttention(2, branches=3), ValueError, "attention branches: got 3"),
        (lambda: FlowAttention(2, mask_channels=3), ValueError, "mask_channels: got 3"),
        (lambda: FlowAttention(2, kernel_size=2), ValueError, "kernel_size: got 2"),
        (lambda: FlowAttention(2, network=torch.sigmoid), TypeError, "network: got"),
        (lambda: inception_branches(3), ValueError, "channels: got 3"),
        (lambda: inception_branches(16, 0), ValueError, "got bottleneck 0"),
        (lambda: MKConvLSTMCell(4, {3: 2}, backend="x"), ValueError, "backend: got 'x'"),
    ],
)
def test_bad_parts(make, error, words):
    with pytest.raises(error, match=words):
        make()


# what: (error, words, layer options, call arguments)
CALLS = {
    "a list": (TypeError, "x: got list, wanted a torch.Tensor", {}, ([1.0],), {}),
    "no time": (ValueError, r"x: got shape \[2, 4, 6, 5\], wanted .* \(5 dimensions\)", {}, (X[:, 0],), {}),
    "no batch": (ValueError, "x: got shape", {}, (X[0],), {}),
    "channels": (ValueError, r"x: got shape \[2, 3, 3, 6, 5\], wanted \[B, T, C=4, H, W\]", {}, (X[:, :, :3],), {}),
    "integers": (TypeError, "x: got dtype torch.int64", {}, (INTEGERS,), {}),
    "double": (TypeError, "x: got dtype torch.float64, wanted that of the weights, torch.float32", {}, (X.double(),), {}),
    "half": (TypeError, "x: got dtype torch.float16", {}, (X.half(),), {}),
    "complex": (TypeError, "x: got dtype torch.complex64", {}, (X.to(torch.complex64),), {}),
    "booleans": (TypeError, "x: got dtype torch.bool", {}, (X > 0,), {}),
    "float8": (TypeError, "x: got dtype torch.float8_e4m3fn, wanted one of float64", {}, (X.to(torch.float8_e4m3fn),), {}),
    "an array": (TypeError, "x: got ndarray", {}, (X.numpy(),), {}),
    "sparse": (TypeError, "x: got a tensor that is torch.sparse_coo, wanted a dense one", {}, (X.to_sparse(),), {}),
    "nested": (TypeError, "x: got a tensor that is nested", {}, (torch.nested.nested_tensor([*X], layout=torch.jagged),), {}),
    "device": (ValueError, "x: got device meta, wanted that of the weights, cpu", {}, (X.to("meta"),), {}),
    "no steps": (ValueError, "x: got shape .* with T at least 1", {}, (X[:, :0],), {}),
    "no rows": (ValueError, "with H at least 1", {}, (X[..., :0, :],), {}),
    "state a tensor": (TypeError, "state: got Tensor, wanted a pair", {}, (X, STATE), {}),
    "state of one": (TypeError, "state: got tuple, wanted a pair", {}, (X, (STATE,)), {}),
    "state of None": (TypeError, "h_0.*got NoneType", {}, (X, (None, STATE)), {}),
    "state of three": (TypeError, "state: got tuple, wanted a pair", {}, (X, (STATE, STATE, STATE)), {}),
    "state a dict": (TypeError, "state: got dict, wanted a pair", {}, (X, {"h": STATE, "c": STATE}), {}),
    "state sparse": (TypeError, r"state\[0\] \(h_0\): got a tensor that is torch.sparse_coo", {}, (X, (STATE.to_sparse(), STATE)), {}),
    "h_0 complex": (TypeError, r"state\[0\] \(h_0\): got dtype torch.complex64", {}, (X, (STATE.to(torch.complex64), STATE)), {}),
    "h_0 batch": (ValueError, r"state\[0\] \(h_0\): got shape .*B=2", {}, (X, (STATE[:, :1], STATE)), {}),
    "c_0 channels": (ValueError, r"state\[1\] \(c_0\): got shape .*F=5", {}, (X, (STATE, STATE[:, :, :4])), {}),
    "state layers": (ValueError, "L=2", {"num_layers": 2}, (X, (STATE, STATE)), {}),
    "state rank": (ValueError, r"\(5 dimensions\)", {}, (X, (STATE[0], STATE[0])), {}),
    "state image": (ValueError, "W=5", {}, (X, (STATE, STATE[..., :4])), {}),
    "h_0 dtype": (TypeError, r"state\[0\] \(h_0\): got dtype torch.float64", {}, (X, (STATE.double(), STATE)), {}),
    "c_0 integers": (TypeError, r"state\[1\] \(c_0\): got dtype torch.int64", {}, (X, (STATE, STATE.long())), {}),
    "c_0 device": (ValueError, r"state\[1\] \(c_0\): got device meta", {}, (X, (STATE, STATE.to("meta"))), {}),
    "flow not asked for": (ValueError, "flow: got a tensor, wanted None", {}, (X,), {"flow": X[:, :, :2]}),
    "flow missing": (ValueError, "flow: got None", {"attention": FlowAttention(2)}, (X,), {}),
    "flow channels": (ValueError, "flow: got shape .*flow_channels=2", {"attention": FlowAttention(2)}, (X,), {"flow": X}),
    "flow image": (ValueError, "flow: got shape .*H=6", {"attention": FlowAttention(2)}, (X,), {"flow": X[:, :, :2, :5]}),
    "flow steps": (ValueError, "flow: got shape .*T=3", {"attention": FlowAttention(2)}, (X,), {"flow": X[:, :2, :2]}),
    "flow a list": (TypeError, "flow: got list", {"attention": FlowAttention(2)}, (X,), {"flow": [1]}),
    "lengths too long": (ValueError, r"lengths: got \[1, 4\], wanted all in 1..T=3", {}, (X,), {"lengths": torch.tensor([1, 4])}),
    "lengths 0": (ValueError, "lengths: got", {}, (X,), {"lengths": torch.tensor([0, 3])}),
    "lengths shape": (ValueError, r"lengths: got shape \[1\], wanted \[B=2\]", {}, (X,), {"lengths": torch.tensor([2])}),
    "lengths floats": (TypeError, "lengths: got dtype torch.float32", {}, (X,), {"lengths": torch.tensor([1.0, 2.0])}),
    "lengths an int": (TypeError, "lengths: got int", {}, (X,), {"lengths": 3}),
    "lengths negative": (ValueError, r"lengths: got \[-1, 2\]", {}, (X,), {"lengths": [-1, 2]}),
    "lengths of booleans": (TypeError, "lengths: got dtype torch.bool", {}, (X,), {"lengths": [True, True]}),
    "lengths with None": (TypeError, r"lengths: got \[None, 1\]", {}, (X,), {"lengths": [None, 1]}),
    "lengths past 64 bits": (TypeError, "lengths: got", {}, (X,), {"lengths": [2**63, 1]}),
    "lengths without values": (ValueError, "lengths: got device meta", {}, (X,), {"lengths": torch.ones(2, dtype=torch.int64, device="meta")}),
    "lengths ragged": (TypeError, r"lengths: got \[\[1\], \[1, 2\]\]", {}, (X,), {"lengths": [[1], [1, 2]]}),
    "time-first channels": (ValueError, r"x: got shape \[2, 3, 3, 6, 5\], wanted \[T, B, C=4", {"batch_first": False}, (X[:, :, :3],), {}),
    "peephole image": (ValueError, r"peephole: got image size \(5, 6\)", {"peephole": "pixel", "image_size": (5, 6)}, (X,), {}),
    "layer_pixel image": (ValueError, r"x: got image size \(6, 5\), wanted .*\(5, 6\)", {"norm": "layer_pixel", "image_size": (5, 6)}, (X,), {}),
    "named backend": (ValueError, "backend: 'aten' cannot serve this call: .*layer norm", {"norm": "layer", "backend": "aten"}, (X,), {}),
    "named backend, norm of the gates": (ValueError, "cannot serve this call: .*norm of the gates", {"gate_norm": 2, "backend": "aten"}, (X,), {}),
    "named backend, batch norm": (ValueError, "cannot serve this call: .*batch norm", {"norm": "batch", "backend": "aten"}, (X,), {}),
    "named backend's device": (ValueError, "backend: 'cuda' cannot serve this call: ", {"backend": "cuda"}, (X,), {}),
}  # fmt: skip
if torch.cuda.is_available():
    del CALLS["named backend's device"]  # its reason depends on the machine; test_gate_step has the GPU's


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls(case):
    error, words, options, args, named = CALLS[case]
    torch.manual_seed(0)
    layer = MKConvLSTM(4, {3: 2, 5: 3}, **options)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(error, match=words):
        layer(*args, **named)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    if "named backend" not in case and "image_size" not in options:
        layer(X, flow=X[:, :, :2] if "attention" in options else None)


def test_bad_calls_of_step_and_cell():
    layer = MKConvLSTM(4, {3: 2}, bidirectional=True)
    with pytest.raises(ValueError, match="step: got a bidirectional layer"):
        layer.step(X[:, 0])
    layer = MKConvLSTM(4, {3: 2})
    with pytest.raises(ValueError, match=r"x_t: got shape .* \(4 dimensions\)"):
        layer.step(X)
    cell = MKConvLSTMCell(4, {3: 2})
    with pytest.raises(ValueError, match="x_t: got shape"):
        cell(X)
    with pytest.raises(ValueError, match=r"h_0.*F=2"):
        cell(X[:, 0], (X[:, 0], X[:, 0]))
    for call in (layer.step, cell):
        with pytest.raises(ValueError, match=r"x_t: got shape \[2, 3, 6, 5\], wanted \[B, C=4, H, W\]"):
            call(X[:, 0, :3])


@pytest.mark.parametrize("flow", [X, X[0, 0, :2]], ids=["a sequence", "no batch"])
def test_flow_of_one_step_has_four_dimensions(flow):
    options = {"attention": FlowAttention(2)}
    with pytest.raises(ValueError, match=r"flow: got shape .* \(4 dimensions\)"):
        MKConvLSTM(4, {3: 2}, **options).step(X[:, 0], flow=flow)
    with pytest.raises(ValueError, match=r"flow: got shape .* \(4 dimensions\)"):
        MKConvLSTMCell(4, {3: 2}, **options)(X[:, 0], flow=flow)


def test_attention_network_of_wrong_size():
    attention = FlowAttention(2, network=torch.nn.Conv2d(2, 3, 1))
    layer = MKConvLSTM(4, {3: 2}, attention=attention)
    with pytest.raises(ValueError, match=r"attention.network: got output shape \[6, 3, 6, 5\], wanted \[6, 4, 6, 5\]"):
        layer(X, flow=X[:, :, :2])


W_X, W_H = torch.randn(20, 4, 3, 3), torch.randn(20, 5, 3, 3)
FUNCTIONAL = {
    "no weights": (TypeError, "input_weights: got an empty list, wanted a list", (X, [], [W_H]), {}),
    "a tensor": (TypeError, "input_weights: got Tensor", (X, W_X, [W_H]), {}),
    "input channels": (ValueError, r"input_weights\[0\]: got shape", (X, [W_X[:, :3]], [W_H]), {}),
    "hidden channels": (ValueError, r"hidden_weights\[0\]: got shape .*C=5", (X, [W_X], [W_H[:, :4]]), {}),
    "rows": (ValueError, r"input_weights\[0\]: got 18 rows", (X, [W_X[:18]], [W_H]), {}),
    "hidden sum": (ValueError, "hidden_weights: got 10 hidden channels", (X, [W_X], [W_H, W_H]), {}),
    "even kernel": (ValueError, r"input_weights\[0\]: got kernel size 2x3", (X, [W_X[:, :, :2]], [W_H]), {}),
    "bias": (ValueError, r"bias: got shape \[19\], wanted \[4F=20\]", (X, [W_X], [W_H], torch.randn(19)), {}),
    "second weight's dtype": (
        TypeError,
        r"hidden_weights\[1\]: got dtype torch.float64, wanted that of x",
        (X, [W_X], [W_H[:12], W_H[:8].double()]),
        {},
    ),
    "second weight's device": (
        ValueError,
        r"input_weights\[1\]: got device meta",
        (X, [W_X[:12], W_X[:8].to("meta")], [W_H]),
        {},
    ),
    "bias dtype": (TypeError, "bias: got dtype torch.float64", (X, [W_X], [W_H], torch.randn(20).double()), {}),
    "peephole": (ValueError, "peephole: got image size", (X, [W_X], [W_H]), {"peephole": torch.randn(3, 5, 2, 2)}),
    "peephole device": (
        ValueError,
        "peephole: got device meta",
        (X, [W_X], [W_H]),
        {"peephole": torch.ones(3, 5, 1, 1, device="meta")},
    ),
    "peephole dtype": (
        TypeError,
        "peephole: got dtype torch.float64, wanted torch.float32",
        (X, [W_X], [W_H]),
        {"peephole": torch.ones(3, 5, 1, 1).double()},
    ),
    "bias a list": (TypeError, "bias: got list", (X, [W_X], [W_H], [1.0] * 20), {}),
    "no kernel": (ValueError, r"input_weights\[0\]: got kernel size 0x3", (X, [W_X[:, :, :0]], [W_H]), {}),
    "integer weights": (TypeError, r"input_weights\[0\]: got dtype torch.int64", (X, [W_X.long()], [W_H]), {}),
    "no steps": (ValueError, "x: got shape .* with T at least 1", (X[:, :0], [W_X], [W_H]), {}),
    "peephole rows": (ValueError, "peephole: got shape", (X, [W_X], [W_H]), {"peephole": torch.randn(2, 5, 1, 1)}),
    "output_peephole": (ValueError, "output_peephole: got 'c'", (X, [W_X], [W_H]), {"output_peephole": "c"}),
    "state": (ValueError, r"h_0.*F=5", (X, [W_X], [W_H]), {"state": (X[:, 0], X[:, 0])}),
    "backend": (ValueError, "backend: got 'x'", (X, [W_X], [W_H]), {"backend": "x"}),
}


@pytest.mark.parametrize("case", FUNCTIONAL)
def test_bad_functional_calls(case):
    error, words, args, named = FUNCTIONAL[case]
    with pytest.raises(error, match=words):
        functional.mkconvlstm(*args, **named)
