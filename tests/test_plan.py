"""Launch plans are arithmetic: they hold on any machine, for any problem."""

import random

import pytest

from mkconvlstm_cuda import _C

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def random_problem(rng):
    def size(largest):
        return rng.choice([1, 2, 3, 8, rng.randint(1, largest)])

    return {
        "batch": size(100_000),
        "channels": size(2048),
        "height": size(512),
        "width": size(512),
        "dtype": rng.choice(list(BYTES)),
        "layout": rng.choice(["channels_first", "channels_last", "strided"]),
        "peephole": rng.choice([None, "channel", "pixel"]),
        "max_vector_width": rng.choice([1, 2, 4, 8, 16]),
        "multiprocessors": rng.choice([1, 20, 108, 132]),
        "max_threads_per_multiprocessor": rng.choice([1024, 1536, 2048]),
    }


def test_random_problems():
    rng = random.Random(0)
    for _ in range(5000):
        problem = random_problem(rng)
        plan = _C.plan(**problem)
        image = problem["channels"] * problem["height"] * problem["width"]
        context = f"{problem} -> {plan}"

        # A device's limits, and one wave of blocks at most where there are fewer images than blocks.
        assert 1 <= plan.threads <= 256, context
        assert plan.threads % 32 == 0, context
        assert 1 <= plan.blocks_y <= min(65535, problem["batch"]), context
        resident = problem["multiprocessors"] * (problem["max_threads_per_multiprocessor"] // plan.threads)
        assert 1 <= plan.blocks_x * plan.blocks_y <= resident, context

        # Vectors cover an image exactly, stay within 16 bytes, and no block is without work.
        assert plan.vector_width * plan.vectors_per_image == image, context
        assert plan.vector_width in (1, 2, 4, 8), context
        assert plan.vector_width * BYTES[problem["dtype"]] <= 16, context
        assert plan.vector_width <= problem["max_vector_width"], context
        assert (plan.blocks_x - 1) * plan.threads < plan.vectors_per_image, context

        # A vector never leaves the run of neighbours that all operands share.
        if problem["layout"] == "channels_last":
            assert problem["channels"] % plan.vector_width == 0, context
        elif problem["layout"] == "strided":
            assert plan.vector_width == 1, context
        elif problem["peephole"] == "channel":
            assert problem["height"] * problem["width"] % plan.vector_width == 0, context


def test_paper_size():
    plan = _C.plan(batch=10, channels=256, height=14, width=14, dtype="bfloat16")
    assert plan.vector_width == 8
    elements = 10 * 256 * 14 * 14
    assert plan.bytes_forward == elements * (13 * 2 + 2 * 4)
    assert plan.bytes_backward == elements * (10 * 2 + 4 * 4)
    # 196 pixels are 24 vectors and a half: one weight a channel allows half the width.
    assert _C.plan(batch=10, channels=256, height=14, width=14, dtype="bfloat16", peephole="channel").vector_width == 4


@pytest.mark.parametrize("empty", ["batch", "channels", "height", "width"])
def test_empty_problem_launches_nothing(empty):
    plan = _C.plan(**{"batch": 2, "channels": 3, "height": 4, "width": 5, empty: 0})
    assert plan.blocks_x == plan.blocks_y == plan.bytes_forward == plan.bytes_backward == 0


def test_more_than_2_to_31_elements_over_the_batch():
    plan = _C.plan(batch=2**20, channels=256, height=128, width=128, dtype="float16")
    assert plan.bytes_forward == 2**20 * 256 * 128 * 128 * 34


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"batch": -1}, "must not be negative"),
        ({"channels": 2**15, "height": 2**8, "width": 2**8}, r"below 2\^31"),
        ({"channels": 2**40, "height": 2**40}, "too large"),
        ({"batch": 2**62}, "too large"),
        ({"dtype": "int8"}, "dtype must be one of 'float64', 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"layout": "tiled"}, "layout must be one of"),
        ({"peephole": "row"}, "peephole must be one of"),
        ({"multiprocessors": 0}, "multiprocessor"),
        ({"max_vector_width": 0}, "max_vector_width"),
    ],
)
def test_refusals(problem, message):
    with pytest.raises(ValueError, match=message):
        _C.plan(**{"batch": 2, "channels": 3, "height": 4, "width": 5, **problem})


def test_repr_shows_every_field():
    text = repr(_C.plan(batch=2, channels=3, height=4, width=5))
    assert text.startswith("GateStepPlan(vector_width=4, vectors_per_image=15, threads=32, blocks_x=1, blocks_y=2, ")
