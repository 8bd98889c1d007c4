"""The Triton backend on a GPU."""

import pytest
import torch
from problems import assert_as_close, assert_graph_replays, assert_repeats
from triton_problems import LARGE, PROBLEMS_HERE, SERVED, check_biases_around_a_mix, gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SERVED, *LARGE])
class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    def test_as_close_to_float64_as_torch(self, name, dtype, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        assert_as_close((PROBLEMS_HERE | LARGE)[name], "triton", dtype, "cuda")


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
class TestMixOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    def test_biases_before_and_after_a_mix(self, groups, tanh, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        check_biases_around_a_mix(groups, tanh, "cuda")


@pytest.mark.parametrize(
    "name", ["paper", "odd", "many tiles", "paper, mix gate", "odd, mix full", "many tiles, mix gate, tanh"]
)
class TestMoreOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    def test_tf32(self, name, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert_as_close(LARGE[name], "triton", torch.float32, "cuda", floor=1e-3)

    def test_without_gradients_and_again(self, name):
        assert_repeats(LARGE[name], "triton", torch.bfloat16, "cuda")

    def test_in_a_cuda_graph(self, name):
        assert_graph_replays(LARGE[name], "triton", torch.bfloat16)
