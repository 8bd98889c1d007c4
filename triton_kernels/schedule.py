"""Configuration -> who computes what in one step. Pure functions, no torch, no Triton: tested without a GPU."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

from .plan import Config, Problem


@dataclass(frozen=True)
class Part:
    """One branch's share of a tile's sum: all its taps and channels."""

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
    image: int = 0  # which of several it reads

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
            self.step_x, self.depth, self.image,
        ]  # fmt: skip


@dataclass(frozen=True)
class Finish:
    """Channels of a tile, all of one branch, to be finished once its sum is known."""

    m_tile: int  # these three where tiles are cut
    slot: int  # the first of its shares
    slots: int
    channel_first: int
    channel_end: int
    column_first: int  # where they lie in the tile
    branch: int
    branch_first: int  # its first channel
    branch_channels: int

    def row(self) -> tuple[int, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Schedule:
    """Who computes what in one step."""

    segments: tuple[Segment, ...]
    programs: tuple[int, ...]  # [programs + 1]: each program's first segment
    finishes: tuple[Finish, ...]  # of every tile where tiles are cut, else of those of one block of pixels
    slots: int


def forward_tiles(problem: Problem, config: Config) -> list[list[Part]]:
    """The tiles of one block of pixels, each the sum of one part, in the order of their packed weights."""
    tiles, weight, channel_0, channels = [], 0, 0, config.block_n // 4
    for k in problem.kernels:
        for first in range(0, k.channels, channels):
            end = min(first + channels, k.channels)
            part = Part(
                channel_0 + first, channel_0 + end, weight, k.height, k.width, -k.padding[0], -k.padding[1],
                *k.dilation, problem.hidden,
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
                first, end, weight, k.height, k.width, *k.padding, -k.dilation[0], -k.dilation[1], 4 * k.channels, n
            )
            tile.append(part)
            weight += part.iterations(config.block_k)
    return tiles


def finishes(problem: Problem, tile: list[Part], m_tile: int = 0, slot: int = 0, slots: int = 1) -> list[Finish]:
    """A tile's channels, branch by branch."""
    first, end = tile[0].channel_first, tile[0].channel_end
    pieces, branch_first = [], 0
    for branch, k in enumerate(problem.kernels):
        a, b = max(first, branch_first), min(end, branch_first + k.channels)
        if a < b:
            pieces.append(Finish(m_tile, slot, slots, a, b, a - first, branch, branch_first, k.channels))
        branch_first += k.channels
    return pieces


def schedule(problem: Problem, config: Config, tiles: list[list[Part]], programs: int) -> Schedule:
    """Share the tiles of all blocks of pixels out to at most ``programs`` programs, evenly."""
    return (cut if config.split else deal)(problem, config, tiles, programs)


def deal(problem: Problem, config: Config, tiles: list[list[Part]], programs: int) -> Schedule:
    """Whole tiles, the heaviest first, each to the program that has least."""
    table, rows = [], []
    for tile in tiles:
        pieces = finishes(problem, tile)
        rows.append((len(table), len(table) + len(pieces)))
        table += pieces
    work = sorted(
        ((m, tile, row) for tile, row in zip(tiles, rows, strict=True) for m in range(problem.m_tiles(config))),
        key=lambda item: -sum(part.iterations(config.block_k) for part in item[1]),
    )
    programs = min(programs, len(work))
    shares: list[list[Segment]] = [[] for _ in range(programs)]
    loads = [(0, p) for p in range(programs)]  # a heap
    for m, tile, (first, end) in work:
        load, p = loads[0]
        for n, part in enumerate(tile):
            count = part.iterations(config.block_k)
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
    return Schedule(tuple(s for share in shares for s in share), starts(shares), tuple(table), programs)


TILE_COST = 4  # iterations that starting and finishing a piece cost


def cut(problem: Problem, config: Config, tiles: list[list[Part]], programs: int) -> Schedule:
    """All tiles' iterations in a row, cut into equal shares; a cut close to a tile's end moves there."""
    m_tiles = problem.m_tiles(config)
    candidates = {programs, max(1, programs // m_tiles) * m_tiles if m_tiles <= programs else programs}
    best = None
    for count in sorted(candidates):
        for tolerance in (0.0, 0.05, 0.1, 0.15):
            shares, summed, slots = cut_evenly(m_tiles, tiles, config.block_k, count, tolerance)
            cost = max(sum(s.k_last - s.k_first + TILE_COST * s.is_first for s in share) for share in shares)
            if best is None or cost < best[0]:
                best = cost, shares, summed, slots
    _, shares, summed, slots = best
    table = tuple(piece for tile, *place in summed for piece in finishes(problem, tile, *place))
    return Schedule(tuple(s for share in shares for s in share), starts(shares), table, slots)


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


def starts(shares: list[list[Segment]]) -> tuple[int, ...]:
    """Running total of the shares' lengths, from 0."""
    out = [0]
    for share in shares:
        out.append(out[-1] + len(share))
    return tuple(out)
