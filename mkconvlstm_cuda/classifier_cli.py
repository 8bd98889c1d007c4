"""The command ``mkconvlstm train-classifier``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer()
console = Console()


@app.command()
def train_classifier(
    folder: Annotated[Path, typer.Argument(help="The videos, one folder a class, as UCF-101 has them.")],
    split: Annotated[
        Path, typer.Option(help="Folder with classInd.txt, trainlist01.txt, testlist01.txt, as UCF-101 has them.")
    ],
    number: Annotated[int, typer.Option(help="Which of the splits.")] = 1,
    classes: Annotated[Optional[str], typer.Option(help="Only these, separated by commas.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option(help="Folder for metrics, checkpoint and skipped.json.")] = Path("classifier"),
    cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for decoded clips, features and flow; OUTPUT/cache by default. Runs may share it."),
    ] = None,
    kernels: Annotated[str, typer.Option(help="SIZE:CHANNELS,... or inception:CHANNELS.")] = "3:256,5:256",
    mix: Annotated[Optional[str], typer.Option(help="1x1 convolution after the branches: gate or full.")] = None,  # noqa: UP045
    mix_activation: Annotated[Optional[str], typer.Option(help="tanh, before the mix.")] = None,  # noqa: UP045
    norm: Annotated[Optional[str], typer.Option(help="batch, group or layer.")] = None,  # noqa: UP045
    mask: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Kernel size that gets masks from optical flow; once for each."),
    ] = None,
    head: Annotated[str, typer.Option(help="lstm: pooling, FC-LSTM; conv: 1x1 convolution with batch norm.")] = "lstm",
    pool: Annotated[str, typer.Option(help="mean or max, before the FC-LSTM.")] = "mean",
    lstm_features: Annotated[int, typer.Option(help="Hidden features of the FC-LSTM.")] = 256,
    dropout: Annotated[float, typer.Option(help="Before the last layer.")] = 0.0,
    encoder: Annotated[
        str, typer.Option(help="vgg16, small, or package.module:factory, which is imported and called.")
    ] = "vgg16",
    encoder_weights: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A state_dict (torch.save or safetensors), such as torchvision's of VGG-16."),
    ] = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Train the encoder too; else it is frozen, its features are cached.")
    ] = False,
    fps: Annotated[float, typer.Option(help="Sampled frames a second; 0: all.")] = 15.0,
    start: Annotated[int, typer.Option(help="Sampled frames left out at the beginning.")] = 25,
    frames: Annotated[int, typer.Option(help="Sampled frames in a clip, T.")] = 50,
    short: Annotated[str, typer.Option(help="Videos too short for that: skip, or wrap (start over).")] = "skip",
    resize: Annotated[int, typer.Option(help="Shorter side of a frame, in pixels.")] = 256,
    image_size: Annotated[int, typer.Option(help="Side of the square cut out of the middle.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Clips in a step, of all processes together.")] = 10,
    epochs: Annotated[int, typer.Option()] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; falls linearly to zero.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = 0,
    precision: Annotated[str, typer.Option(help="float32, bfloat16, or auto: the faster.")] = "auto",
    workers: Annotated[int, typer.Option(help="Threads that decode; processes that load in training.")] = 2,
    backend: Annotated[str, typer.Option(help="auto, or a name that `mkconvlstm info` lists.")] = "auto",
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, ...; a GPU if there is one.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in OUTPUT.")] = False,
) -> None:
    """Trains a video classifier on a folder of videos; the paper's Fig. 6 by default.

    Videos that cannot be used are named and left out. Starts on several GPUs by torchrun: `torchrun --nproc-per-node 8
    -m mkconvlstm_cuda.cli train-classifier ...`.
    """
    from . import classify
    from .cli import pick_device
    from .video import ClipSettings

    device = None if device is None else str(pick_device(device))
    try:
        metrics = classify.run(
            folder,
            split,
            output,
            number=number,
            classes=None if classes is None else [name.strip() for name in classes.split(",")],
            encoder_weights=encoder_weights,
            cache=cache,
            workers=workers,
            backend=backend,
            device=device,
            resume=resume,
            console=console,
            kernels=kernels,
            mix=mix,
            mix_activation=mix_activation,
            norm=norm,
            masks=tuple(mask or ()),
            head=head,
            pool=pool,
            lstm_features=lstm_features,
            dropout=dropout,
            encoder=encoder,
            end_to_end=end_to_end,
            clip=ClipSettings(frames, start, fps or None, resize, image_size, short),
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            precision=precision,
        )
    except KeyboardInterrupt:
        how = " and --resume" if (output / classify.CHECKPOINT).is_file() else "; what was decoded is in the cache"
        console.print(f"stopped; continue with the same command{how} ({escape(str(output))})")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(2) from None
    console.print(summary(metrics))
    console.print(f"numbers in {output / 'metrics.json'}, what was skipped in {output / 'skipped.json'}")


def summary(metrics: dict[str, Any]) -> Table:
    """The accuracies after the last epoch, and the classes that are told apart worst."""
    test, training = metrics["evaluation"], metrics["training"]
    title = f"{test['clips']} test clips; {training['steps']} steps in {training['seconds']:.0f} s"
    table = Table("", "top-1 accuracy, mean over frames", "of the clip's mean softmax", title=title)
    judged = {name: scores for name, scores in test["by_class"].items() if scores["clips"]}
    worst = sorted(judged, key=lambda name: judged[name]["frame_accuracy"])[:5]
    for name, scores in [("all", test), *((name, judged[name]) for name in worst)]:
        values = (scores["frame_accuracy"], scores["clip_accuracy"])
        table.add_row(escape(name), *("" if value is None else f"{value:.2%}" for value in values))
    return table
