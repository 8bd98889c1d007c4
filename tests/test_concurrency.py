"""Independent work side by side in CUDA graphs, one after another elsewhere."""

import pytest
import torch

from mkconvlstm_cuda import concurrency
from mkconvlstm_cuda.concurrency import MOST_PIXELS, concurrently

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tasks_on(x):
    """Products of ``x`` [N, N] that take a while, each with memory of its own on the way."""
    return [lambda k=k: (x @ x + k) @ x for k in range(3)]


def assert_same_in_a_graph(run, x):
    """``run()``, of ``x``, gives the same tensor, always of the same memory, outside of a CUDA graph and in one."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        used = run()
    for seed in range(20):
        torch.manual_seed(seed)
        x.copy_(torch.randint(-2, 3, x.shape, device="cuda"))
        graph.replay()
        seen = used.clone()
        assert torch.equal(run(), seen)


def no_streams(*_):
    raise AssertionError("side streams were asked for")


def test_one_after_another_on_a_cpu(monkeypatch):
    monkeypatch.setattr(concurrency, "side_streams", no_streams)
    done = []
    results = concurrently(torch.device("cpu"), 1, [lambda k=k: done.append(k) or k for k in range(3)])
    assert results == done == [0, 1, 2]


@pytest.mark.gpu
@on_a_gpu
@torch.no_grad()
def test_side_by_side_in_a_graph():
    x = torch.zeros(512, 512, device="cuda")
    used = torch.empty_like(x)

    def run():
        total = torch.zeros_like(x)
        for _ in range(4):  # later tasks use memory again that earlier ones have left
            parts = concurrently(x.device, MOST_PIXELS, tasks_on(x))
            total += parts[0] - 2 * parts[1] + parts[2]
            parts[0].add_(1)
        return used.copy_(total)

    assert_same_in_a_graph(run, x)


@pytest.mark.gpu
@on_a_gpu
@torch.no_grad()
def test_tasks_of_a_task():
    x = torch.zeros(512, 512, device="cuda")
    used = torch.empty_like(x)

    def of_a_task():
        a, b, c = concurrently(x.device, MOST_PIXELS, tasks_on(x.T))
        return a - 2 * b + c

    def run():
        first, second = concurrently(x.device, MOST_PIXELS, [lambda: x @ x @ x, of_a_task])
        return used.copy_(first - second)

    assert_same_in_a_graph(run, x)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("pixels", "captured"), [(MOST_PIXELS, False), (MOST_PIXELS + 1, True)])
@torch.no_grad()
def test_one_after_another_where_nothing_is_gained(pixels, captured, monkeypatch):
    monkeypatch.setattr(concurrency, "side_streams", no_streams)
    x = torch.ones(8, 8, device="cuda")
    concurrently(x.device, pixels, tasks_on(x))
    if captured:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            concurrently(x.device, pixels, tasks_on(x))
