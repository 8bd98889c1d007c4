"""Copies between layouts and sums over pixels in Triton, in its interpreter and on a GPU."""

import pytest
import torch
from test_triton_compile import compile_launch
from triton_problems import INTERPRETED, compiled, interpreted

layout = pytest.importorskip("mkconvlstm_cuda.triton_kernels.layout")


def images(shape, order, dtype=torch.float32):
    """Random [B, T, C, H, W] that lies in memory as ``order`` says, for example (1, 0, 3, 4, 2)."""
    t = torch.randn([shape[d] for d in order]).to(dtype)
    return t.permute([order.index(d) for d in range(5)])


CHANNELS_LAST, CHANNELS_FIRST, TIME_MAJOR = (0, 1, 3, 4, 2), (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)


def check_layouts(device) -> None:
    for shape in ((2, 3, 5, 7, 3), (1, 2, 16, 4, 8), (3, 1, 70, 9, 10), (2, 2, 1, 5, 5), (2, 3, 4, 1, 1)):
        for source, target, dtype in (
            (CHANNELS_FIRST, TIME_MAJOR, torch.float32),
            (TIME_MAJOR, CHANNELS_FIRST, torch.float16),
            (CHANNELS_LAST, TIME_MAJOR, torch.float32),
            (CHANNELS_FIRST, CHANNELS_FIRST, torch.float32),
        ):
            x = images((shape[0], shape[1] + 1, *shape[2:]), source).to(device)[:, 1:]
            y = torch.full_like(images(shape, target, dtype), float("nan"), device=device)
            assert layout.copy(y, x)
            torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0)
    video = images((2, 3, 5, 4, 4), (0, 2, 1, 3, 4)).to(device)  # in memory [B, C, T, H, W]
    y = torch.full_like(images(video.shape, TIME_MAJOR), float("nan"), device=device)
    assert layout.copy(y, video)
    torch.testing.assert_close(y, video, rtol=0, atol=0)
    for rows, columns in ((1, 3), (1000, 40), (layout.FEW_ROWS + 1, 9)):
        values = torch.randint(-8, 9, (rows, columns), device=device).float()
        assert torch.equal(layout.row_sums(values), values.sum(0))
    odd = images((2, 3, 5, 7, 3), (0, 1, 3, 2, 4)).to(device)
    assert not layout.copy(torch.empty_like(odd), odd)


@interpreted
def test_interpreted_layouts():
    check_layouts("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_layouts_on_a_gpu():
    check_layouts("cuda")


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_layout_kernels_compile_without_a_gpu(capability, monkeypatch):
    launches = []
    monkeypatch.setattr(layout, "launch", lambda kernel, _, args, options: launches.append((kernel, args, options)))
    for dtype in (torch.bfloat16, torch.float32):
        x = images((2, 3, 32, 14, 14), CHANNELS_FIRST, dtype)
        layout.copy(images(x.shape, TIME_MAJOR, dtype), x)
        layout.copy(x, images(x.shape, TIME_MAJOR, dtype))
        layout.row_sums(torch.zeros((layout.FEW_ROWS + 1, 128), dtype=dtype))
    for kernel, args, options in launches:
        assert "ptx" in compile_launch(kernel, args, options, capability).asm
