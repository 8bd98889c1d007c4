"""Clips that a classifier trains on: decoded, encoded and given a flow once, and kept in safetensors files."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .encoders import encode, fingerprint, resample_flow
from .files import atomic
from .flow import optical_flow
from .video import ClipSettings, Skipped, Video, VideoError, read_clip

_AT_ONCE = 32  # frames that a frozen encoder sees together, which bounds its memory
_LARGEST = torch.finfo(torch.float16).max
_VERSION = 1  # of what is in the cache: raise it when the same key would hold something else


class Sample(NamedTuple):
    """One clip, or a batch of clips (with a leading `B` on every field).

    x: feature maps [T', C', h, w] float16, clamped to its range, or frames [T, C, H, W] uint8.
    flow: [T', 2, h, w] float16, in pixels per frame, or [0] without flow.
    label: int64. weight: float32, 0 for a clip that could not be read and must not count.
    """

    x: Tensor
    flow: Tensor
    label: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Recipe:
    """What the cache holds for every video: frames, or the features of a frozen encoder; and flow, or none.

    Args:
        clip: which frames.
        encoder: a frozen encoder, in eval mode, on the device where it shall run; None: the frames themselves.
        flow_size: (T', h, w), the size of the feature maps that the flow goes with; None: no flow.
    """

    clip: ClipSettings
    encoder: nn.Module | None = None
    flow_size: tuple[int, int, int] | None = None

    def keys(self) -> dict[str, str]:
        """For "x" and, if there is one, "flow": a text that differs where the contents would."""
        clip = [_VERSION, asdict(self.clip)]
        keys = {"x": json.dumps([*clip, "frames" if self.encoder is None else fingerprint(self.encoder)])}
        if self.flow_size is not None:
            keys["flow"] = json.dumps([*clip, "DIS", self.flow_size])
        return keys


class CachedClips(Dataset):
    """The clips of videos, from a cache that `prepare` fills before training.

    A file in the cache belongs to a video's name, size and time of change and to the recipe: what changes is made anew.
    Reading a clip never raises: one whose file has gone or is damaged comes as zeros with weight 0.

    Args:
        videos: of `video.read_split`.
        recipe: what to keep of each.
        cache: folder; made if it is not there.
    """

    def __init__(self, videos: Sequence[Video], recipe: Recipe, cache: str | Path):
        self.videos, self.recipe, self.cache = list(videos), recipe, Path(cache)
        self._keys = recipe.keys()
        self._blank: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Sample:
        video = self.videos[index]
        try:
            parts = {name: _read(path, name) for name, path in self._paths(video).items()}
            weight = 1.0
        except VideoError:
            parts, weight = {name: torch.zeros_like(part) for name, part in self._blank.items()}, 0.0
        flow = parts.get("flow", torch.empty(0, dtype=torch.float16))
        return Sample(parts["x"], flow, torch.tensor(video.label), torch.tensor(weight))

    def prepare(
        self,
        workers: int = 2,
        part: slice = slice(None),
        on_video: Callable[[int], None] = lambda done: None,
    ) -> list[Skipped]:
        """Makes what the cache lacks, for the videos in `part`.

        Videos are decoded by `workers` threads, the encoder runs in this one.

        Returns:
            the videos of which no clip can be made. They stay in the data set until `without` takes them out.

        Raises:
            OSError: the cache cannot be written, or its disk is too small.
            ImportError: PyAV, OpenCV or safetensors is not installed.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        skipped, room = [], None
        mine = self.videos[part]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for done, (video, future) in enumerate(_in_flight(pool, self._decode, mine, 2 * max(1, workers)), 1):
                try:
                    made = self._finish(future.result())
                    paths = self._paths(video)
                except VideoError as error:
                    skipped.append(Skipped.because(video.name, error))
                    made = {}
                if made and room is None:
                    room = _check_room(self.cache, sum(part.nbytes for part in made.values()), len(mine) - done)
                for name, tensor in made.items():
                    _write(paths[name], name, tensor)
                on_video(done)
        return skipped

    def without(self, skipped: Sequence[Skipped]) -> "CachedClips":
        """The same without those videos; to be called when the cache is full, before training."""
        names = {entry.name for entry in skipped}
        kept = [video for video in self.videos if video.name not in names]
        clips = CachedClips(kept, self.recipe, self.cache)
        for video in kept[:1]:
            clips._blank = {name: _read(path, name) for name, path in clips._paths(video).items()}
        return clips

    def _paths(self, video: Video) -> dict[str, Path]:
        try:
            stat = video.path.stat()
        except OSError as error:
            raise VideoError("missing", str(error)) from error
        identity = [video.name, stat.st_size, stat.st_mtime_ns]
        paths = {}
        for name, key in self._keys.items():
            digest = hashlib.sha256(json.dumps([*identity, key]).encode()).hexdigest()
            paths[name] = self.cache / digest[:2] / f"{digest[2:34]}.safetensors"
        return paths

    def _decode(self, video: Video) -> dict[str, Tensor]:
        """In a thread: the frames and the flow, as far as the cache lacks them."""
        lacking = [name for name, path in self._paths(video).items() if not _is_whole(path, name)]
        if not lacking:
            return {}
        frames = read_clip(video.path, self.recipe.clip)
        made = {"x": frames} if "x" in lacking else {}
        if "flow" in lacking:
            flow = resample_flow(optical_flow(frames)[None], self.recipe.flow_size)[0]
            made["flow"] = flow.half()
        return made

    @torch.no_grad()
    def _finish(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the encoder, if there is one, on what was decoded."""
        encoder = self.recipe.encoder
        if "x" in made and encoder is not None:
            device = next((tensor.device for tensor in encoder.state_dict().values()), torch.device("cpu"))
            frames = made["x"][None]
            whole = getattr(encoder, "takes_clips", False)
            parts = [
                encode(encoder, part.to(device)) for part in frames.split(frames.shape[1] if whole else _AT_ONCE, 1)
            ]
            made["x"] = torch.cat(parts, dim=1)[0].clamp(-_LARGEST, _LARGEST).half().cpu()
        return made


def _in_flight(
    pool: ThreadPoolExecutor, function: Callable, items: Sequence[Video], limit: int
) -> Iterator[tuple[Video, Future]]:
    """(item, future of function(item)) in order, with at most `limit` results waiting in memory."""
    rest = iter(items)
    waiting = [(item, pool.submit(function, item)) for item in islice(rest, limit)]
    while waiting:
        yield waiting.pop(0)
        waiting += [(item, pool.submit(function, item)) for item in islice(rest, 1)]


def _check_room(cache: Path, each: int, count: int) -> int:
    free = shutil.disk_usage(cache).free
    if each * count > free:
        raise OSError(f"cache: {count} more clips need {each * count / 2**30:.1f} GiB, {cache} has {free / 2**30:.1f}")
    return free


def _write(path: Path, name: str, tensor: Tensor) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous()}, temporary)


def _read(path: Path, name: str) -> Tensor:
    """Raises VideoError if the file is not there or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise VideoError("cache", f"{path}: {error}") from error


def _is_whole(path: Path, name: str) -> bool:
    """Whether the file is there, complete, and holds the tensor; its numbers are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return name in file.keys()  # noqa: SIM118, no mapping
    except (OSError, SafetensorError):
        return False
