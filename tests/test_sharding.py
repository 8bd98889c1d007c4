"""Images shared out by rows: processes that talk by gloo compute what one computes, gradients and theirs included."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import Problem
from processes import torchrun
from sharding_worker import CASES

from mkconvlstm_cuda import FlowAttention, MKConvLSTMCell
from mkconvlstm_cuda.sharding import shard_height

REFUSED = {
    "group norm": {"norm": "group"},
    "layer norm": {"norm": "layer"},
    "a norm of the gates": {"gate_norm": 3},
    "a peephole for each pixel": {"peephole": "pixel", "image_size": (4, 3)},
    "a mask network": {"attention": FlowAttention(2, network=torch.nn.Sequential(torch.nn.Conv2d(2, 4, 1)))},
}


def run_worker(path, processes, **options):
    """For each rank what its run of sharding_worker.py found."""
    torchrun(Path(__file__).with_name("sharding_worker.py"), str(path), processes=processes, **options)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("sharding") / "found.pt", 3)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_process(name, processes, found):
    for rank in range(3):
        errors = found[rank][name, processes]
        assert {"output", "dx", "ddx"} < errors.keys()
        assert max(errors.values()) < 1e-11, (rank, errors)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_agrees_on_two_gpus(tmp_path):
    for rank, there in enumerate(run_worker(tmp_path / "found.pt", 2, gpus=True)):
        for name in CASES:
            assert max(there[name, 2].values()) < 1e-10, (rank, name, there[name, 2])


def test_too_few_rows_are_an_error(found):
    assert all("got 2 rows of the images on rank" in there["too few rows"] for there in found)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_process_needs_no_neighbours():
    cell, x_t = MKConvLSTMCell(2, {5: 3}), torch.randn(1, 2, 1, 4)
    wanted = cell(x_t)
    torch.testing.assert_close(shard_height(cell)(x_t), wanted)
    assert cell.last_backend == "reference"


@pytest.mark.usefixtures("alone")
def test_what_needs_whole_images_is_refused():
    for words, options in REFUSED.items():
        with pytest.raises(ValueError, match=f"layer: got one with {words}.*, which needs whole images"):
            shard_height(Problem(options=options).layer())
    with pytest.raises(TypeError, match="layer: got Conv2d, wanted an MKConvLSTM"):
        shard_height(torch.nn.Conv2d(1, 1, 1))
    normed = shard_height(Problem(options={"norm": "batch"}).layer())
    with pytest.raises(ValueError, match="norm: got batch norm in training on some rows"):
        normed(torch.randn(1, 2, 2, 4, 3, dtype=torch.float64))
    named = shard_height(Problem().layer("aten"))
    with pytest.raises(ValueError, match="'aten' cannot serve this call: its hidden transition has rows on other"):
        named(torch.randn(1, 2, 2, 4, 3, dtype=torch.float64))
