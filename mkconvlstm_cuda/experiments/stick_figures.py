"""Stick figures that move their limbs, in place or while they travel: a stand-in for poses of people (section IV-B2).

A figure has the 15 joints that the paper's data set annotates, joined by 14 lines. Every line swings about its rest
direction like a pendulum, with its own amplitude and phase; one period serves the whole figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Each line: the joint it starts from, its length in heights of the figure, its rest direction in degrees (0 is right,
# 90 is down) and the largest amplitude of its swing in degrees. Line k ends in joint k + 1; joint 0 is the belly.
BONES = (
    (0, 0.22, -90, 10),  # neck, 1
    (1, 0.14, -90, 15),  # face, 2
    (1, 0.10, 170, 10),  # left shoulder, 3
    (1, 0.10, 10, 10),  # right shoulder, 4
    (3, 0.17, 110, 70),  # left elbow, 5
    (4, 0.17, 70, 70),  # right elbow, 6
    (5, 0.16, 100, 90),  # left wrist, 7
    (6, 0.16, 80, 90),  # right wrist, 8
    (0, 0.12, 130, 5),  # left hip, 9
    (0, 0.12, 50, 5),  # right hip, 10
    (9, 0.20, 95, 40),  # left knee, 11
    (10, 0.20, 85, 40),  # right knee, 12
    (11, 0.20, 95, 50),  # left ankle, 13
    (12, 0.20, 85, 50),  # right ankle, 14
)
PERIOD = (16.0, 32.0)  # frames, at normal speed
REACH = 0.6  # heights of the figure that no joint leaves, from the belly


def clips(
    seed: Sequence[int],
    batch: int,
    frames: int,
    *,
    speed: float,
    travel: float,
    image_size: int = 56,
    height: float = 28.0,
    device: torch.device | None = None,
) -> Tensor:
    """A batch of clips, [B, T, 1, image_size, image_size] float32 in [0, 1]: white lines on black.

    Args:
        seed: ints; they decide everything.
        batch, frames: B and T.
        speed: 1, or n to see every n-th frame alone.
        travel: pixels per frame, at normal speed, that the belly moves in a straight line, reflected where the figure
            would leave the image; 0 keeps it in the middle.
        image_size, height: of the image and of a figure, in pixels.
        device: where they are painted.
    """
    joints = positions(seed, batch, frames, speed=speed, travel=travel, image_size=image_size, height=height)
    starts = [start for start, *_ in BONES]
    ends = list(range(1, len(BONES) + 1))
    joints = torch.from_numpy(joints).float().to(device, non_blocking=True)
    a, b = joints[:, :, starts], joints[:, :, ends]  # [B, T, lines, 2]
    grid = torch.arange(image_size, device=device, dtype=torch.float32)
    page = torch.zeros(batch, frames, image_size, image_size, device=device)
    for k in range(len(BONES)):  # one line at a time: all at once would take 14 times the memory
        start, along = a[:, :, k, :, None, None], (b - a)[:, :, k, :, None, None]
        x, y = grid - start[:, :, 0], grid[:, None] - start[:, :, 1]  # [B, T, 1, W], [B, T, H, 1]
        dx, dy = along[:, :, 0], along[:, :, 1]
        part = ((x * dx + y * dy) / (dx.square() + dy.square())).clamp(0, 1)
        distance = torch.hypot(x - part * dx, y - part * dy)
        page = torch.maximum(page, (1.5 - distance).clamp(0, 1))
    return page.unsqueeze(2)


def positions(
    seed: Sequence[int], batch: int, frames: int, *, speed: float, travel: float, image_size: int, height: float
) -> np.ndarray:
    """Joints of :func:`clips`, [B, T, 15, 2] float64: (x, y) in pixels."""
    draw = np.random.default_rng(list(seed))
    times = speed * np.arange(frames)
    rest, most = (np.radians([bone[k] for bone in BONES]) for k in (2, 3))
    amplitude, phase = draw.uniform(0.3, 1, (batch, len(BONES))) * most, draw.uniform(0, 2 * np.pi, (batch, len(BONES)))
    turn = 2 * np.pi / draw.uniform(*PERIOD, (batch, 1, 1)) * times[:, None]  # [B, T, 1]
    angle = rest + amplitude[:, None] * np.sin(turn + phase[:, None])  # [B, T, lines]

    centre = np.full((batch, frames, 2), (image_size - 1) / 2)
    span = image_size - 1 - 2 * REACH * height
    direction = draw.uniform(0, 2 * np.pi, (batch, 1))
    start = draw.uniform(-0.5, 0.5, (batch, 1, 2)) * span
    if travel:
        way = np.stack([np.cos(direction), np.sin(direction)], axis=-1) * travel * times[:, None]  # [B, T, 2]
        path = (start + way + span / 2) % (2 * span)
        centre += span / 2 - np.abs(path - span)
    joints = np.empty((batch, frames, len(BONES) + 1, 2))
    joints[:, :, 0] = centre
    for k, (parent, length, *_) in enumerate(BONES):
        step = np.stack([np.cos(angle[:, :, k]), np.sin(angle[:, :, k])], axis=-1)
        joints[:, :, k + 1] = joints[:, :, parent] + height * length * step
    return joints
