"""Schedules of the Triton backend are arithmetic: they hold on any machine."""

from collections import Counter

import pytest
from triton_problems import DEVICES, PLANS, launch, plan

schedules = launch.schedules


def stages_of(problem, backward, device):
    """The configuration, and each stage with its schedule."""
    config = plan.choose(problem, backward, *DEVICES[device])
    programs = DEVICES[device][0] * config.programs_per_sm
    stages = schedules.stages(problem, config, backward)
    return config, [(stage, schedules.schedule(problem, config, stage, programs)) for stage in stages]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PLANS)
def test_a_schedule_does_everything_once(name, backward, device):
    problem = PLANS[name]
    config, stages = stages_of(problem, backward, device)
    assert len(stages) == (2 if problem.mix else 1)
    weights = Counter()
    for stage, s in stages:
        done = Counter((x.m_tile, x.weight + k) for x in s.segments for k in range(x.k_first, x.k_last))
        assert len(done) == problem.m_tiles(config) * stage.gates * schedules.blocks(stage.tiles, config.block_k)
        assert set(done.values()) == {1}
        weights += Counter({weight for _, weight in done})
        assert len(s.shares) <= DEVICES[device][0] * config.programs_per_sm
        assert all(s.shares)
        assert s.programs[0] == 0
        assert s.programs[-1] == len(s.segments)
        finishes = [f for tile in stage.tiles for f in schedules.finishes(stage, tile)]
        channels = Counter(c for f in finishes for c in range(f.channel_first, f.channel_end))
        assert channels == Counter(range(problem.hidden))
        most = schedules.finish_n(problem, config, backward)
        for f in finishes:
            assert 0 <= f.channel_first - f.part_first < f.channel_end - f.part_first <= f.part_channels
            assert f.part_channels == stage.sizes[f.part]
            assert f.column_first + f.channel_end - f.channel_first <= config.block_n
            assert f.channel_end - f.channel_first <= most
        assert {(f.part, f.channel_first, f.column_first) for f in s.finishes} == {
            (f.part, f.channel_first, f.column_first) for f in finishes
        }
    assert weights == Counter(range(len(weights)))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["paper", "radar", "small", "paper, mix gate", "radar, mix full", "odd, mix gate"])
def test_cut_tiles_are_summed_from_their_own_slots(name, backward):
    config = plan.Config(128, 64, 64, split=True)
    for stage in schedules.stages(PLANS[name], config, backward):
        s = schedules.schedule(PLANS[name], config, stage, 132)
        writers = {}
        for program, share in enumerate(s.shares):
            for n, x in enumerate(share):
                assert bool(x.is_first) == (x.slot not in writers)
                following = share[n + 1] if n + 1 < len(share) else None
                assert bool(x.is_last) == (following is None or following.slot != x.slot)
                writer = (program, x.m_tile, x.channel_first)
                assert writers.setdefault(x.slot, writer) == writer
        summed = dict.fromkeys((f.m_tile, f.slot, f.slots, f.channel_first - f.column_first) for f in s.finishes)
        slots = [
            (slot, m, channel) for m, first, n, channel in summed for slot in range(first, first + stage.gates * n)
        ]
        assert [slot for slot, _, _ in slots] == list(range(s.slots))
        assert all(writers[slot][1:] == (m, channel) for slot, m, channel in slots)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("name", "programs"), [("paper", 132), ("small", 132), ("odd", 36), ("odd", 3)])
def test_every_gate_of_a_mix_reads_its_own(name, programs, backward):
    for mix in (1, 4):
        problem = PLANS[f"{name}, mix {'gate' if mix == 4 else 'full'}"]
        config = plan.choose(problem, backward, *DEVICES["H100"])
        (stage,) = (s for s in schedules.stages(problem, config, backward) if s.gate_stride is not None)
        s = schedules.schedule(problem, config, stage, programs)
        weights = schedules.blocks(stage.tiles, config.block_k)
        first_weight = stage.tiles[0][0].weight
        for x in s.segments:
            gate = x.slot % 4
            assert x.first == (gate * problem.hidden if mix == 4 else 0)
            assert x.first + x.depth <= x.stride == 4 * problem.hidden
            assert (x.weight - first_weight) // weights == gate
        assert len(s.shares) <= programs
        assert Counter(x.slot % 4 for x in s.segments) == dict.fromkeys(range(4), len(s.segments) // 4)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["paper", "paper, mix gate", "radar, mix gate", "exact, mix full"])
def test_tables_hold_all_stages(name, backward):
    _, stages = stages_of(PLANS[name], backward, "H100")
    of_stages = [s for _, s in stages]
    t = schedules.tables(of_stages)
    assert (len(t.programs) - 1) // len(stages) == max(len(s.shares) for s in of_stages)
    assert t.ends[-1] == len(t.finishes)
    fields = {name: n for n, name in enumerate(("m_tile", "k_first", "k_last", "slot"))}
    for n, (stage, s) in enumerate(stages):
        before = t.ends[n] - len(s.finishes)
        assert t.finishes[before : t.ends[n]] == [f.row() for f in s.finishes]
        for p in range((len(t.programs) - 1) // len(stages)):
            here = p * len(stages) + n
            rows = t.segments[t.programs[here] : t.programs[here + 1]]
            share = s.shares[p] if p < len(s.shares) else ()
            assert [[row[i] for i in fields.values()] for row in rows] == [
                [getattr(x, f) for f in fields] for x in share
            ]
            for row, x in zip(rows, share, strict=True):
                if not stage.split:
                    finished = t.finishes[row[6] : row[7]]
                    assert [f[3:5] for f in finished] == [
                        f.row()[3:5] for f in s.finishes[x.finish_first : x.finish_end]
                    ]


@pytest.mark.parametrize(
    ("name", "backward", "most"), [("paper", False, 1.1), ("paper", True, 1.1), ("radar", True, 1.1)]
)
def test_programs_have_even_shares(name, backward, most):
    _, [(_, s)] = stages_of(PLANS[name], backward, "H100")
    loads = [sum(x.k_last - x.k_first for x in share) for share in s.shares]
    assert max(loads) <= most * sum(loads) / len(loads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLANS)
def test_a_configuration_fits_the_device(name, device):
    for backward in (False, True):
        config = plan.choose(PLANS[name], backward, *DEVICES[device])
        stage = (config.block_m + config.block_n) * config.block_k * PLANS[name].element_size
        assert stage * config.stages * config.programs_per_sm <= DEVICES[device][1]
