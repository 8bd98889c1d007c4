"""Runs an experiment: shares out its runs, keeps what is done, and writes down what has become of the claims."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..files import atomic
from ..runs import check_choice
from .experiment import Experiment, Measured, Results
from .page import section
from .settings import check, rehearse


class Team:
    """The processes that torchrun started; without it, one process alone.

    Runs are independent, so the processes share them out, one after the other to whoever is free, and exchange
    nothing else: each trains whole batches, on the GPU of its local rank, and a run finds the same whoever does it.
    There may be more processes than GPUs, which then share them.
    """

    def __init__(self):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, self.store, self.taken = 0, None, 0
        if self.size > 1:
            from torch.distributed import rendezvous

            self.store, self.rank, self.size = next(rendezvous("env://"))
            self.store.set_timeout(timedelta(days=7))  # to wait for the others' last runs

    def device(self, wanted: torch.device | None) -> torch.device:
        if wanted is not None and (wanted.type != "cuda" or wanted.index is not None):
            return wanted
        if wanted is None and not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def next(self) -> int:
        """0, 1, 2, ...: every number is given to one process alone."""
        self.taken += 1
        return self.taken - 1 if self.store is None else self.store.add("taken", 1) - 1

    def meet(self, where: str) -> None:
        """Waits until all have come here."""
        if self.store is not None and self.store.add(where, 1) == self.size:
            self.store.set(f"all {where}", "")
        if self.store is not None:
            self.store.wait([f"all {where}"])


def run(
    experiment: Experiment,
    output: str | Path,
    *,
    quick: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | None = None,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Does every run of an experiment that is not done yet, then judges and draws.

    Writes into `output`/NAME: `results.json`, `results.md`, figures, and `runs/`, with a JSON file and, where a run has
    tensors, a safetensors file for each variant and seed, written when that run is done.

    Args:
        experiment: which.
        output: folder; made if it is not there.
        quick: the settings for a CPU.
        resume: keep the runs that are in the folder.
        overwrite: throw them away.
        device: None: a GPU if there is one.
        settings: take the place of the experiment's own.
        console: where the progress bar goes; None: the terminal.

    Returns:
        what results.json holds; None on all processes but the first, where torchrun started several.

    Raises:
        ValueError: `resume`, and the runs in the folder were made with other settings (there may be more seeds or
            variants now, or fewer); neither `resume` nor `overwrite`, or both, and there are runs that are done; or a
            setting is not such as the experiment's own, or leaves a claim without a run.
        ImportError: matplotlib, safetensors, scikit-learn or scipy is missing.
    """
    _require_packages()
    started = time.perf_counter()
    team = Team()
    device = team.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where streams and graphs are made
    command = ["mkconvlstm", "experiment", experiment.name, *(["--quick"] if quick else [])]
    for key, value in (settings or {}).items():
        command += ["--set", f"{key}={json.dumps(value, separators=(',', ':'))}"]
    own, defaults = settings or {}, experiment.quick if quick else experiment.full
    defaults, settings = json.loads(json.dumps([defaults, {**defaults, **own}]))  # as they will be read again
    check(settings, defaults)
    if own:
        rehearse(experiment, settings, own)
    folder = Path(output) / experiment.name
    if team.rank == 0:
        _prepare(folder, settings, resume, overwrite)
    team.meet("prepared")
    _measure(experiment, settings, folder / "runs", device, team, console or Console())
    team.meet("measured")
    if team.rank:
        return None

    runs = {(v, seed): load(folder / "runs", v, seed) for v in settings["variants"] for seed in settings["seeds"]}
    results = Results({v: [runs[v, seed] for seed in settings["seeds"]] for v in settings["variants"]})
    from ..bench.machine import environment

    told = {
        "experiment": experiment.name,
        "question": experiment.question,
        "command": shlex.join(command),
        "quick": quick,
        "claims": [claim.as_json() for claim in experiment.judge(settings, results)],
        "figures": [path.name for path in experiment.draw(settings, results, folder)],
        "settings": settings,
        "environment": {**environment(device), "processes": team.size},
        "seconds": round(time.perf_counter() - started, 1),
        "runs": [{"variant": v, "seed": seed, **run.numbers} for (v, seed), run in runs.items()],
    }
    with atomic(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
    with atomic(folder / "results.md") as temporary:
        temporary.write_text(section(told, experiment.method))
    return told


def _prepare(folder: Path, settings: dict, resume: bool, overwrite: bool) -> None:
    """An empty folder for runs, or the one that is there if its runs were made as these settings would make them."""
    kept, runs = folder / "settings.json", folder / "runs"
    check_choice(runs if any(runs.glob("*.json")) else None, resume, overwrite)
    if resume and kept.is_file():
        try:
            theirs = json.loads(kept.read_text())
        except ValueError as error:
            raise ValueError(f"resume: {kept} is damaged: {error}") from error
        differing = [
            k for k in sorted({*theirs, *settings} - {"seeds", "variants"}) if theirs.get(k) != settings.get(k)
        ]
        shared = theirs["variants"].keys() & settings["variants"].keys()
        differing += sorted(v for v in shared if theirs["variants"][v] != settings["variants"][v])
        if differing:
            raise ValueError(f"resume: the runs in {folder} were made with other settings: {', '.join(differing)}")
    elif resume and runs.exists():
        raise ValueError(f"resume: {kept} is missing, so nothing says with which settings the runs were made")
    elif runs.exists():
        shutil.rmtree(runs)
    runs.mkdir(parents=True, exist_ok=True)
    with atomic(kept) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _measure(
    experiment: Experiment, settings: dict, folder: Path, device: torch.device, team: Team, console: Console
) -> None:
    """Does this process's share of the runs."""
    todo = [(variant, seed) for variant in settings["variants"] for seed in settings["seeds"]]
    todo = [pair for pair in todo if not _kept(folder, *pair, "json").is_file()]
    team.meet("counted")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=team.rank > 0) as bar:
        task = bar.add_task(experiment.name, total=len(todo))
        while (k := team.next()) < len(todo):
            variant, seed = todo[k]
            bar.update(task, completed=k, description=f"{experiment.name}: {variant}, seed {seed}")
            measured = experiment.measure(
                settings, variant, seed, device, lambda done, k=k: bar.update(task, completed=k + done)
            )
            save(folder, variant, seed, measured)
        bar.update(task, completed=len(todo), description=experiment.name)


def save(folder: Path, variant: str, seed: int, measured: Measured) -> None:
    """Keeps a run; the JSON file comes last and says that the run is done."""
    if measured.tensors:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in measured.tensors.items()}
        with atomic(_kept(folder, variant, seed, "safetensors")) as temporary:
            save_file(tensors, temporary)
    numbers = {"variant": variant, "seed": seed, "numbers": dict(measured.numbers)}
    with atomic(_kept(folder, variant, seed, "json")) as temporary:
        temporary.write_text(json.dumps(numbers, allow_nan=False) + "\n")


def load(folder: Path, variant: str, seed: int) -> Measured:
    """A run that was kept."""
    numbers = json.loads(_kept(folder, variant, seed, "json").read_text())["numbers"]
    path = _kept(folder, variant, seed, "safetensors")
    if not path.is_file():
        return Measured(numbers)
    from safetensors.torch import load_file

    return Measured(numbers, load_file(path))


def _kept(folder: Path, variant: str, seed: int, kind: str) -> Path:
    """A file of its own for every variant and seed, whatever characters a variant is named with."""
    return folder / f"{quote(variant, safe=' ,{}+=')}, seed {seed}.{kind}"


def _require_packages() -> None:
    """Raises ImportError, before anything is trained, if a package that experiments need is not installed."""
    missing = [name for name in ("matplotlib", "safetensors", "scipy", "sklearn") if find_spec(name) is None]
    if missing:
        raise ImportError(f"experiments need {', '.join(missing)}: pip install 'mkconvlstm_cuda[experiments]'")
