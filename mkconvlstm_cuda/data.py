"""Moving digits: a synthetic video data set with known motion, made on the fly from real handwritten digits.

After Agethen & Hsu, sections III-B1 and IV-C2: a 22x22 digit is given a speed and a direction and moves over an empty
64x64 canvas for T = 20 frames; its appearance never changes, and it is reflected at the borders. Every clip is a pure
function of (seed, index), so nothing is stored and any clip can be made again.
"""

import functools
import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

# Which digit images are held out must not depend on the seed of a data set, or "train" with one seed would share
# images with "test" of another.
_SPLIT_SEED = 20_20
_SPLITS = ("train", "test")


class Clip(NamedTuple):
    """One clip, or a batch of clips (with a leading `B` on every field). `D` is the number of digits.

    frames [T, 1, H, W] float32 in [0, 1].
    flow   [T, 2, H, W] float32, (dx, dy) in pixels per frame: how far what is seen in this pixel of frame t has come
           since frame t-1, so that `frames[t, 0, y, x] == frames[t-1, 0, y - dy, x - dx]` wherever a digit is seen
           and was not hidden by another one. Zero on the background. The motion began before the clip did: frame 0
           has the displacement from the frame -1 that is not shown. At a bounce it is the net displacement.
    owner  [T, H, W] int64: which digit (0 .. D-1) is seen in the pixel, -1 for the background.
    labels [D] int64: which numeral each digit is, -1 if the source of the digits has no labels.
    """

    frames: Tensor
    flow: Tensor
    owner: Tensor
    labels: Tensor


class Motion(NamedTuple):
    """What moves where. `image` [B, D] int64 picks the digit image; `velocity` [B, D, 2] float64 is the (x, y) velocity
    in frame 0, in pixels per frame; `position` [B, D, T + 1, 2] int64 is the (x, y) of the digit's top left corner in
    frames -1, 0, ..., T-1."""

    image: Tensor
    velocity: Tensor
    position: Tensor


class MovingDigits(Dataset):
    """Clips of digits that move at a chosen speed and bounce off the borders.

    Positions are rounded to whole pixels: a digit keeps its exact appearance in every frame, and the flow is exact
    integers. Where digits overlap, the brighter pixel is shown (pixel-wise maximum), and that pixel belongs to the
    digit it came from (to the later one if both are equally bright). A digit covers the pixels where it is not zero.

    Args:
        digits: the images to draw from: [N, h, w], uint8 or floating point in [0, 1], or a pair (images, labels [N]),
            such as `load_mnist` returns. None: scikit-learn's 1797 handwritten digits, which need no download.
        split: "train" or "test". The two never share a digit image, whatever their seeds.
        length: number of clips, `len(dataset)`. `batch` and `frames` take any index, for endless training.
        seed: two data sets with different seeds hold different clips.
        speeds: mean speed of each digit in pixels per frame; as many digits as speeds.
        speed_spread: each clip draws its speeds uniformly from mean * [1 - spread, 1 + spread].
        num_frames: T.
        image_size: height and width of the canvas, in pixels.
        digit_size: height and width of a digit, in pixels; images are resized to it by antialiased bicubic
            interpolation.
        test_fraction: share of the digit images that is held out for "test".
        device: where clips are painted, and what they come out on; None for the CPU.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
        ImportError: `digits` is None and scikit-learn is not installed.
    """

    def __init__(
        self,
        digits: Tensor | np.ndarray | tuple | None = None,
        *,
        split: str = "train",
        length: int = 10_000,
        seed: int = 0,
        speeds: Sequence[float] = (1.0, 8.0),
        speed_spread: float = 0.0,
        num_frames: int = 20,
        image_size: int = 64,
        digit_size: int = 22,
        test_fraction: float = 0.2,
        device: torch.device | str | None = None,
    ):
        if split not in _SPLITS:
            raise ValueError(f"split: got {split!r}, wanted one of {_SPLITS}")
        for name, value, least in (("length", length, 0), ("seed", seed, 0), ("num_frames", num_frames, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if not 1 <= digit_size <= image_size:
            raise ValueError(f"digit_size: got {digit_size}, wanted 1 to image_size = {image_size}")
        speeds = tuple(float(speed) for speed in speeds)
        if not speeds or not all(0 <= speed < float("inf") for speed in speeds):
            raise ValueError(f"speeds: got {speeds}, wanted one or more finite speeds of at least 0 pixels per frame")
        if not 0 <= speed_spread <= 1:
            raise ValueError(f"speed_spread: got {speed_spread}, wanted 0 to 1")
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction: got {test_fraction}, wanted more than 0 and less than 1")

        images, labels = _as_images_and_labels(handwritten_digits() if digits is None else digits)
        count = len(images)
        held_out = round(count * test_fraction)
        if not 1 <= held_out < count:
            raise ValueError(f"digits: {count} images cannot be split with test_fraction = {test_fraction}")
        order = torch.from_numpy(np.random.default_rng(_SPLIT_SEED).permutation(count))
        self.image_ids = order[:held_out] if split == "test" else order[held_out:]
        self.images = _resize(images[self.image_ids], digit_size).to(device)
        self.labels = labels[self.image_ids].to(device)
        self.split, self.length, self.seed = split, length, seed
        self.speeds, self.speed_spread = speeds, speed_spread
        self.num_frames, self.image_size, self.digit_size = num_frames, image_size, digit_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not -self.length <= index < self.length:
            raise IndexError(f"index: got {index}, wanted less than length = {self.length}")
        clip = self.batch([index % self.length])
        return Clip(*(field[0] for field in clip))

    def batch(self, indices: Sequence[int]) -> Clip:
        """The clips `indices`, all fields with a leading `B = len(indices)`; equal to stacking single clips."""
        motion = self.motion(indices)
        frames, owner = self._paint(motion, with_owner=True)
        step = motion.position.diff(dim=2).to(owner.device, torch.float32)  # [B, D, T, 2]
        step = step.permute(0, 2, 3, 1)  # [B, T, 2, D]
        flat = owner.flatten(-2)[:, :, None].expand(-1, -1, 2, -1)  # [B, T, 2, H*W]
        flow = step.gather(-1, flat.clamp(min=0)) * (flat >= 0)
        return Clip(frames, flow.unflatten(-1, owner.shape[-2:]), owner, self.labels[motion.image.to(owner.device)])

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Only the frames of the clips `indices`, [B, T, 1, H, W] float32: what `batch` gives, in less time."""
        return self._paint(self.motion(indices), with_owner=False)[0]

    def motion(self, indices: Sequence[int]) -> Motion:
        """Digit images, velocities and positions of the clips `indices`, before anything is painted."""
        digits = len(self.speeds)
        # One generator a clip makes the clip independent of its neighbours in a batch; 15 microseconds each.
        key = (self.seed, _SPLITS.index(self.split))
        draws = np.array([np.random.default_rng((*key, int(i))).random((digits, 5)) for i in indices])
        picked, x, y, angle, swing = draws.reshape(-1, digits, 5).transpose(2, 0, 1)  # five of [B, D]

        span = self.image_size - self.digit_size
        speed = np.array(self.speeds) * (1 + self.speed_spread * (2 * swing - 1))
        angle = 2 * np.pi * angle
        velocity = speed[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)  # [B, D, 2]
        times = np.arange(-1, self.num_frames)[:, None]
        path = span * np.stack([x, y], axis=-1)[:, :, None] + velocity[:, :, None] * times  # [B, D, T + 1, 2]
        position = np.rint(_reflect(path, span)).astype(np.int64)
        image = (picked * len(self.images)).astype(np.int64)
        return Motion(torch.from_numpy(image), torch.from_numpy(velocity), torch.from_numpy(position))

    def _paint(self, motion: Motion, with_owner: bool) -> tuple[Tensor, Tensor | None]:
        """Frames [B, T, 1, H, W] and, if asked for, owner [B, T, H, W]."""
        size, batch, digits = self.image_size, *motion.image.shape
        device = self.images.device
        canvas = torch.zeros(batch, self.num_frames, size * size, device=device)
        owner = torch.full(canvas.shape, -1, device=device) if with_owner else None
        corner = motion.position[:, :, 1:, 1] * size + motion.position[:, :, 1:, 0]  # [B, D, T]
        image, corner = (t.to(device, non_blocking=True) for t in (motion.image, corner))
        offsets = torch.arange(self.digit_size, device=device)
        offsets = (offsets[:, None] * size + offsets).flatten()
        for d in range(digits):
            where = corner[:, d, :, None] + offsets  # [B, T, digit_size^2]
            pixels = self.images[image[:, d]].flatten(1)[:, None].expand_as(where)
            below = canvas.gather(-1, where)
            canvas.scatter_(-1, where, torch.maximum(pixels, below))
            if owner is not None:
                seen = (pixels > 0) & (pixels >= below)
                owner.scatter_(-1, where, torch.where(seen, d, owner.gather(-1, where)))
        shape = (batch, self.num_frames, size, size)
        return canvas.view(shape).unsqueeze(2), None if owner is None else owner.view(shape)


def _reflect(path: np.ndarray, span: int) -> np.ndarray:
    """Folds an unbounded path into [0, span], as if it were reflected at both ends."""
    if span == 0:
        return np.zeros_like(path)
    return span - np.abs(path % (2 * span) - span)


def patchify(x: Tensor, patch_size: int = 4) -> Tensor:
    """Space to depth: [..., C, H, W] -> [..., C * p * p, H / p, W / p], in the order of `torch.pixel_unshuffle`.

    The paper (and Shi et al. 2015) feeds 64x64 frames as 16 channels of 16x16, patches of 4x4 pixels.
    Raises ValueError if H or W is not a multiple of `patch_size`.
    """
    if patch_size < 1 or x.dim() < 3 or x.shape[-1] % patch_size or x.shape[-2] % patch_size:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., C, H, W] with H and W multiples of {patch_size}")
    if x.numel() == 0:  # torch leaves such a tensor's shape as it is
        *batch, channels, height, width = x.shape
        return x.reshape(*batch, channels * patch_size**2, height // patch_size, width // patch_size)
    return F.pixel_unshuffle(x, patch_size)


def unpatchify(x: Tensor, patch_size: int = 4) -> Tensor:
    """Depth to space, the inverse of `patchify`: [..., C * p * p, H, W] -> [..., C, H * p, W * p].

    Raises ValueError if the number of channels is not a multiple of `patch_size` squared.
    """
    if patch_size < 1 or x.dim() < 3 or x.shape[-3] % patch_size**2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., C, H, W] with C a multiple of {patch_size**2}")
    if x.numel() == 0:
        *batch, channels, height, width = x.shape
        return x.reshape(*batch, channels // patch_size**2, height * patch_size, width * patch_size)
    return F.pixel_shuffle(x, patch_size)


@functools.cache
def handwritten_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: 1797 real handwritten digits of 8x8 pixels, shipped with that package.

    Returns images [1797, 8, 8] float32 in [0, 1] and labels [1797] int64. Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the built-in digits come from scikit-learn: pip install scikit-learn") from error
    bundle = load_digits()
    return torch.from_numpy(bundle.images).float() / 16, torch.from_numpy(bundle.target).long()


def load_mnist(folder: str | Path, part: str = "train") -> tuple[Tensor, Tensor]:
    """Reads MNIST, or any data set in its IDX format, from files that the user has.

    Args:
        folder: holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` (for "test": `t10k-...`), gzipped
            (`.gz`) or not; `train-images.idx3-ubyte`, as some archives name it, is found as well.
        part: "train" or "test".

    Returns:
        images [N, h, w] uint8 and labels [N] int64, to be handed to `MovingDigits(digits=...)`.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is not what its name says, or is cut off.
    """
    if part not in _SPLITS:
        raise ValueError(f"part: got {part!r}, wanted one of {_SPLITS}")
    prefix = "train" if part == "train" else "t10k"
    images = _read_idx(_find_idx(Path(folder), f"{prefix}-images", "idx3-ubyte"), dimensions=3)
    labels = _read_idx(_find_idx(Path(folder), f"{prefix}-labels", "idx1-ubyte"), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"folder: {folder} holds {len(images)} {part} images but {len(labels)} labels")
    return images, labels.long()


def _find_idx(folder: Path, stem: str, suffix: str) -> Path:
    names = [f"{stem}{joint}{suffix}{gz}" for joint in "-." for gz in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"folder: {folder} has none of {', '.join(names)}")


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """One IDX file of unsigned bytes: magic 0x08 and the number of dimensions, big-endian sizes, then the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    header = 4 * (1 + dimensions)
    if len(data) < header:
        raise ValueError(f"{path}: got {len(data)} bytes, wanted an IDX header of {header}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    if magic != 0x0800 + dimensions:
        raise ValueError(f"{path}: got magic number {magic:#010x}, wanted {0x0800 + dimensions:#010x}")
    size = int(np.prod(shape, dtype=object))
    if len(data) - header != size:
        raise ValueError(f"{path}: got {len(data) - header} bytes of data, wanted {size} for shape {tuple(shape)}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def _as_images_and_labels(digits: Tensor | np.ndarray | tuple) -> tuple[Tensor, Tensor]:
    """Checks a source of digits; gives images [N, h, w] float32 in [0, 1] and labels [N] int64."""
    images, labels = digits if isinstance(digits, tuple) else (digits, None)
    images = torch.as_tensor(images)
    if images.dim() != 3 or 0 in images.shape:
        raise ValueError(f"digits: got images of shape {tuple(images.shape)}, wanted [N, h, w], none of them empty")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise TypeError(f"digits: got images of {images.dtype}, wanted uint8 or floating point")
    images = images.float()
    if not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(f"digits: got values from {images.min():g} to {images.max():g}, wanted 0 to 1")
    labels = torch.full((len(images),), -1) if labels is None else torch.as_tensor(labels).long()
    if labels.shape != images.shape[:1]:
        raise ValueError(f"digits: got labels of shape {tuple(labels.shape)}, wanted [{len(images)}]")
    return images, labels


def _resize(images: Tensor, size: int) -> Tensor:
    """[N, h, w] -> [N, size, size], clamped to [0, 1]; what bicubic interpolation rings up to 1/32 becomes zero."""
    resized = F.interpolate(images[:, None], (size, size), mode="bicubic", antialias=True, align_corners=False)[:, 0]
    return resized.clamp(0, 1) * (resized > 1 / 32)
