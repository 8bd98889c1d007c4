"""The plan of the recurrence on Hopper: which products, in which order, on what memory."""

import contextlib
import random

import pytest
import torch

from mkconvlstm_cuda import _C, sm90
from mkconvlstm_cuda.convolution import BranchWeights, TransitionWeights

TILE_ROWS, STAGE_BYTES, ROW_BYTES = 128, 16384, 128
CHUNK_BYTES = TILE_ROWS * 16 * 4  # of sums or cells
GATES_BYTES = TILE_ROWS * 64 * 2  # of 16 hidden channels, on their way
ZERO_BYTES = 8 * ROW_BYTES

WORKLOADS = {
    "paper_mk35": {"batch": 10, "height": 14, "width": 14, "branches": [(3, 3, 128), (5, 5, 128)]},
    "paper_5": {"batch": 10, "height": 14, "width": 14, "branches": [(5, 5, 256)]},
    "ucf_mk35": {"batch": 10, "height": 14, "width": 14, "branches": [(3, 3, 256), (5, 5, 256)]},
    "mnist_57": {"batch": 16, "height": 16, "width": 16, "branches": [(5, 5, 64), (7, 7, 64)]},
    "radar_35": {"batch": 4, "height": 96, "width": 96, "branches": [(3, 3, 32), (5, 5, 32)]},
}


def random_problem(rng):
    kernels = [(rng.choice([1, 3, 5, 7]), rng.choice([1, 3, 5])) for _ in range(rng.choice([1, 2]))]
    return {
        "batch": rng.choice([1, 2, 7, 16]),
        "height": rng.randint(1, 40),
        "width": rng.choice([rng.randint(1, 40), rng.randint(100, 300), rng.randint(300, 3000)]),
        "branches": [(h, w, 8 * rng.randint(1, 20)) for h, w in kernels],
    }


def plans(plan=_C.plan_forward):
    """Plans of all workloads, and of those random problems that are served."""
    for problem in WORKLOADS.values():
        yield problem, plan(**problem)
    rng = random.Random(0)
    for _ in range(400):
        problem = random_problem(rng)
        with contextlib.suppress(ValueError):
            yield problem, plan(**problem)


def assert_memory_fits(problem, plan, more=0):
    boxes, stages = plan.box_slots * plan.box_bytes, plan.stages * STAGE_BYTES
    assert boxes + stages + ZERO_BYTES + more <= plan.shared_memory <= 232448, problem
    height, width = plan.tiling.box
    assert max(height, plan.chunk_width) <= 256, problem
    assert width <= plan.chunks * plan.chunk_width, problem
    assert plan.chunks * plan.chunk_width * height * ROW_BYTES <= plan.box_bytes, problem
    # Each chunk, and each box, begins where the swizzle of 8 rows does.
    assert plan.box_bytes % (8 * ROW_BYTES) == 0, problem
    assert plan.chunks == 1 or plan.chunk_width % 8 == 0, problem
    assert plan.chunks == 1 or height == 1, problem


def assert_boxes_are_there(problem, units, box_slots, run_ends):
    """Each box from its first use to its last, in the order in which they came.

    A box is given back once the next unit's has been entered, or its run ends.
    """
    held, left = [], None
    for i, unit in enumerate(units):
        if i == 0 or units[i - 1]["box"] != unit["box"]:
            assert unit["enters"], problem
        if unit["acquires"]:
            assert unit["box"] not in held, problem
            held.append(unit["box"])
            assert len(held) <= box_slots, problem
        if left is not None:
            assert left == held.pop(0), problem
        assert unit["box"] in held, problem
        left = unit["box"] if unit["releases"] else None
        if left is not None and i + 1 in run_ends:
            assert left == held.pop(0), problem
            left = None
    assert held == [], problem


def positions(kernel):
    """Taps (dy, dx) of a kernel (height, width)."""
    h, w = kernel
    return {(dy, dx) for dy in range(-(h // 2), h // 2 + 1) for dx in range(-(w // 2), w // 2 + 1)}


def in_pairs(tiles):
    return 2 * -(-tiles // 2)


def test_every_product_once():
    served = 0
    for problem, plan in plans():
        served += 1
        hidden = sum(channels for *_, channels in problem["branches"])
        units = plan.units
        done = {0: [], 1: []}
        run_ends = []
        for consumer in (0, 1):
            unit = 0
            for run in plan.runs(consumer):
                assert run["first"] == unit, problem
                unit += run["count"]
            run_ends.append(unit)
        assert run_ends == [len(units)] * 2, problem
        for run in plan.runs(0):
            for unit in units[run["first"] : run["first"] + run["count"]]:
                done[1].append((unit["box"], unit["tap"]))
                if run["columns"] == "both":
                    done[0].append((unit["box"], unit["tap"]))
                assert unit["rows"] == unit["tap"][0] * plan.tiling.line + unit["tap"][1], problem
        boxes = range(len(plan.boxes))
        for group in (0, 1):
            wanted = {(box, tap) for box in boxes for tap in positions(plan.groups[group]["kernel"])}
            assert len(done[group]) == len(wanted), problem
            assert set(done[group]) == wanted, problem
        assert sorted(channel for channel, _ in plan.boxes) == list(range(0, hidden, 64)), problem
        assert plan.tiles_m == in_pairs(plan.tiling.tiles), problem
        assert sum(g["channels"] for g in plan.groups) == hidden, problem
        assert all(g["channels"] <= 16 * plan.tiles_n for g in plan.groups), problem
    assert served > 300


def test_tiles_hold_every_pixel_once_and_their_boxes_all_neighbours():
    shapes = set()
    for make in (_C.plan_forward, _C.plan_backward):
        for problem, plan in plans(make):
            tiling, (height, width) = plan.tiling, (problem["height"], problem["width"])
            pixels = problem["batch"] * height * width
            rows_of_pixels = tiling.patch == (1, TILE_ROWS) and tiling.line == width
            shapes.add(tiling.patch if not rows_of_pixels else "rows")
            assert rows_of_pixels or tiling.tiles <= -(-pixels // TILE_ROWS) or width > 100, problem
            if pixels > 20000:
                continue
            placed = [[tiling.pixel(tile, row) for row in range(TILE_ROWS)] for tile in range(plan.tiles_m)]
            assert sorted(p for tile in placed for p in tile if p >= 0) == list(range(pixels)), problem
            # A tap moves all rows of a box alike: what it moves a pixel to is its neighbour, and lies in the box.
            box_height, box_width = tiling.box
            for row in range(TILE_ROWS):
                for unit in plan.units[:: max(1, len(plan.units) // 7)]:
                    assert 0 <= tiling.box_row(row) + unit["rows"] < box_height * box_width, problem
            reach_y, reach_x = (max(unit["tap"][axis] for unit in plan.units) for axis in (0, 1))
            for tile in placed[:: max(1, len(placed) // 5)]:
                at = {tiling.box_row(row): p for row, p in enumerate(tile) if p >= 0}
                for box_row, p in at.items():
                    right, below = at.get(box_row + 1), at.get(box_row + tiling.line)
                    assert reach_x == 0 or (p + 1) % width == 0 or right in (None, p + 1), problem
                    assert reach_y == 0 or p // width % height == height - 1 or below in (None, p + width), problem
            # Neighbouring rows of a tile lie in neighbouring rows of a box, 8 at a time: no two in the same banks.
            for row in range(0, TILE_ROWS, 8):
                first = tiling.box_row(row)
                assert [tiling.box_row(row + i) for i in range(8)] == list(range(first, first + 8)), problem
    assert len(shapes) > 2, shapes
    assert "rows" in shapes


def test_neighbours_are_mutual_and_hold_all_that_a_box_touches():
    checked = 0
    for make in (_C.plan_forward, _C.plan_backward):
        for problem, plan in plans(make):
            tiling = plan.tiling
            pixels = problem["batch"] * problem["height"] * problem["width"]
            if pixels > 8000:
                continue
            checked += 1
            near = {tile: tiling.neighbours(tile) for tile in range(tiling.tiles)}
            owner = {tiling.pixel(tile, row): tile for tile in near for row in range(TILE_ROWS)}
            taps = {unit["tap"] for unit in plan.units}
            height, width = problem["height"], problem["width"]
            for tile, others in near.items():
                assert tile in others, problem
                assert len(others) == len(set(others)), problem
                assert set(others) <= set(near), problem
                # Whoever reads what a tile writes is waited for before it is written again.
                assert all(tile in near[other] for other in others), problem
            for pixel in range(0, pixels, 7):
                y, x = pixel // width % height, pixel % width
                for dy, dx in taps:
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        assert owner[pixel + dy * width + dx] in near[owner[pixel]], problem
            if tiling.tiles % 2:  # a tile without pixels waits at most for itself, of those that there are
                assert set(tiling.neighbours(tiling.tiles)) & set(range(plan.tiles_m)) <= {tiling.tiles}, problem
    assert checked > 200


def test_images_that_leave_room_for_one_box_alone_are_cut_into_patches():
    for size in (241, 250, 257):
        for make in (_C.plan_forward, _C.plan_backward):
            plan = make(batch=4, height=size, width=size, branches=[(3, 3, 32), (5, 5, 32)])
            assert plan.patch[0] > 1
            assert plan.box_slots == 2


def test_wide_images_are_cut_into_patches():
    assert _C.plan_forward(**WORKLOADS["paper_mk35"]).tiling.patch == (1, TILE_ROWS)
    for width in (96, 960, 9600):
        for plan in (_C.plan_forward, _C.plan_backward):
            tiling = plan(**{**WORKLOADS["radar_35"], "width": width}).tiling
            assert tiling.patch == (8, 16)
            assert tiling.box == (12, 20)
    line = _C.plan_forward(batch=1, height=1, width=2**24, branches=[(3, 3, 8)]).tiling
    assert line.patch == (1, TILE_ROWS)
    assert line.box == (3, TILE_ROWS + 2)


def test_memory_is_there_when_it_is_used():
    slots = set()
    for problem, plan in plans():
        slots.add(plan.box_slots)
        assert_memory_fits(problem, plan, 2 * GATES_BYTES)
        assert 4 <= plan.stages <= 8, problem
        for consumer in (0, 1):
            run_ends = {run["first"] + run["count"] for run in plan.runs(consumer)}
            assert_boxes_are_there(problem, plan.units, plan.box_slots, run_ends)
    assert {1, 2} < slots


def test_dealing_keeps_blocks_busy():
    rotating = {}
    for make in (_C.plan_forward, _C.plan_backward):
        kinds = rotating[make.__name__] = set()
        for problem, plan in plans(make):
            # Two blocks of a cluster work at tiles of neighbouring pixels.
            assert plan.tiles_m % 2 == plan.blocks % 2 == 0, problem
            pairs, blocks = getattr(plan, "items", plan.tiles_m * plan.tiles_n) // 2, plan.blocks // 2
            rotates = plan.period % blocks != 0
            kinds.add(rotates)
            rounds = -(-pairs // 66)
            if rotates:
                assert (blocks, plan.period) == (66, pairs), problem
                assert rounds * 66 >= 1.05 * pairs, problem
            else:
                assert blocks <= pairs <= plan.period == rounds * blocks, problem
                assert pairs > (rounds - 1) * blocks, problem
            if make is _C.plan_forward:  # cells of another block are loaded only after what tells that they are there
                firsts = [plan.runs(consumer)[0] for consumer in (0, 1)]
                assert not rotates or not any(run["finishes_second"] or run["count"] == 0 for run in firsts), problem
    assert all(kinds == {True, False} for kinds in rotating.values()), rotating


@pytest.mark.parametrize("plan", [_C.plan_forward, _C.plan_backward])
def test_a_pair_of_multiprocessors_is_needed(plan):
    assert plan(**WORKLOADS["paper_mk35"], multiprocessors=3).blocks == 2
    with pytest.raises(ValueError, match="two multiprocessors"):
        plan(**WORKLOADS["paper_mk35"], multiprocessors=1)


def test_pixels_are_placed_without_a_division():
    rng = random.Random(0)
    most = 2**31 - 1
    sides = [1, 2, 3, 7, 14, 64, 1000, 46340, 46341, 65536, 65537, 2**30, most]
    for _ in range(20000):
        height, width = (rng.choice([*sides, rng.randint(1, 300)]) for _ in range(2))
        if height * width > most:
            height = 1
        near = rng.randint(0, most // width) * width + rng.randint(-1, 1)  # where a quotient changes
        pixel = min(max(rng.choice([rng.randint(0, most), near, most]), 0), most)
        line = pixel // width
        expected = (pixel // (height * width), line % height, pixel % width)
        assert _C.place_pixel(height, width, pixel) == expected, (height, width, pixel)


def test_every_product_of_a_gradient_once():
    served, slots = 0, set()
    for problem, plan in plans(_C.plan_backward):
        served += 1
        assert_memory_fits(problem, plan, 2 * plan.batch * CHUNK_BYTES + GATES_BYTES + 2 * CHUNK_BYTES)
        assert 1 <= plan.batch <= len(plan.pieces), problem
        done = []
        for piece in plan.pieces:
            units = plan.units[piece["first"] : piece["first"] + piece["count"]]
            assert units, problem
            slots.add(plan.box_slots)
            # Where there is room for one box, a run ends with it, which must not part two taps of a stage.
            assert plan.box_slots > 1 or plan.tile_channels == 128, problem
            run_ends = (
                {i + 1 for i, unit in enumerate(units) if unit["releases"]} if plan.box_slots == 1 else {len(units)}
            )
            assert_boxes_are_there(problem, units, plan.box_slots, run_ends)
            acquired = [unit["box"] for unit in units if unit["acquires"]]
            assert acquired == list(range(len(piece["boxes"]))), problem
            for unit in units:
                done.append((piece["boxes"][unit["box"]], unit["tap"]))
                assert unit["rows"] == unit["tap"][0] * plan.tiling.line + unit["tap"][1], problem
            # Two taps of 64 channels share a stage of weights, and pieces share none.
            assert plan.tile_channels == 128 or piece["first"] % 2 == 0, problem
        wanted = {
            ((part, gate), tap)
            for part, (*kernel, channels) in enumerate(problem["branches"])
            for gate in range(0, 4 * channels, 64)
            for tap in positions(kernel)
        }
        assert len(done) == len(wanted), problem
        assert set(done) == wanted, problem
        chunks = sum(-(-channels // 16) for *_, channels in problem["branches"])
        assert plan.tiles_n * plan.tile_channels // 16 >= chunks, problem
        assert plan.tiles_m == in_pairs(plan.tiling.tiles), problem
        assert plan.items == plan.tiles_m * plan.tiles_n * len(plan.pieces), problem
        assert plan.partial_bytes == plan.items * TILE_ROWS * plan.tile_channels * 4, problem
        assert plan.packed_bytes == plan.tiles_n * plan.stages_per_tile * STAGE_BYTES, problem
    assert served > 300
    assert slots == {1, 2}


def test_pieces_are_even():
    for pieces in range(1, 33):
        plan = _C.plan_backward(**WORKLOADS["paper_mk35"], pieces=pieces)
        counts = [piece["count"] for piece in plan.pieces]
        assert len(counts) == pieces
        assert max(counts) - min(counts) <= 1
    for pieces in (-1, 33):
        with pytest.raises(ValueError, match="so many pieces"):
            _C.plan_backward(**WORKLOADS["paper_mk35"], pieces=pieces)


def test_groups_are_finished_when_their_sums_are_complete():
    for problem, plan in plans():
        for consumer in (0, 1):
            runs = plan.runs(consumer)
            assert [r["finishes_first"] for r in runs].count(True) == 1, problem
            assert [r["finishes_second"] for r in runs].count(True) == 1, problem
            first = next(i for i, r in enumerate(runs) if r["finishes_first"])
            second = next(i for i, r in enumerate(runs) if r["finishes_second"])
            assert second <= first, problem
            assert all(r["columns"] == "second" for r in runs[first:]), problem
            # What the previous tile has to publish is finished before this consumer can wait for it.
            if second > 0:
                mixed = plan.boxes[plan.units[0]["box"]][1] != 1
                assert runs[0]["finishes_second_early"] == mixed, problem
                assert all(u["box"] == plan.units[0]["box"] for u in plan.units[: runs[second]["first"] + 1]), problem


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"branches": [(3, 3, 8)] * 3}, "one or two branches"),
        ({"branches": [(3, 3, 12)]}, "multiple of 8"),
        ({"branches": [(2, 3, 16)]}, "odd"),
        ({"branches": [(33, 33, 16)]}, "kernel is too large"),
        ({"height": 10**4, "width": 10**4}, "too many elements"),
        ({"branches": [(31, 3, 8), (31, 31, 8)]}, "kernel is too large"),
        ({"branches": [(3, 3, 4096)]}, "too many hidden channels"),
        ({"batch": 0}, "empty"),
        ({"batch": 10**7}, "too many elements"),
    ],
)
@pytest.mark.parametrize("plan", [_C.plan_forward, _C.plan_backward], ids=["forward", "backward"])
def test_refusals_say_why(plan, change, reason):
    with pytest.raises(ValueError, match=reason):
        plan(**{**WORKLOADS["paper_mk35"], **change})


def test_forward_alone_wants_one_kernel_within_the_other():
    problem = {**WORKLOADS["paper_mk35"], "branches": [(3, 5, 16), (5, 3, 16)]}
    with pytest.raises(ValueError, match="within the other"):
        _C.plan_forward(**problem)
    assert _C.plan_backward(**problem).pieces


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "float32"),
        ({"peephole": True}, "peepholes"),
        ({"mix": True}, "mix"),
        ({"dilation": (2, 2)}, "dilated"),
        ({"kernel": 2}, "odd"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_refusal_of_operands(change, reason, direction, monkeypatch):
    monkeypatch.setattr(sm90, "device_limits", lambda _: (132, 232448))
    options = {"dtype": torch.bfloat16, "peephole": False, "mix": False, "dilation": (1, 1), "kernel": 3} | change
    kernel, dtype = options["kernel"], options["dtype"]
    branch = BranchWeights(torch.zeros((32, 8, kernel, kernel), dtype=dtype), dilation=options["dilation"])
    hidden = TransitionWeights((branch,), mix=torch.zeros((32, 8, 1, 1)) if options["mix"] else None)
    z = [torch.zeros((2, 3, 32, 5, 4), dtype=dtype)]
    got = sm90.refusal(z, hidden, torch.zeros((3, 8, 1, 1)) if options["peephole"] else None, direction)
    assert got is None if reason is None else reason in got
