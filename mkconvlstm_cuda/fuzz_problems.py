"""Random problems for :mod:`fuzz`: what a problem is, how one is drawn, and which are a little simpler than another."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

from .attention import FlowAttention
from .transition import Branch

LAYOUTS = ("contiguous", "channels last", "transposed", "sliced", "offset", "expanded")
OUTPUTS = ("output", "h_n", "c_n")
INPUTS = ("x", "h_0", "c_0", "flow")
PARAMETERS = (
    "input_transition", "hidden_transition", "input_transition.branches.0", "hidden_transition.branches.0", "mix",
    "bottleneck", "bias", "peephole", "attention",
)  # fmt: skip


class Kernel(NamedTuple):
    """One branch."""

    height: int = 1
    width: int = 1
    channels: int = 1
    bottleneck: int = 0  # 0: none
    dilation: int = 1
    pool: bool = False

    def branch(self) -> Branch:
        size = (self.height, self.width)
        return Branch(size, self.channels, self.bottleneck or None, self.pool, self.dilation)


@dataclass(frozen=True)
class Problem:
    """A layer, a call of it, and the gradients that are wanted. The defaults are the simplest values."""

    backend: str = "aten"
    dtype: str = "float64"
    autocast: str | None = None  # to this dtype; the parameters are float32 then
    tf32: bool = False  # what torch's switch for convolutions says, on GPUs
    batch: int = 1
    steps: int = 1
    channels: int = 1
    height: int = 1
    width: int = 1
    kernels: tuple[Kernel, ...] = (Kernel(),)
    hidden_kernels: tuple[Kernel, ...] | None = None
    mix: str | None = None
    mix_activation: str | None = None
    norm: str | None = None
    gate_norm: int | None = None
    peephole: str | None = None
    output_peephole: str = "previous"
    mask_channels: str | int | None = None  # of flow attention; None: there is none
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = True
    recompute: bool = False
    training: bool = False
    state: bool = False
    lengths: tuple[int, ...] | None = None
    x_layout: str = "contiguous"
    state_layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    gradients: bool = True  # False: inference
    outputs: tuple[str, ...] = OUTPUTS  # those with a gradient
    frozen: tuple[str, ...] = ()  # INPUTS, and parameters with one of PARAMETERS in their name, that want none
    twice: bool = False  # backward runs twice over a retained graph
    seed: int = 0  # of all values
    nudge: int = 0  # not 0: which draw of inputs close to the seed's own

    def options(self) -> dict:
        """What the layer is made with, but for its backend and dtype."""
        sized = self.peephole == "pixel" or self.norm == "layer_pixel"
        hidden = self.hidden_kernels
        return {
            "in_channels": self.channels,
            "kernels": [k.branch() for k in self.kernels],
            "hidden_kernels": None if hidden is None else [k.branch() for k in hidden],
            "image_size": (self.height, self.width) if sized else None,
            "attention": None if self.mask_channels is None else FlowAttention(mask_channels=self.mask_channels),
        } | {name: getattr(self, name) for name in LAYER_OPTIONS}

    def to_json(self) -> str:
        """The backend, and what else differs from the defaults."""
        simplest = asdict(Problem()) | {"backend": None}
        return json.dumps({k: v for k, v in asdict(self).items() if v != simplest[k]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: it is not what :meth:`to_json` writes.
        """
        try:
            values = json.loads(text)
            if not values:
                raise TypeError("there are none")
            for name in ("kernels", "hidden_kernels"):
                if values.get(name):
                    values[name] = tuple(Kernel(*k) for k in values[name])
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"problem: got {text!r}, wanted the fields of a problem: {error}") from error


LAYER_OPTIONS = (
    "mix", "mix_activation", "norm", "gate_norm", "peephole", "output_peephole", "num_layers", "bidirectional", "bias",
    "batch_first", "recompute",
)  # fmt: skip


def hidden_channels(kernels: Sequence[Kernel]) -> int:
    """F."""
    return sum(k.channels for k in kernels)


def cost(p: Problem) -> int:
    """Multiplications of forward, about."""
    taps = sum(k.height * k.width * k.channels for k in (*p.kernels, *(p.hidden_kernels or p.kernels)))
    hidden = hidden_channels(p.kernels)
    pixels = p.batch * p.steps * p.height * p.width * p.num_layers * (1 + p.bidirectional)
    return 4 * pixels * (taps * max(p.channels, hidden) + (4 * hidden**2 if p.mix else 0))


def draw_size(rng: random.Random, largest: int) -> int:
    """Mostly small; now and then up to ``largest``, and odd more often than not."""
    if rng.random() < 0.15:
        return min(largest, rng.randint(1, largest) | (rng.random() < 0.7))
    return rng.choice((1, 2, 3, 4, rng.randint(1, 9), rng.randint(1, 17)))


def draw_kernels(rng: random.Random, total: int | None = None) -> tuple[Kernel, ...]:
    """One to four branches, of ``total`` channels together if that is given."""
    count = min(rng.choice((1, 1, 2, 2, 2, 3, 4)), total or 4)
    sizes = [draw_size(rng, 70) for _ in range(count)]
    if total is not None:
        ends = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
        sizes = [b - a for a, b in pairwise(ends)]
    kernels = []
    for channels in sizes:
        height = rng.choice((1, 3, 3, 3, 5, 5, 7, 9))
        width = height if rng.random() < 0.7 else rng.choice((1, 3, 5, 7))
        bottleneck = draw_size(rng, 9) if rng.random() < 0.08 else 0
        dilation = rng.choice((2, 3)) if rng.random() < 0.08 else 1
        kernels.append(Kernel(height, width, channels, bottleneck, dilation, rng.random() < 0.02))
    return tuple(kernels)


def draw_regular(rng: random.Random, dtypes: Sequence[str]) -> Problem:
    """What most models have, and the fastest kernels alone serve: channels in eights, one or two kernel sizes, one
    within the other, no options, half types, and images of many tiles. Few other draws have all of it."""
    count = rng.choice((1, 2, 2))
    heights, widths = (sorted(rng.choice((1, 3, 3, 3, 5, 7)) for _ in range(count)) for _ in range(2))
    if rng.random() < 0.7:
        widths = heights
    kernels = [Kernel(h, w, 8 * rng.choice((1, 1, 1, 2, 3, 5, 9))) for h, w in zip(heights, widths, strict=True)]
    rng.shuffle(kernels)
    return Problem(
        dtype=rng.choice([d for d in dtypes if d.endswith("float16")] or list(dtypes)),
        channels=draw_size(rng, 20),
        height=rng.choice((draw_size(rng, 65), 8 * rng.randint(1, 16), rng.randint(60, 200))),
        width=rng.choice((draw_size(rng, 65), 16 * rng.randint(1, 16), rng.randint(60, 500))),
        kernels=tuple(kernels),
        bias=rng.random() < 0.8,
        state=rng.random() < 0.6,
    )


def draw_structure(rng: random.Random, dtypes: Sequence[str]) -> Problem:
    """The layer, and what compiled kernels depend on: options, channels, dtype, and an image size to begin with."""
    if rng.random() < 0.2:
        return draw_regular(rng, dtypes)
    kernels = draw_kernels(rng)
    mix = rng.choice(("gate", "full")) if rng.random() < 0.15 else None
    peephole = rng.choice((None, None, None, "channel", "pixel"))
    half = [d for d in dtypes if d.endswith("float16")]
    autocast = rng.choice(half) if half and "float32" in dtypes and rng.random() < 0.1 else None
    return Problem(
        dtype="float32" if autocast else rng.choice(list(dtypes)),
        autocast=autocast,
        tf32=rng.random() < 0.5,
        channels=draw_size(rng, 70),
        height=draw_size(rng, 65),
        width=draw_size(rng, 65),
        kernels=kernels,
        hidden_kernels=draw_kernels(rng, hidden_channels(kernels)) if rng.random() < 0.25 else None,
        mix=mix,
        mix_activation="tanh" if mix and rng.random() < 0.5 else None,
        norm=rng.choice(("batch", "batch", "group", "layer", "layer_pixel")) if rng.random() < 0.08 else None,
        gate_norm=1 if rng.random() < 0.02 else None,
        peephole=peephole,
        output_peephole="current" if peephole and rng.random() < 0.5 else "previous",
        mask_channels=rng.choice(("input", 1)) if rng.random() < 0.06 else None,
        bias=rng.random() < 0.8,
        state=rng.random() < 0.6,
    )


def draw_variant(rng: random.Random, p: Problem, most: int) -> Problem:
    """What a compiled kernel may depend on beside the structure ``p``, for calls of at most ``most`` multiplications.

    ``lengths`` that are not None say that its calls have some.
    """
    outputs = tuple(name for name in OUTPUTS if rng.random() < 0.6) or (rng.choice(OUTPUTS),)
    p = replace(
        p,
        batch=0 if rng.random() < 0.03 else draw_size(rng, 33),
        steps=draw_size(rng, 40),
        recompute=rng.random() < 0.25,
        gradient_layout=rng.choice(LAYOUTS),
        gradients=rng.random() < 0.9,
        outputs=outputs if rng.random() < 0.5 else OUTPUTS,
        lengths=() if rng.random() < 0.25 else None,
    )
    while cost(p) > most and max(p.batch, p.steps) > 1:
        name = max(("batch", "steps"), key=lambda n: getattr(p, n))
        p = replace(p, **{name: getattr(p, name) // 2})
    while cost(p) > most and max(p.height, p.width) > 1:
        p = replace(p, height=-(-p.height // 2), width=-(-p.width // 2))
    return p


def draw_call(rng: random.Random, p: Problem, most: int) -> Problem:
    """A call of the layer and the kernels that the variant ``p`` describes, of at most ``most`` multiplications."""
    wanting = rng.choice((1.0, 1.0, 0.5))
    p = replace(
        p,
        steps=draw_size(rng, 40),
        num_layers=rng.choice((1, 1, 1, 1, 1, 2, 3)),
        bidirectional=rng.random() < 0.12,
        batch_first=rng.random() < 0.85,
        training=rng.random() < 0.3,
        x_layout=rng.choice(LAYOUTS),
        state_layout=rng.choice(LAYOUTS),
        frozen=tuple(name for name in (*INPUTS, *PARAMETERS) if rng.random() > wanting),
        twice=rng.random() < 0.1,
        seed=rng.randrange(2**31),
    )
    while cost(p) > most and max(p.steps, p.num_layers) > 1:
        name = max(("num_layers", "steps"), key=lambda n: getattr(p, n))
        p = replace(p, **{name: getattr(p, name) // 2})
    if cost(p) > most:
        p = replace(p, bidirectional=False)
    if p.lengths is not None:
        p = replace(p, lengths=tuple(rng.randint(1, p.steps) for _ in range(p.batch)))
    return p


def simpler(p: Problem) -> Iterator[Problem]:
    """Problems a little simpler than ``p``, the boldest steps first."""
    for f in fields(p):
        value = getattr(p, f.name)
        if f.name in ("backend", "dtype", "seed") or value == f.default:
            continue
        values = [f.default]
        if f.name in ("kernels", "hidden_kernels"):
            values += list(simpler_kernels(value))
        elif isinstance(value, tuple):
            values += [value[:n] + value[n + 1 :] for n in range(len(value))] if f.name == "frozen" else []
        elif isinstance(value, int) and not isinstance(value, bool):
            values += [n for n in (value // 2, value - 1) if n > 0]
        for v in values:
            if v != value:
                yield from repaired(replace(p, **{f.name: v}))


def simpler_kernels(kernels: Sequence[Kernel]) -> Iterator[tuple[Kernel, ...]]:
    """One branch fewer, or one branch simpler."""
    for n, kernel in enumerate(kernels):
        before, after = tuple(kernels[:n]), tuple(kernels[n + 1 :])
        if before or after:
            yield (*before, *after)
        for name, value in kernel._asdict().items():
            least = Kernel._field_defaults[name]
            odd = name in ("height", "width")
            for v in dict.fromkeys((least, (value // 2) | odd, value - 1 - odd)):
                if least <= v < value:
                    yield (*before, kernel._replace(**{name: v}), *after)


def repaired(p: Problem) -> Iterator[Problem]:
    """``p`` with what no longer fits together made to fit; nothing where that cannot be."""
    if p.lengths is not None:
        lengths = [*p.lengths, *[p.steps] * p.batch][: p.batch]
        p = replace(p, lengths=tuple(min(n, p.steps) for n in lengths))
    if p.hidden_kernels is not None and hidden_channels(p.hidden_kernels) != hidden_channels(p.kernels):
        return
    if p.mix_activation and not p.mix:
        p = replace(p, mix_activation=None)
    if p.outputs:
        yield p
