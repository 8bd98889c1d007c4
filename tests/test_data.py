"""Moving digits: motion, flow and splits are exactly what the docstrings say."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mkconvlstm_cuda.data import MovingDigits, load_mnist, patchify, unpatchify


def blobs(count=20, size=7):
    """Digit images that are all different and nowhere zero."""
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1


def test_clip_has_the_documented_shapes_and_values():
    pytest.importorskip("sklearn")
    clip = MovingDigits(speeds=(1, 8))[3]
    assert clip.frames.shape == (20, 1, 64, 64)
    assert clip.frames.dtype == torch.float32
    assert clip.frames.min() == 0
    assert 0.5 < clip.frames.max() <= 1
    assert clip.flow.shape == (20, 2, 64, 64)
    assert clip.flow.dtype == torch.float32
    assert clip.owner.shape == (20, 64, 64)
    assert set(clip.owner.unique().tolist()) == {-1, 0, 1}
    assert clip.labels.shape == (2,)
    assert clip.labels.dtype == torch.int64


def test_clip_depends_on_seed_and_index_only():
    make = lambda **options: MovingDigits(blobs(), image_size=32, digit_size=9, **options)  # noqa: E731
    dataset, again = make(seed=5), make(seed=5, length=7)
    batch = dataset.batch([4, 0, 6])
    for row, index in enumerate([4, 0, 6]):
        for got, wanted in zip(again[index], batch, strict=True):
            assert torch.equal(got, wanted[row])
    assert torch.equal(dataset.frames([4, 0, 6]), batch.frames)
    assert torch.equal(dataset[-1].frames, dataset[len(dataset) - 1].frames)
    assert not torch.equal(dataset[0].frames, dataset[1].frames)
    assert not torch.equal(dataset[0].frames, make(seed=6)[0].frames)
    assert not torch.equal(dataset[0].frames, make(seed=5, split="test")[0].frames)
    with pytest.raises(IndexError, match="index"):
        again[7]
    assert dataset.frames([]).shape == (0, 20, 1, 32, 32)


def test_works_in_a_data_loader():
    dataset = MovingDigits(blobs(), image_size=32, digit_size=9, length=5)
    sizes = [len(batch.frames) for batch in DataLoader(dataset, batch_size=2)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("speed", [0.0, 0.7, 3.0, 8.0, 90.0])
def test_warping_by_the_flow_gives_the_next_frame(speed):
    dataset = MovingDigits(blobs(), speeds=(speed,), num_frames=9, image_size=33, digit_size=10)
    clip = dataset.batch(range(8))
    y, x = torch.meshgrid(torch.arange(33), torch.arange(33), indexing="ij")
    seen = clip.owner[:, 1:] == 0
    assert torch.equal(seen, clip.frames[:, 1:, 0] > 0)
    source_x, source_y = x - clip.flow[:, 1:, 0].long(), y - clip.flow[:, 1:, 1].long()
    warped = clip.frames[:, :-1, 0].flatten(-2).gather(-1, (source_y * 33 + source_x).clamp(0, 33 * 33 - 1).flatten(-2))
    assert torch.equal(warped.view_as(seen)[seen], clip.frames[:, 1:, 0][seen])
    assert not clip.flow.movedim(2, -1)[clip.owner < 0].any()


def test_flow_and_owner_where_digits_overlap():
    dataset = MovingDigits(blobs(), speeds=(1, 8, 4), num_frames=6, image_size=24, digit_size=12)
    motion, clip = dataset.motion(range(6)), dataset.batch(range(6))
    step = motion.position.diff(dim=2)
    shown = torch.stack([(clip.owner == d).sum(dim=(2, 3)) for d in range(3)])
    assert (shown > 0).sum() > 30
    for d in range(3):
        mine = (clip.owner == d)[:, :, None].expand_as(clip.flow)
        wanted = step[:, d].float()[..., None, None].expand_as(clip.flow)
        assert torch.equal(clip.flow[mine], wanted[mine])
    for b, t in [(0, 0), (3, 5)]:
        layers = torch.zeros(3, 24, 24)
        for d in range(3):
            column, row = motion.position[b, d, t + 1].tolist()
            layers[d, row : row + 12, column : column + 12] = dataset.images[motion.image[b, d]]
        assert torch.equal(clip.frames[b, t, 0], layers.amax(0))
        assert torch.equal(clip.owner[b, t], torch.where(layers.amax(0) > 0, layers.argmax(0), -1))


def test_digits_bounce_and_stay_inside():
    dataset = MovingDigits(blobs(), speeds=(11.0,), num_frames=50, image_size=40, digit_size=10)
    motion = dataset.motion(range(20))
    assert motion.position.shape == (20, 1, 51, 2)
    assert motion.position.min() == 0
    assert motion.position.max() == 30
    assert motion.position.diff(dim=2).abs().max() <= 12
    whole = dataset.images[motion.image[:, 0]].sum(dim=(1, 2))
    shown = dataset.frames(range(20)).sum(dim=(2, 3, 4))
    torch.testing.assert_close(shown, whole[:, None].expand_as(shown))
    filling = MovingDigits(blobs(), speeds=(5.0,), image_size=10, digit_size=10)
    assert not filling.batch([0]).flow.any()


def test_speed_is_what_was_asked_for():
    dataset = MovingDigits(blobs(), speeds=(1.0, 8.0), speed_spread=0.5, num_frames=4, image_size=600, digit_size=8)
    motion = dataset.motion(range(400))
    speed = motion.velocity.norm(dim=-1)
    torch.testing.assert_close(speed.mean(0), torch.tensor([1.0, 8.0]).double(), rtol=0.03, atol=0)
    assert 0.5 <= speed[:, 0].min() < 0.52
    assert 1.48 < speed[:, 0].max() <= 1.5
    torch.testing.assert_close(motion.velocity.mean(0), torch.zeros(2, 2).double(), rtol=0, atol=0.6)
    # Away from the borders, the way is straight and as long as the speed says, but for rounding.
    way = (motion.position[:, :, -1] - motion.position[:, :, 0]).double()
    inside = ((motion.position > 50) & (motion.position < 542)).all(dim=3).all(dim=2)
    assert inside.sum() > 400
    assert (way - 4 * motion.velocity)[inside].abs().max() <= 1


def test_splits_share_no_image_whatever_the_seed():
    train = MovingDigits(blobs(50), seed=1, image_size=16, digit_size=7)
    test = MovingDigits(blobs(50), seed=2, image_size=16, digit_size=7, split="test")
    assert (len(train.images), len(test.images)) == (40, 10)
    assert sorted(train.image_ids.tolist() + test.image_ids.tolist()) == list(range(50))


def test_labels_follow_the_images():
    images = torch.arange(1, 11).view(10, 1, 1).expand(10, 4, 4) / 10
    dataset = MovingDigits((images, torch.arange(10)), speeds=(1.0,), image_size=8, digit_size=4)
    clip = dataset.batch(range(30))
    brightness = clip.frames.amax(dim=(1, 2, 3, 4))
    torch.testing.assert_close(brightness, (clip.labels[:, 0] + 1) / 10)
    assert (MovingDigits(images, image_size=8, digit_size=4)[0].labels == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "split: got 'validation'"),
        ({"speeds": ()}, "speeds"),
        ({"speeds": (-1,)}, "speeds"),
        ({"speed_spread": 2}, "speed_spread: got 2"),
        ({"digit_size": 65}, "digit_size: got 65"),
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"digits": torch.rand(3, 3)}, "digits: got images of shape"),
        ({"digits": torch.rand(9, 3, 3) * 5}, "digits: got values"),
        ({"digits": (torch.rand(9, 3, 3), torch.zeros(8))}, "digits: got labels"),
        ({"digits": torch.rand(1, 3, 3)}, "digits: 1 images cannot be split"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        MovingDigits(**{"digits": blobs(), **options})


def test_refuses_images_of_integers():
    with pytest.raises(TypeError, match="int64"):
        MovingDigits(torch.ones(9, 3, 3, dtype=torch.int64))


def test_says_what_to_install(monkeypatch):
    from mkconvlstm_cuda.data import handwritten_digits

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        handwritten_digits.__wrapped__()


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 5, 3, 8, 4)])
def test_patchify_round_trip(shape):
    x = torch.rand(shape)
    patches = patchify(x, 4)
    assert patches.shape == (*shape[:-3], shape[-3] * 16, shape[-2] // 4, shape[-1] // 4)
    assert torch.equal(unpatchify(patches, 4), x)
    assert torch.equal(patches[..., 5, 1, 0], x[..., 0, 5, 1])
    assert torch.equal(patchify(x, 1), x)


@pytest.mark.parametrize("shape", [(0, 3, 8, 12), (2, 0, 3, 8, 12), (0, 8, 4)])
def test_patchify_of_nothing(shape):
    patches = patchify(torch.rand(shape), 4)
    assert patches.shape == (*shape[:-3], 16 * shape[-3], shape[-2] // 4, shape[-1] // 4)
    assert unpatchify(patches, 4).shape == shape


def test_patchify_refuses_odd_sizes():
    with pytest.raises(ValueError, match="multiples of 4"):
        patchify(torch.rand(1, 8, 9), 4)
    with pytest.raises(ValueError, match="multiple of 16"):
        unpatchify(torch.rand(8, 2, 2), 4)


def idx(array, magic=None):
    header = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), rng.integers(0, 10, 12, np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, images, labels


def test_mnist_files_become_digits(mnist):
    folder, images, labels = mnist
    got_images, got_labels = load_mnist(folder)
    assert got_images.dtype == torch.uint8
    assert np.array_equal(got_images, images)
    assert np.array_equal(got_labels, labels)
    assert MovingDigits(load_mnist(folder))[0].frames.max() > 0.3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(np.zeros((3, 2, 2), np.uint8), 0x0801), "magic number 0x00000801"),
        ("train-images-idx3-ubyte", idx(np.zeros((3, 2, 2), np.uint8))[:-1], "got 11 bytes of data, wanted 12"),
        ("train-images-idx3-ubyte", b"\0\0", "got 2 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((3, 2, 2), np.uint8)), "3 train images but 12 labels"),
        ("train-images-idx3-ubyte.gz", b"not gzip", "not a complete gzip file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(bytes(99))[:-9], "not a complete gzip file"),
    ],
)
def test_broken_mnist_files_are_named(mnist, name, content, message):
    (mnist[0] / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_mnist(mnist[0])


def test_missing_mnist_files_are_named(mnist):
    with pytest.raises(FileNotFoundError, match=r"none of t10k-images-idx3-ubyte, t10k-images-idx3-ubyte\.gz"):
        load_mnist(mnist[0], "test")
    with pytest.raises(ValueError, match="part: got 'all'"):
        load_mnist(mnist[0], "all")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clips_are_the_same_on_any_device():
    here, there = (MovingDigits(speeds=(1.0, 8.0), device=device).batch([3, 5]) for device in ("cpu", "cuda"))
    for name, of_cpu, of_gpu in zip(here._fields, here, there, strict=True):
        assert of_gpu.is_cuda, name
        assert torch.equal(of_cpu, of_gpu.cpu()), name
