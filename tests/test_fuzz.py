"""``mkconvlstm check --fuzz``: it passes here, and it finds what is wrong."""

import contextlib
import random
from dataclasses import replace

import pytest
import torch
from mkconvlstm_cuda.bench import sanitize
from test_cli import run, wide  # noqa: F401  wide: a fixture

from mkconvlstm_cuda import _C, aten, cli, compiled, dispatch, fuzz, fuzz_calls, library
from mkconvlstm_cuda.fuzz_problems import Kernel, Problem, draw_call, draw_structure, draw_variant, simpler
from mkconvlstm_cuda.guards import guarded

CPU = torch.device("cpu")
DTYPES = ("float64", "float32", "float16", "bfloat16")
PROBLEM = Problem(
    dtype="float32", batch=3, steps=4, channels=2, height=5, width=3,
    kernels=(Kernel(3, 3, 2), Kernel(5, 1, 1)), state=True, lengths=(1, 4, 2), peephole="channel",
)  # fmt: skip


def test_three_hundred_random_problems_pass():
    assert " 0 failed" in run("check", "--device", "cpu", "--fuzz", "300")


def test_progress_is_shown_without_a_terminal(monkeypatch):
    monkeypatch.setattr(cli, "PROGRESS_SECONDS", 0.0)
    assert "1 of 2 problems, 0 failed" in run("check", "--device", "cpu", "--fuzz", "2")


def test_random_problems_pass_without_the_cpu_library(monkeypatch):
    monkeypatch.setattr(library, "load", lambda kind: f"no {kind} library today")
    _, failures = fuzz.run(30, 5, CPU, ["aten"], DTYPES)
    assert not failures


def drawn(count):
    for n in range(count):
        structure = draw_structure(random.Random(f"s{n}"), DTYPES)
        variant = draw_variant(random.Random(f"v{n}"), structure, 10**7)
        yield draw_call(random.Random(f"c{n}"), variant, 10**7)


def hopper_plans(problems):
    """What Hopper's streamed kernels would do forward and backward, of the problems that they serve."""
    for p in problems:
        plain = p.peephole is None and p.mix is None and p.hidden_kernels is None and p.norm is None
        if not plain or not p.dtype.endswith("float16") or any(k.bottleneck or k.dilation > 1 for k in p.kernels):
            continue
        branches = [(k.height, k.width, k.channels) for k in p.kernels]
        with contextlib.suppress(ValueError):
            sizes = {"batch": p.batch, "height": p.height, "width": p.width, "branches": branches}
            yield p, _C.plan_forward(**sizes), _C.plan_backward(**sizes)


def test_a_gpus_problems_reach_hoppers_kernels():
    variants = []
    for n in range(100):
        structure = draw_structure(random.Random(f"0/{n}"), DTYPES)
        variants += [
            draw_variant(random.Random(f"0/{n}/{v}"), structure, fuzz.MOST_MULTIPLICATIONS["cuda"]) for v in range(5)
        ]
    served = list(hopper_plans(variants))
    assert len(served) > 40
    for kind in range(2):
        plans = [plans[kind] for _, *plans in served]
        assert sum(plan.patch != (1, 128) for plan in plans) > 5
        assert sum(plan.tiling.tiles > 8 for plan in plans) > 5
        assert sum(plan.tiling.tiles % 2 for plan in plans) > 5
        assert any(plan.period % (plan.blocks // 2) for plan in plans)
        assert {1, 2} <= {min(2, plan.box_slots) for plan in plans}
    assert any(not p.gradients for p, *_ in served)
    full = [p.batch * p.height * p.width // 128 * -(-sum(k.channels for k in p.kernels) // 16) for p, *_ in served]
    assert sum(tiles >= 132 for tiles in full) > 3  # where "cuda" takes them backward, too


def test_sanitizers_look_at_all_that_hoppers_kernels_do():
    served = list(hopper_plans(sanitize.PROBLEMS))
    for kind in range(2):
        plans = [plans[kind] for _, *plans in served]
        assert {plan.patch == (1, 128) for plan in plans} == {True, False}
        assert any(plan.patch != (1, 128) and plan.tiling.tiles % 2 for plan in plans)
        assert any(plan.period % (plan.blocks // 2) for plan in plans)
    assert {p.gradients for p, forward, _ in served if forward.tiling.tiles > 2} == {True, False}


def test_problems_are_repeatable_and_as_wide_as_promised():
    problems = list(drawn(500))
    assert problems == list(drawn(500))
    assert all(Problem.from_json(p.to_json()) == p for p in [Problem(), *problems])
    for name in ("batch", "steps", "channels", "height", "width"):
        sizes = {getattr(p, name) for p in problems}
        assert {1, 2} < sizes
        assert max(sizes) > 20
    assert 0 in {p.batch for p in problems}
    for name in (
        "dtype", "autocast", "mix", "mix_activation", "norm", "peephole", "output_peephole", "mask_channels",
        "num_layers", "bidirectional", "bias", "batch_first", "recompute", "training", "state", "x_layout",
        "state_layout", "gradient_layout", "gradients", "outputs", "twice",
    ):  # fmt: skip
        assert len({getattr(p, name) for p in problems}) > 1, name
    assert any(p.lengths for p in problems)
    assert any(p.frozen for p in problems)
    assert any(p.hidden_kernels for p in problems)


def test_simpler_problems_end():
    for p in drawn(50):
        steps = 0
        while (after := next(simpler(p), None)) is not None:
            assert after != p
            p, steps = after, steps + 1
            assert steps < 200
        assert replace(p, seed=0, backend="aten", dtype="float64", hidden_kernels=None) == Problem()


def without_last_channel(gates, *args):
    """What forgets the last channel of h's gradient, where there are more than two."""
    c_n = compiled.gate_step_backward(gates, *args)
    if c_n.shape[1] > 2:
        gates[-1][:, -1] = 0
    return c_n


@pytest.mark.parametrize(
    ("wild", "times", "found"),
    [
        (lambda draw: True, 5, True),
        (lambda draw: draw < 2, 5, False),
        (lambda draw: draw == 2, float("nan"), True),
        (lambda draw: draw == 2, 40, True),
    ],
)
def test_an_error_beyond_its_limit_is_told_from_chance(wild, times, found, monkeypatch):
    """``wild``: in which draws, the first having the problem's own values, errors are so many ``times`` torch's."""
    problem = replace(PROBLEM, dtype="bfloat16", lengths=None)

    def compute(p, device):
        exact, own = (of(replace(p, backend="reference"), device) for of in (fuzz.exact_results, fuzz.torch_results))
        draw = (p.seed - problem.seed) // 1000
        factor = times if wild(draw) else 5 if draw == 0 else 1
        return {n: (exact[n] + factor * (t.double() - exact[n])).to(t.dtype) for n, t in own.items()}

    monkeypatch.setattr(fuzz, "DRAWS", 7)
    monkeypatch.setattr(fuzz, "compute", compute)
    failure = fuzz.examine(problem, CPU)
    assert (failure is not None) == found
    assert failure is None or "median" in failure.message


@pytest.mark.parametrize(("times", "moved", "found"), [(40, 5, False), (40, 3, True), (float("nan"), 1e9, True)])
@pytest.mark.parametrize("draw", [0, 2])
def test_an_error_far_beyond_its_limit_is_told_from_instability(draw, times, moved, found, monkeypatch):
    """In one draw errors are so many ``times`` torch's, by which inputs close by have moved exact results so much."""
    problem, exact_results = replace(PROBLEM, dtype="bfloat16", lengths=None), fuzz.exact_results

    def away(p, device, factor):
        exact, own = exact_results(p, device), fuzz.torch_results(p, device)
        return {n: exact[n] + factor * (t.double() - exact[n]) for n, t in own.items()}

    def compute(p, device):
        here = (p.seed - problem.seed) // 1000
        results = away(replace(p, backend="reference"), device, times if here == draw else 5 if here == 0 else 1)
        return {
            n: t.to(fuzz.torch_results(replace(p, backend="reference"), device)[n].dtype) for n, t in results.items()
        }

    monkeypatch.setattr(fuzz, "DRAWS", 3)
    monkeypatch.setattr(fuzz, "compute", compute)
    monkeypatch.setattr(
        fuzz, "exact_results", lambda p, device: away(replace(p, nudge=0), device, moved if p.nudge else 0)
    )
    assert (fuzz.examine(problem, CPU) is not None) == found


def test_values_close_by():
    p = replace(PROBLEM, dtype="float32")
    at, near, other = (
        fuzz_calls.values(q, (3, 4), "contiguous", 1, torch.float32, CPU)
        for q in (p, replace(p, nudge=1), replace(p, nudge=2))
    )
    assert 0 < float((near - at).norm() / at.norm()) < 4 * fuzz_calls.rounding(p, CPU)
    assert not torch.equal(near, other)


def test_a_wrong_backend_is_found_and_the_problem_shrunk(monkeypatch):
    def wrong(*args):
        return aten.backward(*args, gate_step_backward=without_last_channel)

    monkeypatch.setitem(dispatch.BACKENDS, "aten", replace(dispatch.BACKENDS["aten"], backward=wrong))
    failure = fuzz.examine(PROBLEM, CPU)
    assert failure.kind == "wrong"
    shrunk = fuzz.shrink(failure, CPU, seconds=60)
    p = shrunk.problem
    assert (p.batch, p.steps, p.channels, p.height, p.width, p.lengths, p.peephole) == (1, 1, 1, 1, 1, None, None)
    assert sum(k.channels for k in p.kernels) == 3
    output = run("check", "--device", "cpu", "--problem", p.to_json(), code=1)
    assert shrunk.message in output
    assert shrunk.command(CPU) in output
    assert fuzz.examine(replace(p, kernels=(Kernel(channels=2),)), CPU) is None


def writes_behind(z, *args):
    """A forward that writes one element behind h."""
    h, c = aten.forward(z, *args)
    if h.numel():
        flat = h.as_strided((1,), (1,), h.storage_offset() + h.numel())
        flat.fill_(1.0)
    return h, c


def reads_unwritten(z, *args):
    """A forward that leaves the last step of h unwritten."""
    h, c = aten.forward(z, *args)
    fresh = torch.empty_like(h)
    fresh[:, :-1] = h[:, :-1]
    return fresh, c


def changes_state(z, hidden, h_0, *args):
    if h_0 is not None:
        h_0.zero_()
    return aten.forward(z, hidden, h_0, *args)


def wrong_dtype(z, *args):
    h, c = aten.forward(z, *args)
    return h, c.double()


def raises(z, *args):
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (writes_behind, "guards"),
        (reads_unwritten, "wrong"),
        (changes_state, "changed"),
        (wrong_dtype, "form"),
        (raises, "IndexError"),
    ],
)
def test_what_goes_wrong_is_named(forward, kind, monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "aten", replace(dispatch.BACKENDS["aten"], forward=forward))
    p = replace(PROBLEM, gradients=False)
    failure = fuzz.examine(p, CPU)
    assert failure.kind == kind
    count, failures = fuzz.run(2, 0, CPU, ["aten"], DTYPES)
    assert count.problems == 2
    assert all(isinstance(f, fuzz.Failure) for f in failures)


def test_guarded_memory_is_nan_until_written_and_gives_writes_away():
    with guarded() as guards:
        a = torch.empty(2, 3)
        b = torch.empty_like(a.t(), dtype=torch.float64)
        zeros, counts = torch.zeros(4), torch.zeros(3, dtype=torch.int32)
        empty = a.new_empty((0, 5))
    assert a.isnan().all()
    assert b.isnan().all()
    assert b.stride() == (1, 3)
    assert torch.equal(zeros, torch.zeros(4))
    assert torch.equal(counts, torch.zeros(3, dtype=torch.int32))
    assert empty.shape == (0, 5)
    assert guards.broken() == 0
    a.as_strided((7,), (1,), a.storage_offset()).zero_()
    assert guards.broken() == 1
    assert torch.empty(0).untyped_storage().nbytes() == 0


def test_processes_share_the_problems():
    alone = fuzz.run(4, 3, CPU, ["aten"], ("float32",))
    together = fuzz.run(4, 3, CPU, ["aten"], ("float32",), jobs=2)
    assert alone == together


def test_structures_share_out_the_problems():
    assert fuzz.shares(3, "cpu") == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert fuzz.shares(50, "cuda") == [(0, 0, 20), (1, 0, 20), (2, 0, 10)]
    shares = fuzz.shares(10_000, "cuda")
    assert sum(calls for _, _, calls in shares) == 10_000
    assert {(structure, variant) for structure, variant, _ in shares} == {(s, v) for s in range(100) for v in range(5)}
    assert [structure for structure, _, _ in shares[:100]] == list(range(100))


def test_a_run_ends_where_much_fails(monkeypatch):
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 0)
    count, failures = fuzz.run(200, 0, CPU, ["aten"], DTYPES)
    assert count.problems == 1
    assert not failures


@pytest.mark.parametrize("text", ["{", "[]", '{"stride": 3}', '{"kernels": 3}'])
def test_a_problem_that_is_none_is_an_error(text):
    assert "problem" in run("check", "--device", "cpu", "--problem", text, code=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_problems_pass_on_a_gpu():
    _, failures = fuzz.run(60, 0, torch.device("cuda"), fuzz.served_backends(), DTYPES, jobs=1)
    assert not failures, failures[0].command(torch.device("cuda"))
