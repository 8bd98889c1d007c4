"""The run behind `mkconvlstm train-classifier`: a VideoClassifier on a folder of videos (section IV-A)."""

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from .attention import FlowAttention
from .classifier import VideoClassifier
from .classifier_training import Settings, Trainer, parse_kernels
from .clips import CachedClips, Recipe
from .encoders import build_encoder, encode
from .files import atomic
from .flow import import_cv2
from .processes import Processes, join
from .runs import deferred_interrupt, has_fast_bfloat16
from .video import Skipped, Split, count_kinds, import_av, read_split

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 60
NAMED = 20


def run(
    folder: str | Path,
    split_folder: str | Path,
    output: str | Path = "classifier",
    *,
    number: int = 1,
    classes: Iterable[str] | None = None,
    encoder_weights: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int = 2,
    backend: str = "auto",
    device: str | torch.device | None = None,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a classifier on the videos of a folder and judges it, after every epoch, on those of the test list.

    First every clip is decoded (and encoded, if the encoder is frozen, and given its flow, if there are masks) into the
    cache. Videos that cannot be used are named, with the reason, in `output`/skipped.json and on the console, and left
    out. Then comes the training, which reads the cache alone. Writes skipped.json, metrics.json and checkpoint.pt into
    `output`; Ctrl-C saves the checkpoint, then raises KeyboardInterrupt.

    Started by torchrun, the processes share out the decoding, and every batch.

    Args:
        folder, split_folder, number, classes: as for `video.read_split`.
        output: folder; made if it is not there.
        encoder_weights: as for `encoders.build_encoder`. A frozen "small" or "vgg16" needs them.
        cache: folder; None: `output`/cache. Runs may share one.
        workers: threads that decode, and processes that read the cache in training; 0: all in one.
        backend, device: where the layers run; None: a GPU if there is one.
        resume: continue from the checkpoint in `output`.
        on_step: called with (step, loss) after every step.
        console: where progress bars and the summary go; None: the terminal.
        settings: any field of `classifier_training.Settings`.

    Returns:
        what metrics.json holds.

    Raises:
        ValueError, TypeError: an argument is out of its range, no video can be used, or `resume` finds no fitting
            checkpoint.
        FileNotFoundError: a folder, the train list or the encoder's weights are not there.
        ImportError: PyAV, OpenCV (for masks) or safetensors is missing.
        OSError: a file cannot be written.
        FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
    """
    settings = Settings(**settings)
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers: got {workers!r}, wanted an integer of at least 0")
    frozen = not settings.end_to_end
    if frozen and encoder_weights is None and settings.encoder in ("small", "vgg16"):
        raise ValueError(f"encoder_weights: got none for {settings.encoder!r}, wanted a file, or end_to_end=True")
    _require_packages(settings)
    started, output, console = time.perf_counter(), Path(output), console or Console()
    split = read_split(folder, split_folder, number, classes)
    if resume and not (output / CHECKPOINT).is_file():
        raise ValueError(f"resume: there is no checkpoint at {output / CHECKPOINT}")
    with join(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))) as group:
        if settings.precision == "auto":
            fast = has_fast_bfloat16(group.device)
            settings = replace(settings, precision="bfloat16" if fast else "float32")
        torch.manual_seed(settings.seed)
        encoder = build_encoder(settings.encoder, encoder_weights, settings.clip.channels).to(group.device)
        size = feature_size(encoder, settings)
        model = VideoClassifier(
            size[1],
            len(split.classes),
            parse_kernels(settings.kernels),
            encoder=None if frozen else encoder,
            head=settings.head,
            pool=settings.pool,
            lstm_features=settings.lstm_features,
            dropout=settings.dropout,
            mix=settings.mix,
            mix_activation=settings.mix_activation,
            norm=settings.norm,
            attention=FlowAttention(branches=settings.masks) if settings.masks else None,
            backend=backend,
        )
        recipe = Recipe(
            settings.clip,
            encoder.eval().requires_grad_(False) if frozen else None,
            (size[0], *size[2:]) if settings.masks else None,
        )
        output.mkdir(parents=True, exist_ok=True)
        quiet = Console(quiet=True) if group.rank else console
        clips, skipped = _prepare(split, recipe, cache or output / "cache", workers, group, quiet)
        told = _tell_skipped(split, clips, skipped, output, group, quiet)
        if not len(clips["train"]):
            raise ValueError(f"folder: none of the {len(split.train)} training videos can be used; see {output}")
        trainer = Trainer(settings, split.classes, clips["train"], model, group)
        if resume:
            trainer.resume(output / CHECKPOINT)
        _train(trainer, clips["test"], output / CHECKPOINT, workers, quiet, on_step)

        lost = sorted({name for names in group.gather(list(trainer.lost)) for name in names})
        if lost:
            quiet.print(f"[yellow]{len(lost)} clips were lost from the cache while training[/yellow]: {_named(lost)}")
        metrics = {
            "settings": asdict(settings),
            "data": {**told, "lost while training": lost},
            "evaluation": trainer.history[-1]["test"],
            "epochs": [{**epoch, "test": _without_classes(epoch["test"])} for epoch in trainer.history],
            "training": {
                "steps": trainer.step,
                "seconds": round(trainer.seconds, 1),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "backend": str(model.layer.last_backend),
                "device": "cpu" if group.device.type == "cpu" else torch.cuda.get_device_name(group.device),
                "processes": group.world,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seconds": round(time.perf_counter() - started, 1),
        }
        if group.rank == 0:
            with atomic(output / "metrics.json") as temporary:
                temporary.write_text(json.dumps(metrics, indent=1) + "\n")
        return metrics


@torch.no_grad()
def feature_size(encoder: nn.Module, settings: Settings) -> tuple[int, int, int, int]:
    """(T', C', h, w) of the feature maps of one clip."""
    clip = settings.clip
    frames = clip.num_frames if getattr(encoder, "takes_clips", False) else 1
    device = next((tensor.device for tensor in encoder.state_dict().values()), torch.device("cpu"))
    blank = torch.zeros(1, frames, clip.channels, clip.image_size, clip.image_size, device=device)
    _, steps, channels, height, width = encode(encoder.eval(), blank).shape
    return (steps if frames > 1 else clip.num_frames), channels, height, width


def _require_packages(settings: Settings) -> None:
    """Raises ImportError, before anything is decoded, if a package is not installed."""
    import_av()
    if settings.masks:
        import_cv2()
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError("the cache needs safetensors: pip install 'mkconvlstm_cuda[video]'") from error


def _prepare(
    split: Split, recipe: Recipe, cache: str | Path, workers: int, group: Processes, console: Console
) -> tuple[dict[str, CachedClips], list[Skipped]]:
    """The clips of both parts, without those that cannot be made; and these, with the split files' own."""
    clips = {"train": CachedClips(split.train, recipe, cache), "test": CachedClips(split.test, recipe, cache)}
    skipped = list(split.skipped)
    with _bar("decoding", console) as bar:
        for name, part in clips.items():
            mine = slice(group.rank, None, group.world)
            task = bar.add_task(name, total=len(range(*mine.indices(len(part)))))
            failed = part.prepare(workers, mine, lambda done, task=task: bar.update(task, completed=done))
            failed = [entry for entries in group.gather(failed) for entry in entries]
            skipped += failed
            clips[name] = part.without(failed)
    return clips, skipped


def _tell_skipped(
    split: Split,
    clips: dict[str, CachedClips],
    skipped: list[Skipped],
    output: Path,
    group: Processes,
    console: Console,
) -> dict[str, Any]:
    """Writes skipped.json and prints its summary; returns what metrics.json says of the data."""
    counts = count_kinds(skipped)
    told = {"clips": {name: len(part) for name, part in clips.items()}, "missing": split.missing, "skipped": counts}
    if group.rank == 0:
        with atomic(output / "skipped.json") as temporary:
            entries = [entry._asdict() for entry in skipped]
            temporary.write_text(json.dumps({**told, "videos": entries}, indent=1) + "\n")
    console.print(f"{len(clips['train'])} clips to train on, {len(clips['test'])} to test, {len(skipped)} skipped")
    for path in split.missing:
        console.print(f"[yellow]there is no {escape(path)}[/yellow]")
    for kind, count in counts.items():
        names = [entry.name for entry in skipped if entry.kind == kind]
        console.print(f"[yellow]{count} skipped, {kind}[/yellow]: {_named(names)}")
    return told


def _named(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return escape(", ".join(names[:NAMED]) + more)


def _train(
    trainer: Trainer,
    test: CachedClips,
    checkpoint: Path,
    workers: int,
    console: Console,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """Trains until all epochs are over; saves now and then, after every epoch, at the end and on Ctrl-C."""
    earlier, started, saved = trainer.seconds, time.perf_counter(), time.perf_counter()
    stop = False
    with _bar("training", console) as bar, deferred_interrupt() as interrupted:
        task = bar.add_task("", total=trainer.steps, completed=trainer.step)
        for batch in trainer.load(trainer.train, trainer.batches(), workers):
            stop = trainer.train_step(batch, interrupted.is_set())
            trainer.seconds = earlier + time.perf_counter() - started
            if on_step is not None:
                on_step(trainer.step, trainer.losses[-1])
            epoch, rest = divmod(trainer.step, trainer.steps_per_epoch)
            if rest == 0:
                losses = trainer.losses[-trainer.steps_per_epoch :]
                loss = sum(losses) / len(losses)
                trainer.history.append({"epoch": epoch, "loss": loss, "test": trainer.evaluate(test, workers)})
            note = f"epoch {epoch}, loss {trainer.losses[-1]:.3f}{_accuracy(trainer.history)}"
            bar.update(task, completed=trainer.step, description=note)
            if rest == 0 or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                trainer.save(checkpoint)
                saved = time.perf_counter()
            if stop:
                trainer.save(checkpoint)
                break
    if stop:
        raise KeyboardInterrupt


def _bar(name: str, console: Console) -> Progress:
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _accuracy(history: list[dict[str, Any]]) -> str:
    accuracy = history[-1]["test"]["frame_accuracy"] if history else None
    return "" if accuracy is None else f", test accuracy {accuracy:.1%}"


def _without_classes(test: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in test.items() if name != "by_class"}
