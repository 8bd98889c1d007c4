"""Configuration -> who computes what in one step. Pure functions, no torch, no Triton: tested without a GPU."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .plan import Config, Problem, power_of_two


@dataclass(frozen=True)
class Part:
    """One convolution's share of a tile's sum: all its taps and channels."""

    channel_first: int  # the tile's output channels
    channel_end: int
    weight: int  # the first of its blocks of packed weights, one an iteration
    kernel_h: int
    kernel_w: int
    first_y: int  # where the first tap reads, relative to the pixel
    first_x: int
    step_y: int  # from tap to tap
    step_x: int
    depth: int  # channels of the image that it reads
    stride: int  # channels of the image
    image: int = 0  # which of several it reads
    first: int = 0  # the first channel that it reads

    def iterations(self, block_k: int) -> int:
        return self.kernel_h * self.kernel_w * -(-self.depth // block_k)


@dataclass(frozen=True)
class Segment(Part):
    """Iterations of one part for one block of pixels."""

    m_tile: int = 0
    k_first: int = 0
    k_last: int = 0
    slot: int = 0  # where the sum is stored
    is_first: int = 1  # of its sum
    is_last: int = 1
    finish_first: int = 0  # rows of what is then to be finished, where tiles are whole
    finish_end: int = 0

    def row(self) -> list[int]:
        """What a kernel reads of it."""
        return [
            self.m_tile, self.k_first, self.k_last, self.slot, self.is_first, self.is_last, self.finish_first,
            self.finish_end, self.weight, self.kernel_h, self.kernel_w, self.first_y, self.first_x, self.step_y,
            self.step_x, self.depth, self.image, self.stride, self.first,
        ]  # fmt: skip


@dataclass(frozen=True)
class Finish:
    """Channels of a tile, all of one part of what they become, to be finished once their sum is known."""

    m_tile: int  # these three where tiles are cut
    slot: int  # the first of its shares
    slots: int
    channel_first: int
    channel_end: int
    column_first: int  # where they lie in the tile
    part: int
    part_first: int  # its first channel
    part_channels: int

    def row(self) -> tuple[int, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Stage:
    """One of the products of a step, and what it is finished to."""

    tiles: list[list[Part]]  # of one block of pixels, each a sum of parts; of the mix those of the first gate alone
    sizes: tuple[int, ...]  # hidden channels of each part that it is finished to
    most: int  # channels that are finished at a time
    split: bool  # tiles are cut
    gate_stride: int | None = None  # of the mix: channels of the image from what one gate reads to the next gate's

    @property
    def gates(self) -> int:
        """How many gates' tiles there are for each of ``tiles``."""
        return 1 if self.gate_stride is None else 4


@dataclass(frozen=True)
class Schedule:
    """Who computes what in one stage of a step."""

    segments: tuple[Segment, ...]
    programs: tuple[int, ...]  # [programs + 1]: each program's first segment
    finishes: tuple[Finish, ...]  # of every tile where tiles are cut, else of those of one block of pixels
    slots: int

    @property
    def shares(self) -> list[tuple[Segment, ...]]:
        """Each program's segments."""
        return [self.segments[a:b] for a, b in zip(self.programs, self.programs[1:], strict=False)]


def forward_tiles(problem: Problem, config: Config) -> list[list[Part]]:
    """The tiles of one block of pixels, each the sum of one part, in the order of their packed weights."""
    tiles, weight, channel_0, channels = [], 0, 0, config.block_n // 4
    for k in problem.kernels:
        for first in range(0, k.channels, channels):
            end = min(first + channels, k.channels)
            part = Part(
                channel_0 + first, channel_0 + end, weight, k.height, k.width, -k.padding[0], -k.padding[1],
                *k.dilation, problem.hidden, problem.hidden,
            )  # fmt: skip
            tiles.append([part])
            weight += part.iterations(config.block_k)
        channel_0 += k.channels
    return tiles


def backward_tiles(problem: Problem, config: Config) -> list[list[Part]]:
    """As :func:`forward_tiles`; here a tile is a sum over all branches, and weights are packed branch by branch."""
    firsts = range(0, problem.hidden, config.block_n)
    tiles: list[list[Part]] = [[] for _ in firsts]
    weight = 0
    for n, k in enumerate(problem.kernels):
        for tile, first in zip(tiles, firsts, strict=True):
            end = min(first + config.block_n, problem.hidden)
            part = Part(
                first, end, weight, k.height, k.width, *k.padding, -k.dilation[0], -k.dilation[1],
                4 * k.channels, 4 * k.channels, n,
            )  # fmt: skip
            tile.append(part)
            weight += part.iterations(config.block_k)
    return tiles


def mix_tiles(problem: Problem, config: Config, weight: int) -> list[list[Part]]:
    """The mix's tiles for the first gate, forward or backward; weights are packed gate by gate from ``weight`` on."""
    tiles = []
    for first in range(0, problem.hidden, config.block_n):
        end = min(first + config.block_n, problem.hidden)
        part = Part(first, end, weight, 1, 1, 0, 0, 1, 1, problem.mix_depth, 4 * problem.hidden)
        tiles.append([part])
        weight += part.iterations(config.block_k)
    return tiles


def finish_n(problem: Problem, config: Config, backward: bool) -> int:
    """Channels that are finished at a time, a power of two; forward, four gates lie side by side in a tile."""
    widest = max(k.channels for k in problem.kernels)
    return power_of_two(widest, 1, config.block_n) if backward else config.block_n // 4


def stages(problem: Problem, config: Config, backward: bool) -> list[Stage]:
    """The products of a step in their order; the last one's sums become gates, or the gradients of gates.

    The mix is always cut: a tile of it belongs to one gate, and finishing needs all four.
    """
    each, most = tuple(k.channels for k in problem.kernels), finish_n(problem, config, backward)
    tiles = (backward_tiles if backward else forward_tiles)(problem, config)
    if not problem.mix:
        return [Stage(tiles, each, most, config.split)]
    whole, gate_stride = (problem.hidden,), problem.hidden if problem.mix == 4 else 0
    mixed = mix_tiles(problem, config, blocks(tiles, config.block_k))
    if backward:
        return [Stage(mixed, each, most, True, gate_stride), Stage(tiles, whole, most, config.split)]
    return [Stage(tiles, each, most, config.split), Stage(mixed, whole, most, True, gate_stride)]


def blocks(tiles: list[list[Part]], block_k: int) -> int:
    """Blocks of packed weights that ``tiles`` read."""
    return sum(part.iterations(block_k) for tile in tiles for part in tile)


def finishes(stage: Stage, tile: list[Part], m_tile: int = 0, slot: int = 0, slots: int = 1) -> list[Finish]:
    """A tile's channels, part by part."""
    start, stop = tile[0].channel_first, tile[0].channel_end
    pieces, part_first = [], 0
    for part, channels in enumerate(stage.sizes):
        part_end = part_first + channels
        for first in range(max(start, part_first), min(stop, part_end), stage.most):
            end = min(first + stage.most, stop, part_end)
            pieces.append(Finish(m_tile, slot, slots, first, end, first - start, part, part_first, channels))
        part_first = part_end
    return pieces


def schedule(problem: Problem, config: Config, stage: Stage, programs: int) -> Schedule:
    """Share the tiles of all blocks of pixels out to at most ``programs`` programs, evenly."""
    m_tiles, block_k = problem.m_tiles(config), config.block_k
    if not stage.split:
        return deal(stage, m_tiles, block_k, programs)
    if stage.gate_stride is None:
        return cut(stage, m_tiles, block_k, programs)
    return for_all_gates(cut(stage, m_tiles, block_k, max(1, programs // 4)), stage, block_k, programs)


def for_all_gates(s: Schedule, stage: Stage, block_k: int, programs: int) -> Schedule:
    """The schedule of one gate of the mix four times over: the four gates' slots lie side by side."""
    shares: list[list[Segment]] = [[] for _ in range(min(programs, 4 * len(s.shares)))]
    for n, share in enumerate(s.shares):
        for gate in range(4):
            weight, first = gate * blocks(stage.tiles, block_k), gate * stage.gate_stride
            shares[(4 * n + gate) % len(shares)] += [
                replace(x, slot=4 * x.slot + gate, weight=x.weight + weight, first=first) for x in share
            ]
    table = tuple(replace(f, slot=4 * f.slot) for f in s.finishes)
    return Schedule(flat(shares), starts(shares), table, 4 * s.slots)


def deal(stage: Stage, m_tiles: int, block_k: int, programs: int) -> Schedule:
    """Whole tiles, the heaviest first, each to the program that has least."""
    table, rows = [], []
    for tile in stage.tiles:
        pieces = finishes(stage, tile)
        rows.append((len(table), len(table) + len(pieces)))
        table += pieces
    work = sorted(
        ((m, tile, row) for tile, row in zip(stage.tiles, rows, strict=True) for m in range(m_tiles)),
        key=lambda item: -sum(part.iterations(block_k) for part in item[1]),
    )
    programs = min(programs, len(work))
    shares: list[list[Segment]] = [[] for _ in range(programs)]
    loads = [(0, p) for p in range(programs)]  # a heap
    for m, tile, (first, end) in work:
        load, p = loads[0]
        for n, part in enumerate(tile):
            count = part.iterations(block_k)
            shares[p].append(
                Segment(
                    **vars(part),
                    m_tile=m,
                    k_last=count,
                    slot=p,
                    is_first=n == 0,
                    is_last=n == len(tile) - 1,
                    finish_first=first,
                    finish_end=end,
                )
            )
            load += count
        heapq.heapreplace(loads, (load + TILE_COST, p))
    return Schedule(flat(shares), starts(shares), tuple(table), programs)


TILE_COST = 4  # iterations that starting and finishing a piece cost


def cut(stage: Stage, m_tiles: int, block_k: int, programs: int) -> Schedule:
    """All tiles' iterations in a row, cut into equal shares; a cut close to a tile's end moves there."""
    candidates = {programs, max(1, programs // m_tiles) * m_tiles if m_tiles <= programs else programs}
    best = None
    for count in sorted(candidates):
        for tolerance in (0.0, 0.05, 0.1, 0.15):
            shares, summed, slots = cut_evenly(m_tiles, stage.tiles, block_k, count, tolerance)
            cost = max(sum(s.k_last - s.k_first + TILE_COST * s.is_first for s in share) for share in shares)
            if best is None or cost < best[0]:
                best = cost, shares, summed, slots
    _, shares, summed, slots = best
    table = tuple(piece for tile, *place in summed for piece in finishes(stage, tile, *place))
    return Schedule(flat(shares), starts(shares), table, slots)


def cut_evenly(m_tiles: int, tiles: list[list[Part]], block_k: int, programs: int, tolerance: float):
    """Each program's segments, every tile's m_tile, first slot and slots, and the number of slots."""
    lengths = [sum(part.iterations(block_k) for part in tile) for tile in tiles]
    total = m_tiles * sum(lengths)
    programs = min(programs, total)
    share = total / programs
    ends = []  # of every tile, in iterations from the start
    for _ in range(m_tiles):
        for length in lengths:
            ends.append((ends[-1] if ends else 0) + length)
    cuts, tile = [0], 0
    for p in range(1, programs + 1):
        wanted = round(p * share)
        while tile < len(ends) - 1 and ends[tile] < wanted:
            tile += 1
        near = [e for e in ends[max(0, tile - 1) : tile + 1] if abs(e - wanted) <= tolerance * share]
        cuts.append(max(cuts[-1], min(near, key=lambda e: abs(e - wanted)) if near else wanted))
    shares: list[list[Segment]] = [[] for _ in range(programs)]
    summed, slot, position, p = [], 0, 0, 0
    for m in range(m_tiles):
        for tile_parts in tiles:
            first_slot, piece_program = slot, None
            for part in tile_parts:
                k, count = 0, part.iterations(block_k)
                while k < count:
                    while cuts[p + 1] <= position:
                        p += 1
                    size = min(count - k, cuts[p + 1] - position)
                    new = piece_program != p
                    if new and piece_program is not None:
                        slot += 1
                    shares[p].append(
                        Segment(**vars(part), m_tile=m, k_first=k, k_last=k + size, slot=slot, is_first=new, is_last=1)
                    )
                    if not new:
                        mark_unfinished(shares[p])
                    piece_program = p
                    k, position = k + size, position + size
            slot += 1
            summed.append((tile_parts, m, first_slot, slot - first_slot))
    return [s for s in shares if s], summed, slot


def mark_unfinished(share: list[Segment]) -> None:
    """The last but one segment's sum goes on in the last."""
    share[-2] = replace(share[-2], is_last=0)


def flat(shares: Sequence[Sequence[Segment]]) -> tuple[Segment, ...]:
    """All shares' segments in a row."""
    return tuple(segment for share in shares for segment in share)


def starts(shares: Sequence[Sequence[Segment]]) -> tuple[int, ...]:
    """Running total of the shares' lengths, from 0."""
    return tuple(accumulate(map(len, shares), initial=0))


@dataclass(frozen=True)
class Tables:
    """The schedules of all stages of a step as a kernel reads them."""

    segments: list[list[int]]  # program by program, of each stage by stage
    programs: tuple[int, ...]  # [programs * stages + 1]: the first segment of each program and stage
    finishes: list[tuple[int, ...]]  # stage by stage
    ends: tuple[int, ...]  # of each stage's finishes


def tables(schedules: Sequence[Schedule]) -> Tables:
    """Join the schedules of a step's stages."""
    ends = tuple(accumulate(len(s.finishes) for s in schedules))
    shares = []
    for p in range(max(len(s.shares) for s in schedules)):
        for s, end in zip(schedules, ends, strict=True):
            before = end - len(s.finishes)
            share = s.shares[p] if p < len(s.shares) else ()
            shares.append(
                [replace(x, finish_first=x.finish_first + before, finish_end=x.finish_end + before) for x in share]
            )
    rows = [segment.row() for segment in flat(shares)]
    return Tables(rows, starts(shares), [f.row() for s in schedules for f in s.finishes], ends)
