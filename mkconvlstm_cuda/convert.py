"""Other people's ConvLSTMs as an :class:`MKConvLSTM` that computes the same from the same weights.

A layer comes back as ``[B, T, C, H, W]`` in, ``[B, T, F, H, W]`` out, whatever layout its origin had. ``options`` are
those of :class:`MKConvLSTM` that the weights leave open (``batch_first``, ``dropout``, ``recompute``, ``backend``,
``device``, ``dtype``), no others; dtype and device are the weights' own unless given.

Where a function takes a state dict, that is a mapping from names to tensors, or a file that ``torch.save`` wrote,
which is read with ``weights_only=True``. Only names that start with ``prefix`` are looked at, so that a layer can be
taken out of a whole model's state dict; all of those have to be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from .checkpoints import Format, StateDict, read_cells
from .layer import MKConvLSTM
from .transition import Branch

GATES = "ifgo"  # our order of the rows [4F]
INPUT, HIDDEN = (f"{side}_transition.branches.0.conv.weight" for side in ("input", "hidden"))
OPTIONS = ("batch_first", "dropout", "recompute", "backend", "device", "dtype")

NDRPLZ = Format(("conv.weight",), optional=("conv.bias",))
AUTOMAN000 = Format(
    tuple(f"W{side}{gate}.weight" for side in "xh" for gate in "ifco"),
    optional=tuple(f"Wx{gate}.bias" for gate in "ifco"),
    layer=r"cell(\d+)\.",
)
JHHUANG96 = Format(("conv.0.weight", "conv.0.bias", "conv.1.weight", "conv.1.bias"))
OPENSTL = Format(
    ("conv_x.0.weight", "conv_h.0.weight"),
    optional=("conv_x.1.weight", "conv_x.1.bias", "conv_h.1.weight", "conv_h.1.bias"),
    unused=("conv_o.0.weight", "conv_o.1.weight", "conv_o.1.bias", "conv_last.weight"),
)
FLAX = Format(("ih.kernel", "hh.kernel"), optional=("ih.bias", "hh.bias"), hints=False)


def from_ndrplz(
    state_dict: StateDict, *, prefix: str = "", layers: Sequence[int] | None = None, **options
) -> MKConvLSTM:
    """A ``ConvLSTM`` or ``ConvLSTMCell`` of ndrplz/ConvLSTM_pytorch: one convolution over cat[x, h], gates i f o g.

    Args:
        state_dict: ``cell_list.{L}.conv.weight`` [4F, C+F, k, k] and, if it has one, ``.bias`` [4F]; without
            ``cell_list.{L}.`` for a single cell.
        prefix: what stands before those names in a whole model's state dict.
        layers: numbers of the layers wanted; None for all. The others are not looked at.
        options: of :class:`MKConvLSTM`, those in OPTIONS.

    Returns:
        The layer, with ``num_layers`` as many as there were.

    Raises:
        ValueError: names are missing or unknown (all are listed); a shape is wrong; or the layers differ in hidden
            channels or kernel size, which those of one MKConvLSTM do not: then import each on its own.
        TypeError: the state dict is neither a mapping to tensors nor a file, or an option is not in OPTIONS.
    """
    cells = read_cells(NDRPLZ, state_dict, prefix, layers)
    return build([joint(cell["conv.weight"], cell.get("conv.bias"), "ifog") for cell in cells], options)


def from_torchgeo(
    state_dict: StateDict, *, prefix: str = "", layers: Sequence[int] | None = None, **options
) -> MKConvLSTM:
    """``torchgeo.models.ConvLSTM``, which names and orders its weights as :func:`from_ndrplz` says."""
    return from_ndrplz(state_dict, prefix=prefix, layers=layers, **options)


def from_automan000(
    state_dict: StateDict,
    *,
    peepholes: Sequence[Sequence[Tensor]] | None = None,
    prefix: str = "",
    layers: Sequence[int] | None = None,
    **options,
) -> MKConvLSTM:
    """A ``ConvLSTM`` or ``ConvLSTMCell`` of automan000/Convolutional_LSTM_PyTorch; o sees c_t (Shi et al. 2015).

    Args:
        state_dict: ``cell{L}.Wx{i,f,c,o}.weight`` [F, C, k, k] and ``.bias`` [F], ``Wh{i,f,c,o}.weight`` [F, F, k, k].
        peepholes: for each layer (Wci, Wcf, Wco), each [1, F, H, W], which no state dict of it holds; None for zeros,
            which is what it starts them from and leaves them at.

    Otherwise as :func:`from_ndrplz`.
    """
    cells = []
    for cell in read_cells(AUTOMAN000, state_dict, prefix, layers):
        ours = {
            INPUT: join_rows({f"Wx{gate}.weight": cell[f"Wx{gate}.weight"] for gate in "ifco"}),
            HIDDEN: join_rows({f"Wh{gate}.weight": cell[f"Wh{gate}.weight"] for gate in "ifco"}),
        }
        if "Wxi.bias" in cell:
            ours["bias"] = join_rows({f"Wx{gate}.bias": cell[f"Wx{gate}.bias"] for gate in "ifco"})
        cells.append(ours)
    if peepholes is None:
        return build(cells, options)
    check_peepholes(peepholes, len(cells))
    for cell, triple in zip(cells, peepholes, strict=True):
        cell["peephole"] = torch.cat([w.detach().reshape(1, *w.shape[-3:]) for w in triple])
    size = tuple(cells[0]["peephole"].shape[2:])
    return build(cells, options, peephole="pixel", output_peephole="current", image_size=size)


def check_peepholes(peepholes: Sequence[Sequence[Tensor]], layers: int) -> None:
    """``peepholes`` are (Wci, Wcf, Wco), each [1, F, H, W] or [F, H, W], of each of ``layers``.

    Raises:
        TypeError: one is no tensor. ValueError: there are more or fewer, or a shape is wrong.
    """
    wanted = f"wanted (Wci, Wcf, Wco), each [1, F, H, W], for each of {layers} layers"
    if not isinstance(peepholes, Sequence) or not all(isinstance(triple, Sequence) for triple in peepholes):
        raise TypeError(f"peepholes: got {type(peepholes).__name__} without three tensors a layer, {wanted}")
    if len(peepholes) != layers or any(len(triple) != 3 for triple in peepholes):
        raise ValueError(f"peepholes: got {[len(triple) for triple in peepholes]} tensors by layer, {wanted}")
    for triple in peepholes:
        if other := [type(w).__name__ for w in triple if not isinstance(w, Tensor)]:
            raise TypeError(f"peepholes: got {other[0]}, {wanted}")
        shapes = [list(w.shape) for w in triple]
        images = [shape[1:] if len(shape) == 4 and shape[0] == 1 else shape for shape in shapes]
        if len(images[0]) != 3 or any(image != images[0] for image in images):
            raise ValueError(f"peepholes: got shapes {shapes}, {wanted}")


def from_jhhuang96(state_dict: StateDict, *, prefix: str = "", **options) -> MKConvLSTM:
    """A ``CLSTM_cell`` of jhhuang96/ConvLSTM-PyTorch: one convolution over cat[x, h], then a group norm of its output.

    It is served by ``reference``: no weights stand for a norm of the sum. In that project's models the cells are
    ``encoder.rnn1.`` and so on: give that as ``prefix``. They take (T, B, C, H, W): ``batch_first=False``.

    Args:
        state_dict: ``conv.0.weight`` [4F, C+F, k, k] and ``.bias`` [4F], gates i f g o; ``conv.1.weight`` and
            ``.bias`` [4F] of the norm, which has 4F // 32 groups.

    Otherwise as :func:`from_ndrplz`.
    """
    cells = []
    for cell in read_cells(JHHUANG96, state_dict, prefix):
        ours = joint(cell["conv.0.weight"], cell["conv.0.bias"], GATES)
        cells.append(ours | {"gate_norm.weight": cell["conv.1.weight"], "gate_norm.bias": cell["conv.1.bias"]})
    rows = cells[0]["bias"].shape[0]
    groups = rows // 32
    if groups < 1 or rows % groups:
        wanted = "wanted at least 32, and as many in each of the norm's 4F // 32 groups"
        raise ValueError(f"state_dict: got 4F={rows} rows of gates, {wanted}")
    return build(cells, options, gate_norm=groups)


def from_openstl(
    state_dict: StateDict, *, prefix: str = "", layers: Sequence[int] | None = None, **options
) -> MKConvLSTM:
    """The cells of OpenSTL's ``ConvLSTM_Model``, or one ``ConvLSTMCell``; gates i f g o, no bias.

    With ``prefix="cell_list."`` the model's own ``conv_last.weight``, its readout, is not looked at. The cells'
    ``conv_o`` and ``conv_last`` are dropped: nothing is computed with them. With layer norm ``reference`` serves.

    Args:
        state_dict: ``cell_list.{L}.conv_x.0.weight`` [4F, C, k, k], ``conv_h.0.weight`` [4F, F, k, k]; with layer norm
            ``conv_x.1.weight``, ``conv_x.1.bias``, ``conv_h.1.weight``, ``conv_h.1.bias``, each [4F, H, W].

    Otherwise as :func:`from_ndrplz`.
    """
    cells, norm = [], {}
    for cell in read_cells(OPENSTL, state_dict, prefix, layers):
        ours = {INPUT: cell["conv_x.0.weight"], HIDDEN: cell["conv_h.0.weight"]}
        if "conv_x.1.weight" in cell:
            norm = {"norm": "layer_pixel", "image_size": tuple(cell["conv_x.1.weight"].shape[1:])}
            for ours_side, side in (("input", "conv_x"), ("hidden", "conv_h")):
                for part in ("weight", "bias"):
                    ours[f"{ours_side}_transition.branches.0.norm.{part}"] = cell[f"{side}.1.{part}"]
        cells.append(ours)
    return build(cells, options, **norm)


def from_keras(layer: Any, **options) -> MKConvLSTM:
    """Keras' ``ConvLSTM2D``, as the layer or as ``layer.get_weights()``; gates i f c o.

    A list of weights says nothing of how the layer was set up: it must have had ``padding="same"``, which is not
    Keras' default, strides and dilation of 1 and the default activations (Keras 2's default recurrent activation was
    another, "hard_sigmoid"). A layer's settings are checked, and its dilation is kept. Dropout is not: in inference
    it does nothing.

    Args:
        layer: the layer, built; or [kernel [k, k, C, 4F], recurrent_kernel [k, k, F, 4F]] and perhaps bias [4F].
        options: of :class:`MKConvLSTM`, those in OPTIONS.

    Raises:
        ValueError: the layer has a setting that MKConvLSTM has not, is not built, or a shape is wrong.
        TypeError: it is neither a layer nor a list of weights, or an option is not in OPTIONS.
    """
    dilation = (1, 1)
    if hasattr(layer, "get_config") and hasattr(layer, "get_weights"):
        dilation = check_keras(layer.get_config())
        layer = layer.get_weights()
    if not isinstance(layer, Sequence) or isinstance(layer, str):
        raise TypeError(f"layer: got {type(layer).__name__}, wanted a ConvLSTM2D or its list of weights")
    if len(layer) not in (2, 3):
        raise ValueError(f"layer: got {len(layer)} weights, wanted kernel, recurrent kernel and perhaps bias")
    kernel, recurrent, *bias = map(as_tensor, layer)
    cell = {INPUT: from_hwio("kernel", kernel), HIDDEN: from_hwio("recurrent_kernel", recurrent)}
    return build([cell | ({"bias": bias[0]} if bias else {})], options, dilation=dilation)


def check_keras(config: Mapping[str, Any]) -> tuple[int, int]:
    """The dilation of a ConvLSTM2D's ``config``, whose other settings are those of MKConvLSTM.

    Raises:
        ValueError: they are not.
    """
    size = tuple(config.get("kernel_size", ()))
    wanted = {"strides": (1, 1), "activation": "tanh", "recurrent_activation": "sigmoid", "go_backwards": False}
    if size != (1, 1):
        wanted["padding"] = "same"
    for name, value in wanted.items():
        got = config.get(name)
        if (tuple(got) if isinstance(got, list) else got) != value:
            raise ValueError(f"layer: got {name}={got!r}, wanted {value!r}, which is all that MKConvLSTM computes")
    return tuple(config["dilation_rate"])


def from_flax(params: Mapping[str, Any], **options) -> MKConvLSTM:
    """Flax' ``linen.ConvLSTMCell``; gates i g f o, two biases, and 1 added to f at run time, here to the bias.

    The cell must have had the default padding, "SAME", and strides of 1.

    Args:
        params: the cell's parameters, {"ih": {"kernel": [k, k, C, 4F], "bias": [4F]}, "hh": {"kernel": [k, k, F, 4F],
            "bias": [4F]}}, inside of "params" or not; biases on both sides or none.

    Otherwise as :func:`from_ndrplz`.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params: got {type(params).__name__}, wanted a mapping of parameters")
    (cell,) = read_cells(FLAX, {name.removeprefix("params."): as_tensor(leaf) for name, leaf in flatten(params)})
    weights = {ours: from_hwio(name, cell[name]) for ours, name in ((INPUT, "ih.kernel"), (HIDDEN, "hh.kernel"))}
    if "ih.bias" in cell and cell["ih.bias"].shape != cell["hh.bias"].shape:
        shapes = [list(cell[f"{side}.bias"].shape) for side in ("ih", "hh")]
        raise ValueError(f"params: got biases of shapes {shapes}, wanted [4F] twice")
    bias = cell["ih.bias"] + cell["hh.bias"] if "ih.bias" in cell else torch.zeros_like(weights[INPUT][:, 0, 0, 0])
    ours = {name: reorder(t, "igfo") for name, t in (*weights.items(), ("bias", bias))}
    ours["bias"].view(4, -1)[1] += 1
    return build([ours], options)


def build(
    cells: Sequence[dict[str, Tensor]], options: Mapping[str, Any], dilation: tuple[int, int] = (1, 1), **parts
) -> MKConvLSTM:
    """The layer whose cells have the state dicts ``cells``.

    ``options`` are the caller's, ``parts`` what the weights demand of MKConvLSTM; ``dilation`` is of the input's
    convolutions alone.

    Raises:
        TypeError: an option is not in OPTIONS.
        ValueError: a shape is wrong, or differs between layers.
    """
    if other := sorted(options.keys() - {*OPTIONS}):
        raise TypeError(f"{other[0]}: got an option that the weights decide, or that has no effect; wanted {OPTIONS}")
    weight = cells[0][INPUT]
    for layer, cell in enumerate(cells):
        shapes = {name: list(t.shape) for name, t in cell.items()}
        rows = shapes[INPUT][0] if len(shapes[INPUT]) == len(shapes[HIDDEN]) == 4 else 0
        hidden_channels = rows // 4
        if rows < 4 or rows % 4 or shapes[HIDDEN][:2] != [rows, hidden_channels]:
            raise ValueError(f"layer {layer}: got shapes {shapes}, wanted [4F, C, k, k] and [4F, F, k, k]")
        wanted = {name: list(t.shape) for name, t in cells[0].items()}
        if layer:
            wanted[INPUT][1] = hidden_channels
        if shapes != wanted:
            raise ValueError(
                f"layer {layer}: got shapes {shapes}, wanted {wanted}: the layers of one MKConvLSTM are alike. Import "
                "them one by one, layers=[0], layers=[1] and so on, and call one after the other"
            )
    hidden_channels, channels, *size = weight.shape
    hidden_channels //= 4
    layer = MKConvLSTM(
        channels,
        [Branch(tuple(size), hidden_channels, dilation=dilation)],
        {tuple(cells[0][HIDDEN].shape[2:]): hidden_channels},
        num_layers=len(cells),
        bias="bias" in cells[0],
        **{"dtype": weight.dtype, "device": weight.device, **options, **parts},
    )
    ours = {f"cells.{k}.{name}": t for k, cell in enumerate(cells) for name, t in cell.items()}
    try:
        layer.load_state_dict(ours)
    except RuntimeError as error:  # a shape
        raise ValueError(str(error)) from error
    return layer


def joint(weight: Tensor, bias: Tensor | None, order: str) -> dict[str, Tensor]:
    """A cell of one convolution over cat[x, h], ``weight`` [4F, C+F, k, k]."""
    weight = reorder(weight, order)
    channels = weight.shape[1] - weight.shape[0] // 4 if weight.dim() == 4 else 0
    if channels < 1:
        raise ValueError(f"state_dict: got a weight of {list(weight.shape)}, wanted [4F, C+F, k, k]")
    cell = {INPUT: weight[:, :channels], HIDDEN: weight[:, channels:]}
    return cell if bias is None else cell | {"bias": reorder(bias, order)}


def reorder(t: Tensor, order: str) -> Tensor:
    """Rows [4F, ...] that go by gates in ``order``, in ours."""
    if t.dim() == 0 or t.shape[0] % 4:
        raise ValueError(f"state_dict: got a weight of {list(t.shape)}, wanted a multiple of 4 rows, one a gate")
    return t.unflatten(0, (4, -1))[[order.index(gate) for gate in GATES]].flatten(0, 1)


def join_rows(gates: Mapping[str, Tensor]) -> Tensor:
    """Rows [4F, ...] of four tensors [F, ...] of the same shape, by their names in the state dict."""
    shapes = {name: list(t.shape) for name, t in gates.items()}
    if any(not shape or shape != next(iter(shapes.values())) for shape in shapes.values()):
        raise ValueError(f"state_dict: got shapes {shapes}, wanted the same, [F, ...], for all four gates")
    return torch.cat(list(gates.values()))


def as_tensor(array: Any) -> Tensor:
    """A tensor as it is; an array of numpy, JAX or Keras as a copy."""
    return array if isinstance(array, Tensor) else torch.from_numpy(numpy.array(array))


def from_hwio(name: str, kernel: Tensor) -> Tensor:
    """[k, k, in, out] as [out, in, k, k]."""
    if kernel.dim() != 4:
        raise ValueError(f"{name}: got shape {list(kernel.shape)}, wanted [k, k, channels, 4F]")
    return kernel.permute(3, 2, 0, 1)


def flatten(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """(name, leaf) of nested mappings, names joined by dots."""
    pairs = []
    for name, value in tree.items():
        pairs += flatten(value, f"{path}{name}.") if isinstance(value, Mapping) else [(path + name, value)]
    return pairs
