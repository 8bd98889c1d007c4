"""``mkconvlstm check --fuzz``: random problems on every backend that serves them, against float64 ``reference``."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from statistics import median

import torch
from torch import Tensor

from . import dispatch
from .check import FACTOR, ROUNDING, TF32_ROUNDING
from .fuzz_calls import build, call, exact_results, make_inputs, torch_results
from .fuzz_problems import Problem, draw_call, draw_structure, draw_variant, simpler
from .guards import guarded

# On GPUs, where kernels are compiled for a structure and its variants and that takes seconds, many calls share them.
VARIANTS_PER_STRUCTURE = {"cpu": 1, "cuda": 5}
CALLS_PER_VARIANT = {"cpu": 1, "cuda": 20}
FEWEST_STRUCTURES = 20  # as far as there are problems for them
MOST_MULTIPLICATIONS = {"cpu": 10**7, "cuda": 10**9}
DRAWS = 32  # of other values, where an error is past its limit by so little that chance could have done it
CHANCE = 10.0
NEAR = 3  # draws of inputs close by, which tell how far a rounding of them can move a result
SHRINKING_SECONDS = 20.0
MOST_FAILURES = 10  # after which a run ends


@dataclass(frozen=True)
class Failure:
    """A problem that went wrong."""

    problem: Problem
    kind: str  # what went wrong, in a word or two: shrinking keeps to it
    message: str

    def command(self, device: torch.device) -> str:
        """What repeats it."""
        return f"mkconvlstm check --device {device} --problem '{self.problem.to_json()}'"


@dataclass
class Count:
    """How a run went."""

    problems: int = 0
    compared: int = 0  # backend by backend
    refused: int = 0
    failed: int = 0


def distances(results: dict[str, Tensor], exact: dict[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """Relative error (Frobenius norm) of each tensor; infinity where it is not finite."""
    names = list(names)
    squares = [torch.stack([t.square().sum() for t in (results[n].double() - exact[n], exact[n])]) for n in names]
    relative = {}
    for name, (error, norm) in zip(names, torch.stack(squares).sqrt().tolist(), strict=True):  # one transfer
        ratio = error / norm if norm else 0.0 if error == 0 else float("inf")
        relative[name] = ratio if ratio == ratio else float("inf")
    return relative


@lru_cache(maxsize=4)
def torch_distances(p: Problem, device: torch.device) -> dict[str, float]:
    """How far torch's own arithmetic is from float64."""
    own = torch_results(p, device)
    return distances(own, exact_results(p, device), own)


def compute(p: Problem, device: torch.device) -> dict[str, Tensor] | Failure:
    """The results of the problem's backend, in guarded memory.

    Raises:
        dispatch.Refusal: it cannot serve.
    """
    layer = build(p, p.backend, device, False)
    inputs = make_inputs(p, layer, device, False)
    before = {name: t.detach().clone() for name, t in (inputs | layer.state_dict()).items()}
    try:
        with guarded() as guards, torch.backends.cudnn.flags(enabled=True, allow_tf32=p.tf32):
            results = call(p, layer, inputs, False)
        broken = guards.broken()
    except dispatch.Refusal:
        raise
    except Exception as error:  # whatever it is, the problem was a valid one
        return Failure(p, type(error).__name__, str(error).splitlines()[0] if str(error) else "")
    if broken:
        return Failure(p, "guards", f"memory outside of {broken} zones' tensors was written")
    after = inputs | layer.state_dict()
    names = [n for n in before if "running" not in n]
    changed = torch.stack([(before[n] != after[n].detach()).any() for n in names]).tolist()  # one transfer
    if any(changed):
        return Failure(p, "changed", f"{', '.join(n for n, c in zip(names, changed, strict=True) if c)} changed")
    return results


def limit(p: Problem, own: float, device: torch.device) -> float:
    """How far from float64 a tensor may be where torch's own arithmetic is ``own`` away."""
    dtype = getattr(torch, p.autocast or p.dtype)
    tf32 = dtype == torch.float32 and device.type == "cuda" and p.tf32
    return max(FACTOR * own, TF32_ROUNDING if tf32 else ROUNDING[dtype])


def judge(
    p: Problem, device: torch.device, names: Iterable[str] | None = None
) -> dict[str, tuple[float, float]] | Failure:
    """Each result's error and its limit by name, of those in ``names`` alone if given; or what else is wrong.

    Raises:
        dispatch.Refusal: the backend cannot serve.
    """
    results = compute(p, device)
    if isinstance(results, Failure):
        return results
    neutral = replace(p, backend="reference")
    exact, own = exact_results(neutral, device), torch_results(neutral, device)
    for name, t in results.items():
        if t.shape != own[name].shape or t.dtype != own[name].dtype:
            wanted = f"{list(own[name].shape)} {own[name].dtype}"
            return Failure(p, "form", f"{name}: got {list(t.shape)} {t.dtype}, wanted {wanted}")
    torchs = torch_distances(neutral, device)
    errors = distances(results, exact, results if names is None else names)
    return {name: (error, limit(p, torchs[name], device)) for name, error in errors.items()}


def examine(p: Problem, device: torch.device) -> Failure | None:
    """What is wrong with the problem's backend on this problem; None if nothing.

    An error may be past its limit by chance, torch's own being small by luck: DRAWS more draws of all values are looked
    at, whose median has to be within the limits. None may be past its limit by CHANCE times, unless :func:`unstable`.

    Raises:
        dispatch.Refusal: the backend cannot serve.
    """
    found = judge(p, device)
    if isinstance(found, Failure):
        return found
    doubtful = {name: of for name, of in found.items() if not of[0] <= of[1]}
    for name, (error, most) in doubtful.items():
        if not error <= CHANCE * most and not unstable(p, name, error, device):
            return Failure(p, "wrong", f"{name}: relative error {error:.1e}, limit {most:.1e}")
    if not doubtful:
        return None
    draws = [replace(p, seed=p.seed + 1000 * k) for k in range(1, DRAWS + 1)]
    judged = [judge(draw, device, doubtful) for draw in draws]
    if failures := [of for of in judged if isinstance(of, Failure)]:
        return failures[0]
    for name in doubtful:
        shares = [0.0 if error <= most else error / most for error, most in (of[name] for of in judged)]
        beyond = [(draw, of[name][0]) for draw, of, share in zip(draws, judged, shares, strict=True) if share > CHANCE]
        if median(shares) > 1 or not all(unstable(draw, name, error, device) for draw, error in beyond):
            told = f"{median(shares):.2g} times its limit in the median of {DRAWS} draws, {max(shares):.2g} at most"
            return Failure(p, "wrong", f"{name}: relative error {told}")
    return None


def unstable(p: Problem, name: str, error: float, device: torch.device) -> bool:
    """Whether ``error``, the problem's of a result, is within CHANCE times what a rounding of the inputs makes of it.

    In some draws of a long recurrence the slightest difference grows until nothing is right, torch's own neither.
    """
    exact, *others = (exact_results(replace(p, backend="reference", nudge=k), device) for k in range(NEAR + 1))
    return isfinite(error) and error <= CHANCE * max(distances(other, exact, [name])[name] for other in others)


def shrink(failure: Failure, device: torch.device, seconds: float = SHRINKING_SECONDS) -> Failure:
    """The simplest problem found that fails in the same way."""
    end = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for p in simpler(failure.problem):
            if time.monotonic() > end:
                return failure
            try:
                found = examine(p, device)
            except (dispatch.Refusal, ValueError):  # it is no problem any more
                continue
            if found is not None and found.kind == failure.kind:
                failure, progress = found, True
                break
    return failure


def is_usable(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access nothing runs on a GPU in this process any more."""
    try:
        torch.ones(1, device=device).sum().item()
    except RuntimeError:
        return False
    return True


def examine_variant(
    share: tuple[int, int, int], seed: int, device: torch.device, backends: Sequence[str], dtypes: Sequence[str]
) -> tuple[Count, list[Failure]]:
    """A share of :func:`shares`: so many calls of one variant of a structure."""
    structure, variant, calls = share
    name, most = f"{seed}/{structure}", MOST_MULTIPLICATIONS[device.type]
    drawn = draw_variant(random.Random(f"{name}/{variant}"), draw_structure(random.Random(name), dtypes), most)
    count, failures = Count(), []
    for k in range(calls):
        p = draw_call(random.Random(f"{name}/{variant}/{k}"), drawn, most)
        count.problems += 1
        for backend in backends:
            try:
                failure = examine(replace(p, backend=backend), device)
                count.compared += 1
            except dispatch.Refusal:
                count.refused += 1
                continue
            if failure is not None:
                usable = is_usable(device)
                known = any((f.problem.backend, f.kind) == (backend, failure.kind) for f in failures)
                failures.append(shrink(failure, device) if usable and not known else failure)
                if not usable:
                    return count, failures
    return count, failures


def run(
    problems: int,
    seed: int,
    device: torch.device,
    backends: Sequence[str],
    dtypes: Sequence[str],
    jobs: int = 1,
    on_progress: Callable[[Count], None] = lambda count: None,
) -> tuple[Count, list[Failure]]:
    """``problems`` random problems on each of ``backends``, fewer if many fail; what failed, shrunk.

    The problems depend on ``seed``, ``dtypes`` and the kind of device alone. ``jobs``: processes.
    """
    total, failures = Count(), []
    for count, failed in outcomes(problems, seed, device, backends, dtypes, jobs):
        total.problems += count.problems
        total.compared += count.compared
        total.refused += count.refused
        failures += failed
        total.failed = len(failures)
        on_progress(total)
        if len(failures) >= MOST_FAILURES:
            break
    return total, failures


def shares(problems: int, kind: str) -> list[tuple[int, int, int]]:
    """``problems`` as (structure, variant, calls), the first variant of every structure first."""
    calls = CALLS_PER_VARIANT[kind]
    count = -(-problems // calls)
    structures = max(-(-count // VARIANTS_PER_STRUCTURE[kind]), min(count, FEWEST_STRUCTURES))
    return [(n % structures, n // structures, min(calls, problems - n * calls)) for n in range(count)]


def outcomes(problems, seed, device, backends, dtypes, jobs) -> Iterator[tuple[Count, list[Failure]]]:
    """:func:`examine_variant` for all of :func:`run`, as they come."""
    common = (seed, device, tuple(backends), tuple(dtypes))
    if jobs == 1:
        for share in shares(problems, device.type):
            yield examine_variant(share, *common)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        running = [pool.submit(examine_variant, share, *common) for share in shares(problems, device.type)]
        for done in as_completed(running):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def default_jobs(device: torch.device) -> int:
    """Processes that keep a GPU busy; on a CPU torch's own threads do."""
    return 1 if device.type == "cpu" else max(1, min(14, (os.cpu_count() or 1) - 2))


def served_backends() -> list[str]:
    """What can be compared with the reference here."""
    return [b.name for b in dispatch.BACKENDS.values() if b.name != "reference" and b.available() is None]
