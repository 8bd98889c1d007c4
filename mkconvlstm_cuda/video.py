"""Video files: UCF-101's folders and split files, and clips of frames, decoded by PyAV.

Nothing that is wrong with one video stops a run: it raises `VideoError`, which says what kind of thing is wrong, and
whoever reads many videos counts and names the errors.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Containers of pictures alone. Playlists, which FFmpeg would open just as well, name other files and hosts.
_CONTAINERS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts,mpegvideo,flv,asf,ogg"
_MAX_PIXELS = 1 << 26
_MAX_ASPECT = 16
SHORT = ("skip", "wrap")


class VideoError(ValueError):
    """One video, or one line of a split file, cannot be used. `kind` is a word or two to count by."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Video(NamedTuple):
    """`name` as the split file has it, printable, with forward slashes; `label` counts classes from 0."""

    name: str
    path: Path
    label: int


class Skipped(NamedTuple):
    """What was left out, `kind` (counted by) and `detail` (for people)."""

    name: str
    kind: str
    detail: str

    @classmethod
    def because(cls, name: str, error: VideoError) -> "Skipped":
        return cls(printable(name), error.kind, printable(error.detail))


class Split(NamedTuple):
    """What the split files say. `missing` names the split files that are not there."""

    classes: list[str]
    train: list[Video]
    test: list[Video]
    skipped: list[Skipped]
    missing: list[str]


def count_kinds(skipped: Iterable[Skipped]) -> dict[str, int]:
    """How many of each kind were skipped, the most frequent first."""
    return dict(Counter(entry.kind for entry in skipped).most_common())


def read_split(
    folder: str | Path, split_folder: str | Path, number: int = 1, classes: Iterable[str] | None = None
) -> Split:
    """Reads `classInd.txt`, `trainlist0N.txt` and `testlist0N.txt`, as UCF-101 has them.

    A line is a file name relative to `folder`, `Class/video.avi`, and in a train list the number of the class in
    `classInd.txt`. The folder is what decides the class; a number that contradicts it makes the line one to skip. File
    names never lead out of `folder`: neither by `..` or an absolute path, nor through a symbolic link.

    Args:
        folder: the videos, in one folder for each class.
        split_folder: where the split files are.
        number: N.
        classes: only these, in this order; None: all in `classInd.txt`, or, if that is missing, all folders in
            `folder`, sorted.

    Returns:
        the videos whose files are there, and everything that was skipped. A missing `classInd.txt` or test list is
        in `missing`.

    Raises:
        FileNotFoundError: `folder`, `split_folder` or the train list is not there.
        ValueError: a class in `classes` does not exist, or `classInd.txt` is not what its name says.
    """
    folder, split_folder = Path(folder), Path(split_folder)
    for name, path in (("folder", folder), ("split folder", split_folder)):
        if not path.is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {path}")
    lists = {part: split_folder / f"{part}list{number:02d}.txt" for part in ("train", "test")}
    if not lists["train"].is_file():
        raise FileNotFoundError(f"split: there is no {lists['train']}")
    index, missing = split_folder / "classInd.txt", []
    if index.is_file():
        every = _read_classes(index)
    else:
        missing.append(str(index))
        every = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    chosen = every if classes is None else list(classes)
    if unknown := [name for name in chosen if name not in every]:
        raise ValueError(f"classes: {', '.join(unknown)} not among the {len(every)} classes")
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes: got {chosen}, wanted at least two, each once")

    videos, skipped = {"train": [], "test": []}, []
    for part, path in lists.items():
        if not path.is_file():
            missing.append(str(path))
            continue
        seen = set()
        for line in _lines(path):
            try:
                video = _read_line(line, folder, every, chosen, numbered=index.is_file())
                if video is not None and video.path in seen:
                    raise VideoError("named twice", path.name)
            except VideoError as error:
                skipped.append(Skipped.because(line, error))
                continue
            if video is not None:
                seen.add(video.path)
                videos[part].append(video)
    return Split(chosen, videos["train"], videos["test"], skipped, missing)


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names are bytes
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_classes(path: Path) -> list[str]:
    numbered = [line.split(maxsplit=1) for line in _lines(path)]
    for n, line in enumerate(numbered, 1):
        if len(line) != 2 or line[0] != str(n):
            raise ValueError(f"{path}: got {' '.join(line)!r} in line {n}, wanted '{n} ClassName'")
    return [name for _, name in numbered]


def _read_line(line: str, folder: Path, every: list[str], chosen: list[str], numbered: bool) -> Video | None:
    """The video of a line; None if it belongs to a class that was not chosen."""
    match = re.fullmatch(r"(.*\S)\s+(\d+)", line)
    name, number = (match[1], int(match[2])) if match else (line, None)
    path = inside(folder, name)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if len(parts) < 2 or parts[0] not in every:
        raise VideoError("unknown class", "wanted Class/video, with a class that there is")
    if numbered and number is not None and number != every.index(parts[0]) + 1:
        raise VideoError("wrong class", f"{parts[0]} is number {every.index(parts[0]) + 1}, not {number}")
    if parts[0] not in chosen:
        return None
    if not path.is_file():
        raise VideoError("missing", "there is no such file")
    return Video(printable("/".join(parts)), path, chosen.index(parts[0]))


def printable(name: str) -> str:
    """Bytes of a file name that are no UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def inside(folder: Path, name: str) -> Path:
    """The real path of `name` in `folder`. Raises VideoError ("outside the folder") if it leads out of there."""
    for flavour in (PurePosixPath, PureWindowsPath):
        pure = flavour(name)
        if pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts:
            raise VideoError("outside the folder", "wanted a relative path without '..'")
    try:
        path = (folder / name.replace("\\", "/")).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        raise VideoError("missing", f"not a path ({error})") from error
    if not path.is_relative_to(folder.resolve()):
        raise VideoError("outside the folder", f"a link leads to {path}")
    return path


@dataclass(frozen=True)
class ClipSettings:
    """Which frames of a video make its clip (section IV-A3: 15 frames a second, the 25th to the 75th, 224 x 224).

    Args:
        num_frames: T.
        start: sampled frames to leave out at the beginning.
        fps: sampled frames a second: at each instant the frame that is on screen then; None: all frames.
        resize: what the shorter side of a frame becomes, in pixels; None: image_size.
        image_size: height and width of the square cut out of the middle.
        short: what to do with a video of fewer than start + num_frames sampled frames: "skip" it, or "wrap": start
            over, as the paper does ("sampled modulus their length").
        grey: one channel in place of three.
    """

    num_frames: int = 50
    start: int = 25
    fps: float | None = 15.0
    resize: int | None = 256
    image_size: int = 224
    short: str = "skip"
    grey: bool = False

    def __post_init__(self):
        for name, least in (("num_frames", 1), ("start", 0), ("image_size", 8)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps: got {self.fps!r}, wanted more than 0 and at most 1000, or None")
        if self.resize is not None and (not isinstance(self.resize, int) or self.resize < self.image_size):
            raise ValueError(f"resize: got {self.resize!r}, wanted at least image_size = {self.image_size}, or None")
        if self.short not in SHORT:
            raise ValueError(f"short: got {self.short!r}, wanted one of {SHORT}")

    @property
    def channels(self) -> int:
        return 1 if self.grey else 3


def read_clip(path: str | Path, settings: ClipSettings) -> Tensor:
    """The clip of a video file, [T, C, H, W] uint8, RGB or grey.

    Raises:
        VideoError: "corrupt", "too short", "too large" or "missing". ImportError: PyAV is not installed.
    """
    av = import_av()
    needed = settings.start + settings.num_frames
    try:
        with open(path, "rb") as file:
            frames = [_square(frame, settings) for frame in _sample(file, settings.fps, needed)]
    except av.FFmpegError as error:
        raise VideoError("corrupt", error.strerror or str(error)) from error
    except OSError as error:
        raise VideoError("missing", str(error)) from error
    if len(frames) < needed and (settings.short == "skip" or not frames):
        raise VideoError("too short", f"{len(frames)} sampled frames, wanted {needed}")
    chosen = [frames[k % len(frames)] for k in range(settings.start, needed)]
    return torch.from_numpy(np.stack(chosen)).movedim(-1, 1).contiguous()


def import_av() -> Any:
    """PyAV. Raises ImportError with what to install."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos are decoded by PyAV: pip install 'mkconvlstm_cuda[video]'") from error
    return av


def _sample(file, fps: float | None, count: int) -> Iterator[Any]:
    """Up to `count` decoded frames: what is on screen at 0, 1/fps, 2/fps, ... seconds; each frame once for fps None."""
    options = {"format_whitelist": _CONTAINERS}
    with import_av().open(file, mode="r", options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            raise VideoError("corrupt", "no pictures in it")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # many videos are read at once instead
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        every = None if fps is None else Fraction(fps).limit_denominator(1001)
        yield from _on_screen(container.decode(stream), rate, every, count)


def _on_screen(frames: Iterable[Any], rate: Fraction, fps: Fraction | None, count: int) -> Iterator[Any]:
    # Time stamps are rounded to ticks, which must not make a frame late for its instant.
    shown, first, taken, now, slack = None, None, 0, Fraction(0), Fraction(0)
    for frame in frames:
        if taken == count:
            return
        if fps is None:
            yield frame
            taken += 1
            continue
        if frame.pts is None or frame.time_base is None:
            now += 1 / rate if shown is not None else 0
        else:
            first = frame.pts if first is None else first
            slack = min(frame.time_base / 2, 1 / (4 * rate))
            now = max(now, (frame.pts - first) * frame.time_base)
        while shown is not None and taken < count and taken / fps + slack < now:
            yield shown
            taken += 1
        shown = frame
    while shown is not None and taken < count and taken / fps + slack < now + 1 / rate:
        yield shown
        taken += 1


def _square(frame: Any, settings: ClipSettings) -> np.ndarray:
    """[H, W, C] uint8: resized, and the square in the middle of it."""
    width, height, size = frame.width, frame.height, settings.image_size
    short, long = sorted((width, height))
    if width * height > _MAX_PIXELS or long > _MAX_ASPECT * short:
        raise VideoError("too large", f"frames of {width} x {height} pixels")
    scale = Fraction(settings.resize or size, short)
    width, height = round(width * scale), round(height * scale)
    picture = frame.reformat(width, height, "gray" if settings.grey else "rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(picture[top : top + size, left : left + size].reshape(size, size, settings.channels))
