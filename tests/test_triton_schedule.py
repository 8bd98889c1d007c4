"""Schedules of the Triton backend are arithmetic: they hold on any machine."""

from collections import Counter

import pytest
from triton_problems import DEVICES, PLANS, launch, plan

schedules = launch.schedules


def schedule(problem, backward, device):
    config = plan.choose(problem, backward, *DEVICES[device])
    tiles = (schedules.backward_tiles if backward else schedules.forward_tiles)(problem, config)
    programs = DEVICES[device][0] * config.programs_per_sm
    return config, tiles, programs, schedules.schedule(problem, config, tiles, programs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", PLANS)
def test_a_schedule_does_everything_once(name, backward, device):
    config, tiles, programs, s = schedule(PLANS[name], backward, device)
    done = Counter((x.m_tile, x.channel_first, x.weight + k) for x in s.segments for k in range(x.k_first, x.k_last))
    m_tiles = -(-PLANS[name].rows // config.block_m)
    parts = [part for tile in tiles for part in tile]
    assert len(done) == m_tiles * sum(part.iterations(config.block_k) for part in parts)
    assert set(done.values()) == {1}
    assert len(s.programs) <= programs + 1
    assert s.programs[0] == 0
    assert s.programs[-1] == len(s.segments)
    finishes = [f for tile in tiles for f in schedules.finishes(PLANS[name], tile)]
    assert Counter(c for f in finishes for c in range(f.channel_first, f.channel_end)) == Counter(
        range(PLANS[name].hidden)
    )
    for f in finishes:
        assert 0 <= f.channel_first - f.branch_first < f.channel_end - f.branch_first <= f.branch_channels
        assert f.branch_channels == PLANS[name].kernels[f.branch].channels
    assert {(f.branch, f.channel_first, f.column_first) for f in s.finishes} == {
        (f.branch, f.channel_first, f.column_first) for f in finishes
    }


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["paper", "radar", "small"])
def test_cut_tiles_are_summed_from_their_own_slots(name, backward):
    config = plan.Config(128, 64, 64, split=True)
    tiles = (schedules.backward_tiles if backward else schedules.forward_tiles)(PLANS[name], config)
    s = schedules.schedule(PLANS[name], config, tiles, 132)
    writers = {}
    for program, (first, last) in enumerate(zip(s.programs, s.programs[1:], strict=False)):
        for n, x in enumerate(s.segments[first:last]):
            assert bool(x.is_first) == (x.slot not in writers)
            following = s.segments[first + n + 1] if first + n + 1 < last else None
            assert bool(x.is_last) == (following is None or following.slot != x.slot)
            assert writers.setdefault(x.slot, (program, x.m_tile, x.channel_first)) == (
                program,
                x.m_tile,
                x.channel_first,
            )
    summed = dict.fromkeys((f.m_tile, f.slot, f.slots, f.channel_first - f.column_first) for f in s.finishes)
    slots = [(slot, m, channel) for m, first, count, channel in summed for slot in range(first, first + count)]
    assert [slot for slot, _, _ in slots] == list(range(s.slots))
    assert all(writers[slot][1:] == (m, channel) for slot, m, channel in slots)


@pytest.mark.parametrize(
    ("name", "backward", "most"), [("paper", False, 1.1), ("paper", True, 1.1), ("radar", True, 1.1)]
)
def test_programs_have_even_shares(name, backward, most):
    _, _, _, s = schedule(PLANS[name], backward, "H100")
    loads = [
        sum(x.k_last - x.k_first for x in s.segments[a:b]) for a, b in zip(s.programs, s.programs[1:], strict=False)
    ]
    assert max(loads) <= most * sum(loads) / len(loads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLANS)
def test_a_configuration_fits_the_device(name, device):
    for backward in (False, True):
        config = plan.choose(PLANS[name], backward, *DEVICES[device])
        stage = (config.block_m + config.block_n) * config.block_k * PLANS[name].element_size
        assert stage * config.stages * config.programs_per_sm <= DEVICES[device][1]
