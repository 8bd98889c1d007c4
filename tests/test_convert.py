"""Importers: each source's equations, rebuilt here as a plain module with its names, give the outputs of ours."""

import pytest
import torch
from torch import nn

from mkconvlstm_cuda import MKConvLSTM, convert

SIZE = (6, 5)


def gates_step(i, f, g, o, c):
    """The equations that all sources share."""
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class Joint(nn.Module):
    """One convolution over cat[x, h], then, with ``groups``, a group norm of its output (jhhuang96)."""

    def __init__(self, channels, hidden, size, order="ifog", groups=None, bias=True):
        super().__init__()
        padding = tuple(k // 2 for k in size)
        self.order = order
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, size, padding=padding, bias=bias)
        if groups:
            self.conv = nn.Sequential(self.conv, nn.GroupNorm(groups, 4 * hidden))

    def forward(self, x, h, c):
        gates = dict(zip(self.order, self.conv(torch.cat([x, h], 1)).chunk(4, 1), strict=True))
        return gates_step(*(gates[name] for name in "ifgo"), c)


class Automan000(nn.Module):
    """A convolution for each gate and side; the peepholes are no parameters; o sees the new cell state."""

    def __init__(self, channels, hidden, size, peepholes=(0.0, 0.0, 0.0)):
        super().__init__()
        self.peepholes = peepholes
        for gate in "ifco":
            setattr(self, f"Wx{gate}", nn.Conv2d(channels, hidden, size, padding=size // 2))
            setattr(self, f"Wh{gate}", nn.Conv2d(hidden, hidden, size, padding=size // 2, bias=False))

    def forward(self, x, h, c):
        wci, wcf, wco = self.peepholes
        i = (self.Wxi(x) + self.Whi(h) + c * wci).sigmoid()
        f = (self.Wxf(x) + self.Whf(h) + c * wcf).sigmoid()
        c = f * c + i * (self.Wxc(x) + self.Whc(h)).tanh()
        return (self.Wxo(x) + self.Who(h) + c * wco).sigmoid() * c.tanh(), c


class OpenSTL(nn.Module):
    """Two convolutions without bias, each perhaps followed by a layer norm; ``conv_o`` and ``conv_last`` are unused."""

    def __init__(self, channels, hidden, size, layer_norm):
        super().__init__()

        def part(inputs, outputs):
            conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
            return nn.Sequential(conv, nn.LayerNorm([outputs, *SIZE])) if layer_norm else nn.Sequential(conv)

        self.conv_x, self.conv_h = part(channels, 4 * hidden), part(hidden, 4 * hidden)
        self.conv_o, self.conv_last = part(2 * hidden, hidden), nn.Conv2d(2 * hidden, hidden, 1, bias=False)

    def forward(self, x, h, c):
        return gates_step(*(self.conv_x(x) + self.conv_h(h)).chunk(4, 1), c)


class Flax(nn.Module):
    """Two convolutions with a bias each, gates i g f o, and 1 added to f; parameters as Flax keeps them."""

    def __init__(self, channels, hidden, size, bias=True):
        super().__init__()
        self.ih = nn.Conv2d(channels, 4 * hidden, size, padding=size // 2, bias=bias)
        self.hh = nn.Conv2d(hidden, 4 * hidden, size, padding=size // 2, bias=bias)

    def params(self):
        def side(conv):
            tree = {"kernel": conv.weight.detach().permute(2, 3, 1, 0).numpy()}
            return tree if conv.bias is None else tree | {"bias": conv.bias.detach().numpy()}

        return {"params": {"ih": side(self.ih), "hh": side(self.hh)}}

    def forward(self, x, h, c):
        i, g, f, o = (self.ih(x) + self.hh(h)).chunk(4, 1)
        return gates_step(i, f + 1, g, o, c)


class Layers(nn.Module):
    """Cells stacked, under the names that a source's container gives them."""

    def __init__(self, *cells, name="cell_list.{}"):
        super().__init__()
        self.cells = cells
        if name == "cell_list.{}":
            self.cell_list = nn.ModuleList(cells)
        else:
            for k, cell in enumerate(cells):
                setattr(self, name.format(k), cell)


def randomised(module):
    """``module`` with other norms and biases than it starts from, which hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def assert_same(source, ours, channels=3, hidden=4, size=SIZE):
    """The same outputs and last states for 4 steps of random frames and random initial states."""
    cells = source.cells if isinstance(source, Layers) else (source,)
    x = torch.randn(2, 4, channels, *size)
    h_0, c_0 = torch.randn(2, len(cells), 2, hidden, *size)
    outputs, (h_n, c_n) = ours(x, (h_0, c_0))
    states = list(zip(h_0, c_0, strict=True))
    with torch.no_grad():
        for t, output in enumerate(outputs.unbind(1)):
            seen = x[:, t]
            for k, cell in enumerate(cells):
                states[k] = cell(seen, *states[k])
                seen = states[k][0]
            torch.testing.assert_close(output, seen, rtol=1e-5, atol=1e-5)
    for k, (h, c) in enumerate(states):
        torch.testing.assert_close((h_n[k], c_n[k]), (h, c), rtol=1e-5, atol=1e-5)


def ndrplz(layers=2, **options):
    cells = [randomised(Joint(3 if k == 0 else 4, 4, (3, 5), **options)) for k in range(layers)]
    return Layers(*cells) if layers > 1 else cells[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("importer", [convert.from_ndrplz, convert.from_torchgeo])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_ndrplz_and_torchgeo(importer, layers, bias):
    source = ndrplz(layers, bias=bias)
    assert_same(source, importer(source.state_dict()))


@pytest.mark.parametrize("peepholes", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_automan000(layers, peepholes):
    triples = [[torch.randn(1, 4, *SIZE) for _ in range(3)] for _ in range(layers)]
    cells = [Automan000(3 if k == 0 else 4, 4, 3, *([triples[k]] if peepholes else ())) for k in range(layers)]
    source = Layers(*cells, name="cell{}") if layers > 1 else cells[0]
    ours = convert.from_automan000(source.state_dict(), peepholes=triples if peepholes else None)
    assert_same(source, ours)
    assert (ours.cells[0].peephole is not None) == peepholes


@pytest.mark.parametrize(("hidden", "groups"), [(8, 1), (16, 2), (24, 3)])
def test_jhhuang96(hidden, groups):
    """F of 8 and 24: groups of 32 rows that reach across gates."""
    source = randomised(Joint(3, hidden, (5, 5), "ifgo", groups))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"stage1": nn.Conv2d(1, 1, 1), "rnn1": source})})
    ours = convert.from_jhhuang96(model.state_dict(), prefix="encoder.rnn1.")
    assert_same(source, ours, hidden=hidden)
    assert ours.last_backend == "reference"


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_openstl(layers, layer_norm):
    cells = [randomised(OpenSTL(3 if k == 0 else 4, 4, 5, layer_norm)) for k in range(layers)]
    source = Layers(*cells) if layers > 1 else cells[0]
    assert_same(source, convert.from_openstl(source.state_dict()))


def test_openstl_model_has_a_readout_of_its_own():
    source = Layers(OpenSTL(3, 4, 3, False))
    source.conv_last = nn.Conv2d(4, 3, 1, bias=False)
    with pytest.raises(ValueError, match=r"unknown keys \['conv_last.weight'\]"):
        convert.from_openstl(source.state_dict())
    assert_same(source, convert.from_openstl(source.state_dict(), prefix="cell_list."))


@pytest.mark.parametrize("bias", [True, False])
def test_flax(bias):
    source = Flax(3, 4, 3, bias)
    ours = convert.from_flax(source.params())
    assert_same(source, ours)
    assert_same(source, convert.from_flax(source.params()["params"]))


@pytest.fixture(scope="module")
def keras():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        return pytest.importorskip("keras")


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (5, 1), "use_bias": False},
        {"kernel_size": 3, "dilation_rate": 2},
        {"kernel_size": 1, "padding": "valid"},
        {"kernel_size": 3, "data_format": "channels_first", "dropout": 0.5},
    ],
    ids=str,
)
def test_keras_itself(keras, settings):
    first = settings.get("data_format") == "channels_first"
    layer = keras.layers.ConvLSTM2D(
        4, **{"padding": "same", **settings}, return_sequences=True, return_state=True, bias_initializer="normal"
    )
    x = torch.randn(2, 4, 3, *SIZE)
    outputs = [t.detach() if first else t.detach().movedim(-1, -3) for t in layer(x if first else x.movedim(-3, -1))]
    sources = [layer, layer.get_weights()] if "dilation_rate" not in settings else [layer]  # which no weight tells
    for source in sources:
        got, (h_n, c_n) = convert.from_keras(source)(x)
        torch.testing.assert_close([got, h_n[0], c_n[0]], outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got padding='valid', wanted 'same'"),
        ({"padding": "same", "strides": 2}, r"got strides=\(2, 2\)"),
        ({"padding": "same", "recurrent_activation": "hard_sigmoid"}, "got recurrent_activation='hard_sigmoid'"),
        ({"padding": "same", "activation": "relu"}, "got activation='relu'"),
        ({"padding": "same", "go_backwards": True}, "got go_backwards=True"),
        ({"padding": "same"}, "got 0 weights"),  # not built
    ],
)
def test_keras_settings_that_cannot_be_had(keras, settings, message):
    with pytest.raises(ValueError, match=message):
        convert.from_keras(keras.layers.ConvLSTM2D(4, 3, **settings))


def test_state_dict_from_a_file_and_nothing_but_weights(tmp_path):
    source = ndrplz()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    assert_same(source, convert.from_ndrplz(tmp_path / "weights.pt"))
    torch.save(source, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert.from_ndrplz(str(tmp_path / "module.pt"))


def test_weights_are_copies_in_their_own_dtype():
    source = ndrplz(1).double()
    ours = convert.from_ndrplz(source.state_dict(), batch_first=False, backend="reference", recompute=True)
    assert (ours.cells[0].bias.dtype, ours.batch_first, ours.recompute) == (torch.float64, False, True)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    with torch.no_grad():
        for p in source.parameters():
            p.zero_()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in ours.named_parameters())
    assert convert.from_ndrplz(source.state_dict(), dtype=torch.float32).cells[0].bias.dtype == torch.float32


def test_layers_of_different_width_are_imported_one_by_one():
    source = Layers(Joint(3, 4, (3, 3)), Joint(4, 6, (3, 3)))
    with pytest.raises(ValueError, match=r"layer 1: got shapes .*one by one, layers=\[0\]"):
        convert.from_ndrplz(source.state_dict())
    parts = [convert.from_ndrplz(source.state_dict(), layers=[k]) for k in range(2)]
    assert_same(source.cells[0], parts[0])
    assert_same(source.cells[1], parts[1], channels=4, hidden=6)


WEIGHTS = {"conv.weight": torch.randn(16, 7, 3, 3), "conv.bias": torch.randn(16)}
KERNEL, RECURRENT, SHORT = torch.randn(3, 3, 3, 16), torch.randn(3, 3, 4, 16), torch.randn(3)
ONE_BIAS = {"ih": {"kernel": KERNEL, "bias": KERNEL}, "hh": {"kernel": RECURRENT}}
TWO_BIASES = {"ih": {"kernel": KERNEL, "bias": KERNEL[0, 0, 0]}, "hh": {"kernel": RECURRENT, "bias": SHORT[:1]}}
GATES = Automan000(3, 4, 3).state_dict()
NO_CELL_0 = {f"cell_list.1.{name}": w for name, w in WEIGHTS.items()}

# what: (error, words of the message, importer, its argument, options)
BAD = {
    "unknown": (
        ValueError,
        r"missing keys \[\], unknown keys \['conv.scale', 'readout'\]",
        convert.from_ndrplz,
        {**WEIGHTS, "conv.scale": SHORT, "readout": SHORT},
        {},
    ),
    "missing": (ValueError, r"missing keys \['m.conv.weight'\]", convert.from_ndrplz, {"m.conv.bias": SHORT}, {"prefix": "m."}),
    "nothing": (ValueError, r"no weights of layers \[0\] with prefix 'x.'", convert.from_ndrplz, WEIGHTS, {"prefix": "x."}),
    "no such layer": (ValueError, r"no weights of layers \[1\].*got \[0\]", convert.from_ndrplz, WEIGHTS, {"layers": [0, 1]}),
    "a layer left out": (ValueError, r"no weights of layers \[0\]", convert.from_ndrplz, NO_CELL_0, {}),
    "no mapping": (TypeError, "state_dict: got list", convert.from_ndrplz, [], {}),
    "no tensor": (TypeError, "state_dict: got dict for 'conv.weight'", convert.from_ndrplz, {"conv.weight": {}}, {}),
    "rows": (ValueError, "multiple of 4 rows", convert.from_ndrplz, {"conv.weight": torch.randn(15, 7, 3, 3)}, {}),
    "an option with weights": (TypeError, "mix: got an option that the weights decide", convert.from_ndrplz, WEIGHTS, {"mix": "gate"}),
    "layers to make": (TypeError, "num_layers: got an option", convert.from_ndrplz, WEIGHTS, {"num_layers": 2}),
    "no bias": (TypeError, "bias: got an option", convert.from_ndrplz, WEIGHTS, {"bias": False}),
    "kernels": (TypeError, "kernels: got an option", convert.from_torchgeo, WEIGHTS, {"kernels": {3: 4}}),
    "hidden kernels": (TypeError, "hidden_kernels: got an option", convert.from_ndrplz, WEIGHTS, {"hidden_kernels": {3: 4}}),
    "no effect": (TypeError, "forget_bias: got an option", convert.from_ndrplz, WEIGHTS, {"forget_bias": 2.0}),
    "no effect either": (TypeError, "output_peephole: got an option", convert.from_ndrplz, WEIGHTS, {"output_peephole": "current"}),
    "what keras decides": (TypeError, "dilation: got an option", convert.from_keras, [KERNEL, RECURRENT], {"dilation": 2}),
    "a number of layers": (TypeError, "layers: got 0, wanted a list", convert.from_ndrplz, WEIGHTS, {"layers": 0}),
    "no layers": (ValueError, "layers: got none", convert.from_ndrplz, WEIGHTS, {"layers": []}),
    "1-d weight": (ValueError, r"got a weight of \[16\], wanted \[4F, C\+F", convert.from_ndrplz, {"conv.weight": torch.randn(16)}, {}),
    "0-d weight": (ValueError, "multiple of 4 rows", convert.from_ndrplz, {"conv.weight": torch.randn(())}, {}),
    "no input": (ValueError, r"got a weight of \[16, 4, 3, 3\]", convert.from_ndrplz, {"conv.weight": torch.randn(16, 4, 3, 3)}, {}),
    "1-d weights": (ValueError, "layer 0: got shapes", convert.from_openstl, dict.fromkeys(convert.OPENSTL.names, torch.randn(16)), {}),
    "gates that differ": (ValueError, "got shapes .*Wxi.*the same", convert.from_automan000, {**GATES, "Wxi.weight": SHORT}, {}),
    "biases that differ": (ValueError, r"biases of shapes \[\[16\], \[1\]\]", convert.from_flax, TWO_BIASES, {}),
    "few gates": (ValueError, "got 4F=16 rows of gates, wanted at least 32", convert.from_jhhuang96, Joint(3, 4, (3, 3), groups=1).state_dict(), {}),
    "under state_dict": (ValueError, "the weights are under 'state_dict'", convert.from_ndrplz, {"epoch": 3, "state_dict": WEIGHTS}, {}),
    "prefixed": (ValueError, r"did you mean prefix='module.'\?", convert.from_ndrplz, {f"module.{n}": w for n, w in WEIGHTS.items()}, {}),
    "layers, prefixed": (ValueError, r"did you mean prefix='module.'\?", convert.from_ndrplz, {f"module.{n}": w for n, w in NO_CELL_0.items()}, {}),
    "prefix too much": (ValueError, r"did you mean prefix=''\?", convert.from_ndrplz, WEIGHTS, {"prefix": "x."}),
    "several prefixes": (ValueError, r"prefix='a.' or prefix='b.'\?", convert.from_ndrplz, {f"{p}.{n}": w for p in "ab" for n, w in WEIGHTS.items()}, {}),
    "flax has no prefix": (ValueError, r"unknown keys \['cell.hh.kernel', 'cell.ih.kernel'\]$", convert.from_flax, {"cell": {"hh": {"kernel": RECURRENT}, "ih": {"kernel": KERNEL}}}, {}),
    "one of two biases": (ValueError, r"missing keys \['hh.bias'\]", convert.from_flax, ONE_BIAS, {}),
    "flax module": (TypeError, "params: got int", convert.from_flax, 1, {}),
    "even kernel": (ValueError, "wanted odd", convert.from_keras, [KERNEL[:2], RECURRENT], {}),
    "1-d kernel": (ValueError, "kernel: got shape", convert.from_keras, [KERNEL[0], RECURRENT[0]], {}),
    "recurrent channels": (ValueError, "layer 0: got shapes", convert.from_keras, [KERNEL, RECURRENT[:, :, :3]], {}),
    "bias": (ValueError, "size mismatch for cells.0.bias", convert.from_keras, [KERNEL, RECURRENT, SHORT], {}),
    "one weight": (ValueError, "got 1 weights", convert.from_keras, [KERNEL], {}),
    "no layer": (TypeError, "layer: got int", convert.from_keras, 3, {}),
    "peepholes of no layer": (ValueError, "peepholes: got .* of 1 layers", convert.from_automan000, GATES, {"peepholes": []}),
    "no list of peepholes": (TypeError, "peepholes: got int", convert.from_automan000, GATES, {"peepholes": 3}),
    "a layer without peepholes": (TypeError, "peepholes: got list", convert.from_automan000, GATES, {"peepholes": [None]}),
    "peepholes of None": (TypeError, "peepholes: got NoneType, wanted", convert.from_automan000, GATES, {"peepholes": [[None] * 3]}),
    "1-d peepholes": (ValueError, "peepholes: got shapes", convert.from_automan000, GATES, {"peepholes": [[SHORT] * 3]}),
    "peepholes of a batch": (ValueError, "peepholes: got shapes", convert.from_automan000, GATES, {"peepholes": [[torch.randn(2, 4, 6, 5)] * 3]}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_an_error(case):
    error, words, importer, source, options = BAD[case]
    with pytest.raises(error, match=words):
        importer(source, **options)


def test_an_imported_layer_trains_like_any_other():
    ours = convert.from_ndrplz(ndrplz().state_dict())
    fresh = MKConvLSTM(3, {(3, 5): 4}, num_layers=2)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in fresh.named_parameters()}
    ours(torch.randn(1, 2, 3, *SIZE))[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
