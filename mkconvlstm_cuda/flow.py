"""Optical flow between the frames of a clip, by OpenCV's Dense Inverse Search."""

import torch
from torch import Tensor

_MIN_SIZE = 16
_TO_GREY = torch.tensor([0.299, 0.587, 0.114])


def optical_flow(frames: Tensor) -> Tensor:
    """How far what is seen in each pixel has come since the frame before: what `data.Clip.flow` is, but estimated.

    Frame 0 has no frame before it; its flow is where its pixels go until frame 1, as if they moved on evenly.

    Args:
        frames: [T, C, H, W] uint8, C = 3 (RGB) or 1; H and W at least 16.

    Returns:
        [T, 2, H, W] float32, (dx, dy) in pixels per frame; zeros if T = 1.

    Raises:
        ValueError: the shape or dtype is another. ImportError: OpenCV is not installed.
    """
    if frames.dim() != 4 or frames.shape[1] not in (1, 3) or min(frames.shape[2:]) < _MIN_SIZE:
        raise ValueError(f"frames: got shape {list(frames.shape)}, wanted [T, 1 or 3, H, W], at least {_MIN_SIZE} wide")
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames: got {frames.dtype}, wanted torch.uint8")
    cv2 = import_cv2()
    if frames.shape[1] == 3:
        frames = (frames * _TO_GREY[:, None, None]).sum(dim=1, keepdim=True).round().byte()
    grey = frames[:, 0].numpy()
    flow = torch.zeros(len(grey), 2, *grey.shape[1:])
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for t in range(1, len(grey)):
        # From here back to the frame before, so that the vectors belong to the pixels of this one.
        flow[t] = -torch.from_numpy(search.calc(grey[t], grey[t - 1], None)).movedim(-1, 0)
    if len(grey) > 1:
        flow[0] = torch.from_numpy(search.calc(grey[0], grey[1], None)).movedim(-1, 0)
    return flow


def import_cv2():
    """OpenCV. Raises ImportError with what to install."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("optical flow comes from OpenCV: pip install 'mkconvlstm_cuda[video]'") from error
    return cv2
