"""Memory, threads, processes, streams and devices."""

import copy
import gc
import multiprocessing
import threading
import time

import pytest
import torch
from problems import Problem, places

from mkconvlstm_cuda import MKConvLSTM
from mkconvlstm_cuda.forks import has_gnu_openmp

PROBLEM = Problem({3: 4, 5: 4}, {"peephole": "channel"}, batch=2, steps=4, channels=3, size=(9, 8))
# Its h takes more than 10 MiB, from which on a tensor's memory is reserved for it alone.
LARGER = Problem({3: 16, 5: 16}, batch=16, steps=8, channels=16, size=(48, 48))
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
on_gpu = [p for p in places() if p.values[1] == "cuda" and p.values[0] != "reference"]


def resident_bytes():
    """Memory of this process, or that torch has allocated on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def train(problem, layer, inputs):
    """One step: gradients of all parameters, and plain gradient descent."""
    output, h_n, c_n = problem.call(layer, **inputs)
    loss = output.square().mean() + h_n.mean() + c_n.mean()
    loss.backward()
    with torch.no_grad():
        for p in layer.parameters():
            p -= 1e-3 * p.grad
            p.grad = None
    for t in inputs.values():
        t.grad = None


@pytest.fixture
def one_thread():
    """Many small steps, beside other processes: threads that wait for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("backend", "device"), places())
def test_memory_is_flat(backend, device):
    """Over 1,000 training steps and 10,000 of a stream (on CPUs a tenth of them)."""
    steps = 1000 if device == "cuda" else 100
    layer = PROBLEM.layer(backend, torch.float32, device)
    inputs = PROBLEM.inputs(layer, torch.float32, device)
    frame, state = inputs["x"][:, 0].detach(), None
    allowed = 0 if device == "cuda" else 2 << 20
    for phase in ("warm", "train"):
        for _ in range(20 if phase == "warm" else steps):
            train(PROBLEM, layer, inputs)
        if phase == "warm":
            before = resident_bytes()
    assert resident_bytes() - before <= allowed
    with torch.no_grad():
        for n in range(10 * steps):
            _, state = layer.step(frame, state)
            if n == 20:
                before = resident_bytes()
    assert resident_bytes() - before <= allowed


@pytest.mark.parametrize(("backend", "device"), places())
def test_many_threads_share_a_layer(backend, device):
    """Each with its own stream, on GPUs: the results of one alone."""
    layer = PROBLEM.layer(backend, torch.float32, device)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 4, 3, 9, 8, generator=generator).to(device).requires_grad_()
        output, (h_n, c_n) = layer(x)
        grads = torch.autograd.grad((output.sum(), h_n.sum(), c_n.sum()), (x, *layer.parameters()))
        return [t.detach().cpu() for t in (output, h_n, c_n, *grads)]

    wanted = [run(seed) for seed in range(8)]
    got, errors = {}, []

    def work(seed):
        try:
            if device == "cuda":
                with torch.cuda.stream(torch.cuda.Stream()):
                    for _ in range(10):
                        got[seed] = run(seed)
            else:
                got[seed] = run(seed)
        except BaseException as error:  # shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, results in enumerate(wanted):
        for a, b in zip(got[seed], results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def forward_in_child(layer, x, device, threads, queue):
    if threads:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            queue.put(layer.to(device)(x.to(device))[0].cpu().numpy())
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.parametrize(("method", "threads"), [("fork", None), ("fork", 1), ("spawn", None)])
@pytest.mark.parametrize(("backend", "device"), [p for p in places() if p.values[0] != "reference"])
def test_a_child_process_computes_the_same_or_says_why_not(backend, device, method, threads):
    """After use in the parent. CUDA works in spawned processes alone, GNU OpenMP in those or with one thread."""
    layer, x = MKConvLSTM(3, {3: 4, 5: 4}, backend=backend), torch.randn(2, 4, 3, 9, 8)
    with torch.no_grad():
        wanted = copy.deepcopy(layer).to(device)(x.to(device))[0].cpu()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=forward_in_child, args=(layer, x, device, threads, queue))
    process.start()
    got = queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    if device == "cuda" and method == "fork":
        assert "Cannot re-initialize CUDA in forked subprocess" in got
    elif method == "fork" and threads is None and torch.get_num_threads() > 1 and has_gnu_openmp():
        assert "call torch.set_num_threads(1) in it first" in got
    else:
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("backend", "device"), on_gpu)
def test_running_out_of_memory_leaves_nothing_behind(backend, device, recompute):
    """In forward and in backward, each with six shares of what it needs; after each the smaller problem works."""
    small, large = (p.layer(backend, torch.bfloat16, device, recompute=recompute) for p in (PROBLEM, LARGER))
    of_small, of_large = (p.inputs(m, torch.bfloat16, device) for p, m in ((PROBLEM, small), (LARGER, large)))
    for _ in range(2):
        train(PROBLEM, small, of_small)
        train(LARGER, large, of_large)
    gc.collect()
    needed = needed_bytes(LARGER, large, of_large)
    before = torch.cuda.memory_allocated()
    for stage in needed:
        ran_out = []
        for sixth in range(6):
            ran_out.append(runs_out(LARGER, large, of_large, stage, needed[stage] * sixth // 6))
            assert settled_memory(before) == before, (stage, sixth)
            train(PROBLEM, small, of_small)
            assert settled_memory(before) == before, (stage, sixth)
        assert ran_out[0], (stage, needed)
    train(LARGER, large, of_large)


def gradients(layer, inputs, outputs):
    return torch.autograd.grad([y.float().sum() for y in outputs], (*inputs.values(), *layer.parameters()))


def needed_bytes(problem, layer, inputs):
    """What forward and backward reserve beside what is in use when they begin."""

    def begin():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    reserved = begin()
    outputs = problem.call(layer, **inputs)
    forward = torch.cuda.max_memory_reserved() - reserved
    reserved = begin()
    gradients(layer, inputs, outputs)
    return {"forward": forward, "backward": torch.cuda.max_memory_reserved() - reserved}


def runs_out(problem, layer, inputs, stage, more):
    """Whether memory is too small where only ``more`` bytes may be reserved from the beginning of ``stage`` on."""
    total = torch.cuda.get_device_properties(0).total_memory

    def limit():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    try:
        if stage == "forward":
            limit()
        outputs = problem.call(layer, **inputs)
        if stage == "backward":
            limit()
        gradients(layer, inputs, outputs)
    except torch.OutOfMemoryError:
        return True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return False


def settled_memory(wanted):
    """Allocated bytes, once they are ``wanted`` or ten seconds have passed.

    Autograd's thread lets go of what a failed backward held only after the error has reached the caller.
    """
    end = time.monotonic() + 10
    while True:
        gc.collect()
        allocated = torch.cuda.memory_allocated()
        if allocated == wanted or time.monotonic() > end:
            return allocated
        time.sleep(0.01)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "device"), on_gpu)
def test_nothing_waits_for_the_gpu(backend, device, dtype, recompute):
    """Neither forward nor backward nor a step of a stream, once a problem of that shape has been seen."""
    layer = PROBLEM.layer(backend, dtype, device, recompute=recompute, num_layers=2)
    inputs = PROBLEM.inputs(layer, dtype, device)
    wanted = (*inputs.values(), *layer.parameters())
    frame = inputs["x"][:, 0].detach()

    def run():
        output, h_n, c_n = PROBLEM.call(layer, **inputs)
        torch.autograd.grad((output, h_n, c_n), wanted, (torch.ones_like(output), h_n.detach(), c_n.detach()))
        with torch.no_grad():
            layer.step(frame, layer.step(frame)[1])

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "device"), on_gpu)
def test_a_second_gpu_computes_the_same(backend, device):
    """While the first is the current one, and from a thread of its own."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (PROBLEM.run(backend, dtype, f"cuda:{n}") for n in range(2))
        assert torch.cuda.current_device() == 0
        for name, t in second.items():
            assert t.device.index == 1
            torch.testing.assert_close(t.cpu(), first[name].cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("backend", "device"), on_gpu)
def test_more_elements_than_31_bits_count(backend, device):
    """Forward and backward of 72 samples, against those of each half."""
    if torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GiB of free GPU memory")
    batch, steps, side = 72, 8, 1024
    layer = MKConvLSTM(2, {3: 4}, backend=backend, device=device, dtype=torch.bfloat16)
    assert batch * steps * layer.hidden_channels * side**2 > 2**31
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(batch, steps, 2, side, side, generator=generator, device=device, dtype=torch.bfloat16)

    def run(x):
        x = x.detach().requires_grad_()
        output, (h_n, c_n) = layer(x)
        (dx,) = torch.autograd.grad(output, x, output.detach())
        return output.detach(), dx, h_n.detach()[0], c_n.detach()[0]

    whole = run(x)
    for half in (slice(0, batch // 2), slice(batch // 2, batch)):
        for of_whole, of_half in zip(whole, run(x[half]), strict=True):
            for a, b in zip(of_whole[half], of_half, strict=True):  # sample by sample: the comparison takes memory too
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
