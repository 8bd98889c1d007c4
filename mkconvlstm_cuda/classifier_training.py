"""How a VideoClassifier is trained: settings, one step, evaluation, checkpoints; by one process or several."""

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .classifier import VideoClassifier, accuracies, frame_cross_entropy
from .clips import CachedClips, Sample
from .processes import Processes
from .runs import load_checkpoint, save_checkpoint
from .transition import Kernels, inception_branches
from .video import ClipSettings

WARM_UP_STEPS = 50
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run trains. A run can be resumed only with equal settings.

    Args:
        kernels: "SIZE:CHANNELS,...", or "inception:CHANNELS" (Fig. 9b).
        mix, mix_activation, norm: as for MKConvLSTM.
        masks: kernel sizes that get masks from optical flow (section III-D); (): none.
        head, pool, lstm_features, dropout: as for VideoClassifier.
        encoder: as for `encoders.build_encoder`.
        end_to_end: train the encoder too; else it is frozen, and what it gives for each clip is kept in the cache.
        clip: which frames of a video are its clip.
        batch_size: clips in a step, of all processes together.
        epochs, learning_rate, weight_decay, seed: of AdamW; the rate falls linearly to zero.
        precision: "float32", "bfloat16" (autocast) or "auto": the faster of the two.
    """

    kernels: str = "3:256,5:256"
    mix: str | None = None
    mix_activation: str | None = None
    norm: str | None = None
    masks: tuple[int, ...] = ()
    head: str = "lstm"
    pool: str = "mean"
    lstm_features: int = 256
    dropout: float = 0.0
    encoder: str = "vgg16"
    end_to_end: bool = False
    clip: ClipSettings = field(default_factory=ClipSettings)
    batch_size: int = 10
    epochs: int = 20
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self):
        for name in ("batch_size", "epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted an integer of at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: got {self.learning_rate!r}, wanted a positive number")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, wanted one of {PRECISIONS}")
        parse_kernels(self.kernels)


def parse_kernels(text: str) -> Kernels:
    """ "3:256,5:256" -> {3: 256, 5: 256}; "inception:256" -> the branches of Fig. 9b. Raises ValueError."""
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 or not pair[1].strip().isdigit() for pair in pairs):
        raise ValueError(f"kernels: got {text!r}, wanted 'SIZE:CHANNELS,...' or 'inception:CHANNELS'")
    if pairs[0][0].strip() == "inception" and len(pairs) == 1:
        return inception_branches(int(pairs[0][1]))
    if not all(size.strip().isdigit() for size, _ in pairs) or len({int(size) for size, _ in pairs}) < len(pairs):
        raise ValueError(f"kernels: got {text!r}, wanted 'SIZE:CHANNELS,...', each size once")
    return {int(size): int(channels) for size, channels in pairs}


class Trainer:
    """Model, optimiser and position in the data, which together are all that a checkpoint holds.

    The clips of a step follow from the seed and the step, so that training that was interrupted ends with the same
    weights as training that was not; and they are the same however many processes share them.
    """

    def __init__(
        self, settings: Settings, classes: list[str], train: CachedClips, model: VideoClassifier, group: Processes
    ):
        self.settings, self.classes, self.train, self.group = settings, classes, train, group
        self.model = model.to(group.device)
        ids = [group.device.index] if group.device.type == "cuda" else None
        self.parallel = DistributedDataParallel(self.model, device_ids=ids) if group.world > 1 else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.steps_per_epoch = -(-len(train) // settings.batch_size)
        self.steps = self.steps_per_epoch * settings.epochs
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        self.lost: dict[str, None] = {}

    def batches(self) -> Iterator[list[int]]:
        """This process's clips in every step from now on; never none, see `is_spare`."""
        for step in range(self.step, self.steps):
            chosen = self._chosen(step)
            yield chosen[self.group.rank :: self.group.world] or chosen[:1]

    def _chosen(self, step: int) -> list[int]:
        """The clips of a step, of all processes; each epoch has its own order."""
        epoch, k = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        size = self.settings.batch_size
        return torch.randperm(len(self.train), generator=generator)[k * size : (k + 1) * size].tolist()

    def is_spare(self) -> bool:
        """Whether this step has fewer clips than there are processes, and none for this one, which then takes the
        step's first clip with weight 0."""
        return self.group.rank >= len(self._chosen(self.step))

    def train_step(self, batch: Sample, stop: bool) -> bool:
        """One step of AdamW on the mean of all processes' clips. Returns whether any process wants to `stop`.

        Raises FloatingPointError, in all processes, if the loss is not finite.
        """
        settings, device = self.settings, self.group.device
        warm_up = min(WARM_UP_STEPS, -(-self.steps // 10))
        rate = settings.learning_rate * min(1, (self.step + 1) / warm_up, 1 - self.step / self.steps)
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        torch.manual_seed((settings.seed * 1_000_003 + self.step) * self.group.world + self.group.rank)  # dropout
        weight = batch.weight * (not self.is_spare())
        self.model.train()
        logits, label = self._logits(self.parallel, batch)
        losses = frame_cross_entropy(logits, label)
        loss = (losses * weight.to(device)).sum()
        totals = self.group.sum(
            torch.stack([weight.sum().to(device), loss.detach(), torch.tensor(float(stop), device=device)])
        )
        count, summed, stops = totals.tolist()
        if not math.isfinite(summed):
            raise FloatingPointError(f"training diverged: the loss of step {self.step + 1} is {summed}")
        self.optimizer.zero_grad()
        (loss * self.group.world / max(count, 1)).backward()  # DDP averages over processes
        if count:
            self.optimizer.step()
        self.step += 1
        self.losses.append(summed / max(count, 1))
        return stops > 0

    def _logits(self, model: torch.nn.Module, batch: Sample) -> tuple[Tensor, Tensor]:
        device = self.group.device
        x = batch.x.to(device, non_blocking=True)
        flow = batch.flow.to(device, torch.float32) if batch.flow[0].numel() else None
        enabled = self.settings.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            logits = model(x if x.dtype == torch.uint8 else x.float(), flow)
        return logits, batch.label.to(device)

    @torch.no_grad()
    def evaluate(self, clips: CachedClips, workers: int) -> dict[str, Any]:
        """Loss (nats) and the two accuracies of `classifier.accuracies`, over all clips and by class; None where there
        is no clip to judge by."""
        self.model.eval()
        self.group.share_buffers(self.model)
        sums = torch.zeros(len(self.classes), 4, dtype=torch.float64)
        mine = range(self.group.rank, len(clips), self.group.world)
        for batch in self.load(clips, list(mine), workers):
            logits, label = self._logits(self.model, batch)
            rows = torch.stack([frame_cross_entropy(logits, label), *accuracies(logits, label), torch.ones_like(label)])
            sums.index_add_(0, batch.label, (rows.T.cpu() * batch.weight[:, None]).double())
        sums = self.group.sum(sums.to(self.group.device)).cpu()

        def means(loss: float, by_frame: float, by_clip: float, count: float) -> dict[str, Any]:
            names = ("loss", "frame_accuracy", "clip_accuracy")
            values = [value / count if count else None for value in (loss, by_frame, by_clip)]
            return {**dict(zip(names, values, strict=True)), "clips": int(count)}

        by_class = {name: means(*row) for name, row in zip(self.classes, sums.tolist(), strict=True)}
        return {**means(*sums.sum(dim=0).tolist()), "by_class": by_class}

    def load(self, clips: CachedClips, indices: list[int] | Iterator[list[int]], workers: int) -> Iterator[Sample]:
        """Batches of `indices`, a list to be cut into batches or an iterator of batches; notes what is lost."""
        if isinstance(indices, list):
            size = max(1, self.settings.batch_size // self.group.world)
            indices = iter([indices[k : k + size] for k in range(0, len(indices), size)])
        batches = list(indices)
        pinned = self.group.device.type == "cuda"
        loader = DataLoader(
            clips, batch_sampler=batches, num_workers=workers, pin_memory=pinned, worker_init_fn=_outlive_interrupt
        )
        for chosen, batch in zip(batches, loader, strict=True):
            gone = [clips.videos[k].name for k, weight in zip(chosen, batch.weight.tolist(), strict=True) if not weight]
            self.lost.update(dict.fromkeys(gone))
            yield batch

    def save(self, path: Path) -> None:
        """Writes a checkpoint that is either complete or not there; the first process's business."""
        if self.group.rank:
            return
        save_checkpoint(
            path,
            self._identity(),
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            seconds=self.seconds,
            losses=self.losses,
            history=json.dumps(self.history),
        )

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ValueError if it belongs to other settings, classes or clips."""
        state = load_checkpoint(path, self._identity(), self.group.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.history = json.loads(state["history"])

    def _identity(self) -> dict[str, Any]:
        return {**asdict(self.settings), "classes": self.classes, "training clips": len(self.train)}


def _outlive_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains still needs the batches of its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
