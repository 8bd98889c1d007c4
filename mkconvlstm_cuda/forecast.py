"""The forecasting demo behind `mkconvlstm forecast`: trains a Forecaster on moving digits, judges it, draws pictures.

Agethen & Hsu, section III-B1: 10 frames in, 10 frames out, sigmoid cross-entropy, unseen digits for the test.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .data import MovingDigits, load_mnist
from .files import atomic
from .models import Forecaster, compare_with_last_frame, sequence_cross_entropy
from .runs import check_choice, deferred_interrupt, has_fast_bfloat16, load_checkpoint, save_checkpoint

CHECKPOINT = "checkpoint.pt"
DEFAULT_MINUTES = 1.4
CHECKPOINT_SECONDS = 30
WARM_UP_STEPS = 30
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Everything but the duration that decides what a run trains. A run can be resumed only with equal settings.

    `kernels` are kernel size -> hidden channels; `speeds` pixels per frame, one for each digit; sizes are in pixels,
    `past` and `horizon` in frames. `precision` is "float32", "bfloat16" (autocast) or "auto": the faster of the two.
    """

    kernels: Mapping[int, int] = field(default_factory=lambda: {3: 16, 5: 16})
    num_layers: int = 1
    conditional: bool = False
    speeds: Sequence[float] = (2.0,)
    speed_spread: float = 0.5
    batch_size: int = 8
    learning_rate: float = 5e-3
    seed: int = 0
    precision: str = "auto"
    past: int = 10
    horizon: int = 10
    image_size: int = 64
    digit_size: int = 22
    patch_size: int = 4
    digits: str = "scikit-learn"

    def __post_init__(self):
        for name in ("batch_size", "past", "horizon"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted an integer of at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: got {self.learning_rate!r}, wanted a positive number")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, wanted one of {PRECISIONS}")

    def clips(self, digits, split: str) -> MovingDigits:
        frames = self.past + self.horizon
        names = ("seed", "speeds", "speed_spread", "image_size", "digit_size")
        return MovingDigits(digits, split=split, num_frames=frames, **{name: getattr(self, name) for name in names})


class Trainer:
    """Model, optimiser and position in the data, which together are all that a checkpoint holds.

    The clips of step s are `s * batch_size, ...`, so the position in the data is the step itself, and training that
    was interrupted ends with the same weights, bit for bit, as training that was not (on one machine, for a duration
    given in steps).
    """

    def __init__(self, settings: Settings, clips: MovingDigits, device: torch.device, backend: str):
        torch.manual_seed(settings.seed)
        self.settings, self.clips, self.device = settings, clips, device
        self.model = Forecaster(
            1,
            settings.kernels,
            patch_size=settings.patch_size,
            conditional=settings.conditional,
            num_layers=settings.num_layers,
            backend=backend,
        ).to(device)
        torch.nn.init.constant_(self.model.readout.bias, -2)  # most pixels are black
        self.optimizer = torch.optim.Adam(self.model.parameters(), settings.learning_rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []

    def autocast(self):
        enabled = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def train_step(self, done: float) -> float:
        """One step of Adam; `done` in [0, 1] is the share of the training that is over. Returns the loss (section
        III-B1, nats per sequence)."""
        settings = self.settings
        rate = settings.learning_rate * min(1, (self.step + 1) / WARM_UP_STEPS, 2 * (1 - done) + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        first = self.step * settings.batch_size
        frames = self.clips.frames(range(first, first + settings.batch_size)).to(self.device)
        past, future = frames[:, : settings.past], frames[:, settings.past :]
        self.model.train()
        with self.autocast():
            logits = self.model(past, settings.horizon)
        loss = sequence_cross_entropy(logits, future)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    @torch.no_grad()
    def predict(self, past: Tensor) -> Tensor:
        """Logits [B, horizon, 1, H, W] float32 on the CPU, of past [B, past, 1, H, W]."""
        self.model.eval()
        with self.autocast():
            chunks = [self.model(part.to(self.device), self.settings.horizon) for part in past.split(32)]
        return torch.cat(chunks).float().cpu()

    def save(self, path: Path) -> None:
        """Writes a checkpoint that is either complete or not there."""
        save_checkpoint(
            path,
            asdict(self.settings),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            seconds=self.seconds,
            losses=self.losses,
        )

    def load(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ValueError if it is none, or belongs to other settings."""
        state = load_checkpoint(path, asdict(self.settings), self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]


def run(
    output: str | Path = "demo",
    *,
    minutes: float | None = None,
    steps: int | None = None,
    mnist: str | Path | None = None,
    test_clips: int = 128,
    backend: str = "auto",
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a forecaster on moving digits and judges it against copying the last frame.

    Writes into `output`: forecast.png, forecast.gif, metrics.json and checkpoint.pt. Ctrl-C saves the checkpoint, then
    raises KeyboardInterrupt; a second Ctrl-C does not wait for the step to end.

    Args:
        output: folder; made if it is not there.
        minutes: training time, on the wall clock, all resumed parts together; not counting evaluation.
        steps: training steps, in place of minutes; only then is a run reproducible. Neither: 1.4 minutes.
        mnist: folder with MNIST's IDX files; None: scikit-learn's digits.
        test_clips: clips of held-out digit images to judge by.
        backend, device: where the layers run; None: a GPU if there is one.
        resume: continue from the checkpoint in `output`.
        overwrite: start anew though there is one.
        on_step: called with (step, loss) after every step.
        console: where the progress bar goes; None: the terminal.
        settings: any field of `Settings` but `digits`, which `mnist` decides.

    Returns:
        what metrics.json holds.

    Raises:
        ValueError, TypeError: an argument is out of its range, `resume` finds no fitting checkpoint, or there is one
            and neither `resume` nor `overwrite`.
        ImportError: scikit-learn, matplotlib or pillow is missing.
    """
    if minutes is None and steps is None:
        minutes = DEFAULT_MINUTES
    if minutes is not None and steps is not None:
        raise ValueError(f"steps: got {steps} and minutes = {minutes}, wanted one of the two")
    name, duration = ("minutes", minutes) if steps is None else ("steps", steps)
    if not 0 < duration < float("inf"):
        raise ValueError(f"{name}: got {duration}, wanted more than 0")
    if test_clips < 1:
        raise ValueError(f"test_clips: got {test_clips}, wanted at least 1")
    output = Path(output)
    check_choice(output / CHECKPOINT if (output / CHECKPOINT).exists() else None, resume, overwrite)
    _require_pictures()

    started = time.perf_counter()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = Settings(digits="scikit-learn" if mnist is None else "mnist", **settings)
    if settings.precision == "auto":
        settings = replace(settings, precision="bfloat16" if has_fast_bfloat16(device) else "float32")
    digits = None if mnist is None else load_mnist(mnist)
    trainer = Trainer(settings, settings.clips(digits, "train"), device, backend)
    if resume:
        trainer.load(output / CHECKPOINT)
    trainer.predict(settings.clips(digits, "test").frames(range(1))[:, : settings.past])  # a backend may refuse: now
    output.mkdir(parents=True, exist_ok=True)
    _train(trainer, output / CHECKPOINT, minutes, steps, console or Console(), on_step)

    frames = settings.clips(digits, "test").frames(range(test_clips))
    past, future = frames[:, : settings.past], frames[:, settings.past :]
    logits = trainer.predict(past)
    metrics = {
        "settings": asdict(settings),
        "duration": {"minutes": minutes, "steps": steps},
        "evaluation": compare_with_last_frame(logits, past, future),
        "training": {
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "milliseconds_per_step": round(1000 * trainer.seconds / max(1, trainer.step), 1),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "backend": str(trainer.model.encoder.last_backend),
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "losses": [round(loss, 2) for loss in trainer.losses],
    }
    predicted = logits.sigmoid()
    _draw_png(output / "forecast.png", past, future, predicted, metrics)
    _draw_gif(output / "forecast.gif", past, future, predicted)
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    with atomic(output / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def _train(trainer: Trainer, checkpoint: Path, minutes, steps, console: Console, on_step) -> None:
    """Trains until `steps` or `minutes` are over, saving now and then, at the end, and on Ctrl-C."""
    total = 60 * minutes if steps is None else steps
    earlier, started, saved = trainer.seconds, time.perf_counter(), time.perf_counter()
    columns = TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar, deferred_interrupt() as interrupted:
        task = bar.add_task("", total=total)
        while not interrupted.is_set():
            completed = trainer.seconds if steps is None else trainer.step
            if completed >= total:
                break
            loss = trainer.train_step(done=completed / total)
            trainer.seconds = earlier + time.perf_counter() - started
            mean = np.mean(trainer.losses[-20:])
            note = f"step {trainer.step}, loss {mean:.0f} nats per sequence"
            bar.update(task, completed=trainer.seconds if steps is None else trainer.step, description=note)
            if on_step is not None:
                on_step(trainer.step, loss)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                trainer.save(checkpoint)
                saved = time.perf_counter()
        trainer.save(checkpoint)
    if interrupted.is_set():
        raise KeyboardInterrupt


def _require_pictures() -> None:
    """Raises ImportError, before any training, if the packages that draw are not installed."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("the pictures need matplotlib and pillow: pip install matplotlib pillow") from error


def _draw_png(path: Path, past: Tensor, future: Tensor, predicted: Tensor, metrics: Mapping) -> None:
    """Three clips as rows of truth, prediction and last frame over time; below, the error by frame and the loss."""
    from matplotlib.figure import Figure

    clips, size = min(3, len(past)), past.shape[-1]
    shown = np.unique(np.linspace(0, past.shape[1] - 1, 4).round().astype(int))
    columns, gap = len(shown) + future.shape[1], 2
    side = size + 2 * gap
    figure = Figure(figsize=(14, 3.05 * clips + 3.3), layout="constrained")
    grids = figure.subfigures(2, 1, height_ratios=[3.05 * clips, 3])
    for row, axes in enumerate(np.atleast_1d(grids[0].subplots(clips, 1))):
        rows = []
        for name, frames in (("truth", future), ("", predicted), ("", past[:, -1:].expand_as(future))):
            head = past[row, shown, 0] if name else torch.full((len(shown), size, size), torch.nan)
            strip = torch.cat([head, frames[row, :, 0]])
            rows.append(torch.nn.functional.pad(strip, (gap,) * 4, value=torch.nan))
        image = torch.stack(rows).permute(0, 2, 1, 3).reshape(3 * side, columns * side)
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ticks = [str(t - past.shape[1] + 1) for t in shown] + [f"+{t + 1}" for t in range(future.shape[1])]
        axes.set_xticks([side * (c + 0.5) for c in range(columns)], ticks)
        axes.set_yticks([side * (r + 0.5) for r in range(3)], ["truth", "prediction", "last frame"])
        axes.axvline(side * len(shown) - 0.5, color="tab:orange", linewidth=2)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if row == 0:
            for words, where in (("given  ", "right"), ("  to be predicted", "left")):
                axes.text(side * len(shown), -8, words, ha=where, va="bottom", color="tab:orange", fontsize=12)
    grids[0].supxlabel("frame (0 is the last one given)")

    by_frame, loss = grids[1].subplots(1, 2)
    scores, horizon = metrics["evaluation"], range(1, future.shape[1] + 1)
    by_frame.plot(horizon, scores["last_frame"]["mse_by_frame"], "o-", color="tab:gray", label="last frame")
    by_frame.plot(horizon, scores["prediction"]["mse_by_frame"], "o-", color="tab:blue", label="prediction")
    by_frame.set(xlabel="frames ahead", ylabel="mean squared error", ylim=(0, None))
    by_frame.set_title(f"{scores['clips']} clips of digits never seen: error {scores['mse_ratio']:.0%} of copying")
    by_frame.legend()
    curve = np.array(metrics["losses"])
    loss.plot(np.arange(1, len(curve) + 1), curve, color="tab:blue", alpha=0.25)
    width = max(1, len(curve) // 25)
    loss.plot(np.arange(width, len(curve) + 1), np.convolve(curve, np.ones(width) / width, "valid"), color="tab:blue")
    loss.set(xlabel="training step", ylabel="nats per sequence", ylim=(0, 1.1 * np.quantile(curve, 0.98)))
    loss.set_title(
        f"cross-entropy in training: {metrics['training']['seconds']:.0f} s on {metrics['training']['device']}"
    )
    for axes in (by_frame, loss):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw_gif(path: Path, past: Tensor, future: Tensor, predicted: Tensor, scale: int = 3) -> None:
    """Truth, prediction and last frame of three clips, animated; the frame turns orange where the future begins."""
    from PIL import Image, ImageDraw, ImageFont

    copy = past[:, -1:].expand_as(future)
    movies = [torch.cat([past, after], dim=1)[:3, :, 0] for after in (future, predicted, copy)]
    shown = (255 * torch.stack(movies, dim=-1)).round().byte().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    side, margin, head = shown.shape[2], 6, 24
    font, frames = ImageFont.load_default(size=14), []
    for t in range(shown.shape[1]):
        ahead = t - past.shape[1] + 1
        colour = (255, 150, 40) if ahead > 0 else (90, 90, 90)
        size = (3 * side + 4 * margin, head + len(shown) * (side + margin))
        page = Image.new("RGB", size, (20, 20, 20))
        draw = ImageDraw.Draw(page)
        for column, name in enumerate(("truth", "prediction", "last frame")):
            left = margin + column * (side + margin)
            draw.text((left, 3), f"{name}  {ahead:+d}" if ahead > 0 else f"{name}  (input)", fill=colour, font=font)
            for row in range(len(shown)):
                top = head + row * (side + margin)
                page.paste(Image.fromarray(shown[row, t, :, :, column].numpy()), (left, top))
                draw.rectangle((left - 1, top - 1, left + side, top + side), outline=colour)
        frames.append(page)
    with atomic(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=200, loop=0)
