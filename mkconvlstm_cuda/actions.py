"""Generated actions: clips of a moving digit whose class is its motion, and nothing that a single frame shows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import MovingDigits


class Actions(NamedTuple):
    """A batch: frames [B, T, 1, H, W] float32 in [0, 1]; labels [B] int64."""

    frames: Tensor
    labels: Tensor


class MovingActions:
    """Clips of one digit that moves in one of several directions at one of several speeds, which are the classes.

    What leaves the canvas on one side comes back on the other, and every clip starts anywhere, so that each frame by
    itself is as likely in one class as in any other: only motion tells them apart. Clip n belongs to class
    `n % num_classes`; class `d * len(speeds) + s` moves in direction d, at an angle of 2 pi d / directions from the x
    axis towards +y (down), at speeds[s]. Every clip is a pure function of (seed, split, n); positions are rounded to
    whole pixels.

    Args:
        directions: how many, evenly around the circle.
        speeds: in pixels per frame.
        split, seed, digits, digit_size: as for MovingDigits; "train" and "test" share no digit image.
        num_frames: T.
        image_size: height and width of the canvas, in pixels.
        device: where clips are made.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
        ImportError: `digits` is None and scikit-learn is not installed.
    """

    def __init__(
        self,
        *,
        directions: int = 4,
        speeds: Sequence[float] = (1.0, 3.0, 5.0),
        split: str = "train",
        seed: int = 0,
        num_frames: int = 10,
        image_size: int = 64,
        digit_size: int = 22,
        digits: Tensor | np.ndarray | tuple | None = None,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(directions, int) or directions < 1:
            raise ValueError(f"directions: got {directions!r}, wanted an integer of at least 1")
        # It checks what is the same for both, and shares out the images.
        still = MovingDigits(
            digits,
            split=split,
            seed=seed,
            speeds=speeds,
            num_frames=num_frames,
            image_size=image_size,
            digit_size=digit_size,
        )
        self.directions, self.speeds = directions, still.speeds
        self.split, self.seed, self.num_frames, self.image_size = split, seed, num_frames, image_size
        self.device = torch.device(device)
        margin = image_size - digit_size
        self.canvases = F.pad(still.images, (0, margin, 0, margin)).to(self.device)  # [N, S, S]

    @property
    def num_classes(self) -> int:
        return self.directions * len(self.speeds)

    def batch(self, indices: Sequence[int]) -> Actions:
        """The clips `indices`, on `device`."""
        key = (self.seed, ("train", "test").index(self.split))
        draws = np.array([np.random.default_rng((*key, int(n))).random(3) for n in indices]).reshape(-1, 3)
        labels = np.array(indices, dtype=np.int64) % self.num_classes
        angle = 2 * math.pi * (labels // len(self.speeds)) / self.directions
        velocity = np.array(self.speeds)[labels % len(self.speeds), None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        path = self.image_size * draws[:, None, 1:] + velocity[:, None] * np.arange(self.num_frames)[:, None]
        image = torch.from_numpy((draws[:, 0] * len(self.canvases)).astype(np.int64)).to(self.device)
        corner = torch.from_numpy(np.rint(path).astype(np.int64)).to(self.device)  # [B, T, 2], x and y

        # Pixel p of a frame shows pixel p - corner of the canvas with the digit in its corner, around the edges.
        pixels = torch.arange(self.image_size, device=self.device)
        x, y = ((pixels - corner[..., axis, None]) % self.image_size for axis in (0, 1))  # [B, T, S]
        frames = self.canvases[image[:, None, None, None], y[..., None], x[..., None, :]]
        return Actions(frames[:, :, None], torch.from_numpy(labels).to(self.device))
