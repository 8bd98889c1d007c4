"""Other people's state dicts, taken apart into the weights of each cell; :mod:`convert` says what is made of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .files import load_tensors

StateDict = Mapping[str, Tensor] | str | os.PathLike


@dataclass(frozen=True)
class Format:
    """How an implementation names the weights of a cell."""

    names: tuple[str, ...]
    optional: tuple[str, ...] = ()  # all of them or none
    unused: tuple[str, ...] = ()  # may be there, but nothing is computed with them
    layer: str = r"(?:cell_list\.)?(\d+)\."  # what may stand before a cell's names; its group is the layer's number
    hints: bool = True  # whether its importer takes a checkpoint and a prefix, so that errors may speak of them


def read_cells(
    form: Format, state_dict: StateDict, prefix: str = "", layers: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """The weights of each cell by ``form``'s names, ``form.unused`` left out.

    Raises:
        ValueError, TypeError: as :func:`convert.from_ndrplz`.
    """
    check_layers(layers)
    if isinstance(state_dict, (str, os.PathLike)):
        state_dict = load_tensors(state_dict, "state_dict")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, wanted a mapping of tensors, or a file of one")
    cells: dict[int, dict[str, Tensor]] = {}
    heads: dict[int, str] = {}  # what stands before a cell's names
    unknown = []
    names = {name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)}
    alone = not any(re.match(form.layer, name) for name in names)
    for name, full in names.items():
        match = re.match("()" if alone else form.layer, name)
        if match is None:
            unknown.append(full)
            continue
        layer = int(match[1] or 0)
        heads[layer] = prefix + match[0]
        cells.setdefault(layer, {})[name[match.end() :]] = state_dict[full]
    hint = "" if any(cell.keys() & {*form.names} for cell in cells.values()) else where_weights_are(form, state_dict)
    wanted = range(max(cells, default=0) + 1) if layers is None else layers
    if absent := [layer for layer in wanted if layer not in cells]:
        found = f"with prefix {prefix!r}, got {sorted(cells)}"
        raise ValueError(f"state_dict: got no weights of layers {absent} {found}{hint}")
    missing = []
    for layer in wanted:
        head, cell = heads[layer], cells[layer]
        needed = {*form.names, *(form.optional if cell.keys() & {*form.optional} else ())}
        missing += [head + name for name in sorted(needed - cell.keys())]
        unknown += [head + name for name in cell if name not in {*needed, *form.unused}]
    if missing or unknown:
        raise ValueError(f"state_dict: missing keys {missing}, unknown keys {unknown}{hint}")
    for layer in wanted:
        for name, t in cells[layer].items():
            if not isinstance(t, Tensor):
                raise TypeError(f"state_dict: got {type(t).__name__} for {heads[layer] + name!r}, wanted a tensor")
    return [{name: t.detach() for name, t in cells[layer].items() if name not in form.unused} for layer in wanted]


def check_layers(layers: Sequence[int] | None) -> None:
    """``layers`` is None or a list of one or more numbers.

    Raises:
        TypeError: it is neither. ValueError: it is empty.
    """
    if layers is None:
        return
    if not isinstance(layers, Sequence) or not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"layers: got {layers!r}, wanted a list of numbers of layers, or None for all")
    if not layers:
        raise ValueError("layers: got none, wanted at least one number of a layer, or None for all")


def where_weights_are(form: Format, state_dict: Mapping) -> str:
    """A hint to add to an error: where else ``state_dict`` holds weights by ``form``'s names, or ""."""
    if not form.hints:
        return ""
    for name, value in state_dict.items():
        if isinstance(value, Mapping) and prefixes_of(form, value):
            return f"; the weights are under {name!r}: give that in place of the whole checkpoint"
    if prefixes := prefixes_of(form, state_dict):
        return "; did you mean " + " or ".join(f"prefix={prefix!r}" for prefix in prefixes) + "?"
    return ""


def prefixes_of(form: Format, names: Iterable[str]) -> list[str]:
    """What stands in ``names`` before the first of ``form``'s, the number of a layer left out."""
    tail = re.compile(rf"(|.*?\.)(?:{form.layer})?{re.escape(form.names[0])}")
    matches = (tail.fullmatch(name) for name in names if isinstance(name, str))
    return sorted({match[1] for match in matches if match})
