"""The Triton backend on a GPU."""

import pytest
import torch
from problems import assert_as_close
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
        """No gates are kept: the same outputs; and the same bits every time."""
        problem = LARGE[name]
        layer = problem.layer("triton", torch.bfloat16, "cuda")
        inputs = problem.inputs(layer, torch.bfloat16, "cuda")
        kept = problem.call(layer, **inputs)
        with torch.no_grad():
            dropped = problem.call(layer, **inputs)
        assert all(torch.equal(a, b) for a, b in zip(kept, dropped, strict=True))
        first, second = (problem.run("triton", torch.bfloat16, "cuda") for _ in range(2))
        recurrent = [n for n in first if n in ("output", "h_n", "c_n", "dh_0", "dc_0")]
        assert all(torch.equal(first[n], second[n]) for n in recurrent)

    def test_in_a_cuda_graph(self, name):
        problem = LARGE[name]
        layer = problem.layer("triton", torch.bfloat16, "cuda")
        x = problem.inputs(layer, torch.bfloat16, "cuda")["x"].detach()
        with torch.no_grad():
            wanted = layer(x)[0]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = layer(x)[0]
            output.zero_()
            graph.replay()
        assert torch.equal(output, wanted)
