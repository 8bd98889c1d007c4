"""Split files, sampling, flow; and whatever can be wrong with a video."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mkconvlstm_cuda.video import ClipSettings, VideoError, count_kinds, read_clip, read_split

av = pytest.importorskip("av")

ALL = ClipSettings(num_frames=6, start=0, fps=None, resize=None, image_size=16)


def write_video(path: Path, frames: int = 12, rate: int | Fraction = 10, size=(32, 24), codec="ffv1") -> Path:
    """Lossless and grey: frame t is brighter by 6 than frame t - 1, its left half by 5 more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if codec == "mpeg4" else "gray"
        for t in range(frames):
            picture = np.full((size[1], size[0]), 6 * t, np.uint8)
            picture[:, : size[0] // 2] += 5
            frame = av.VideoFrame.from_ndarray(picture, format="gray").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(path, **options) -> list[int]:
    """Which frames of a video from `write_video` a clip is made of."""
    clip = read_clip(path, ClipSettings(**{"resize": None, "image_size": 16, "start": 0, "grey": True, **options}))
    return [round((frame[0, 8, 12].item()) / 6) for frame in clip]


def write_split(folder: Path, train="", test="", classes="1 Jump\r\n2 Run\r\n") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (("classInd.txt", classes), ("trainlist01.txt", train), ("testlist01.txt", test)):
        if text is not None:
            (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "videos"
    for name in ("Jump/a.avi", "Jump/b c.avi", "Run/a.avi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_reads_split_files_as_ucf101_has_them(folder, tmp_path):
    split = read_split(folder, write_split(tmp_path / "s", "Jump/a.avi 1\r\nRun/a.avi 2\r\n\r\n", "Jump/b c.avi\r\n"))
    assert split.classes == ["Jump", "Run"]
    assert [(v.name, v.label) for v in split.train] == [("Jump/a.avi", 0), ("Run/a.avi", 1)]
    assert [(v.name, v.label) for v in split.test] == [("Jump/b c.avi", 0)]
    assert (split.skipped, split.missing) == ([], [])
    assert split.train[0].path == (folder / "Jump" / "a.avi").resolve()


def test_chosen_classes_are_counted_from_zero(folder, tmp_path):
    split_folder = write_split(tmp_path / "s", "Jump/a.avi 2\nRun/a.avi 3\n", classes="1 Dive\n2 Jump\n3 Run\n")
    split = read_split(folder, split_folder, classes=["Run", "Dive"])
    assert [(v.name, v.label) for v in split.train] == [("Run/a.avi", 0)]
    assert not split.skipped
    for wrong, message in ((["Run", "Fly"], "Fly not among"), (["Run"], "at least two"), (["Run", "Run"], "each once")):
        with pytest.raises(ValueError, match=message):
            read_split(folder, split_folder, classes=wrong)


def test_missing_split_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_split(folder, tmp_path / "s")
    split_folder = write_split(tmp_path / "s", "Jump/a.avi 7\n", test=None, classes=None)
    split = read_split(folder, split_folder)
    assert split.classes == ["Jump", "Run"]
    assert [Path(path).name for path in split.missing] == ["classInd.txt", "testlist01.txt"]
    assert [v.label for v in split.train] == [0]
    assert split.test == []
    with pytest.raises(FileNotFoundError, match=r"trainlist02\.txt"):
        read_split(folder, split_folder, number=2)
    with pytest.raises(ValueError, match="got '2 Run' in line 1"):
        read_split(folder, write_split(tmp_path / "s", classes="2 Run\n"))


def test_lines_that_cannot_be_used_are_skipped_and_counted(folder, tmp_path):
    lines = {
        "Jump/gone.avi 1": "missing",
        "Fly/a.avi 1": "unknown class",
        "a.avi 1": "unknown class",
        "Run/a.avi 1": "wrong class",
        "Jump 1": "unknown class",
        "Jump/a\0b.avi 1": "missing",
        "Jump/\udcff.avi 1": "missing",
    }
    split_folder = write_split(tmp_path / "s")
    text = "\n".join([*lines, "Jump/a.avi 1", "Jump/a.avi 1"])
    (split_folder / "trainlist01.txt").write_bytes(text.encode(errors="surrogateescape"))
    split = read_split(folder, split_folder)
    assert [v.name for v in split.train] == ["Jump/a.avi"]
    assert [entry.kind for entry in split.skipped] == [*lines.values(), "named twice"]
    assert count_kinds(split.skipped) == {"missing": 3, "unknown class": 3, "wrong class": 1, "named twice": 1}
    assert [entry.name for entry in split.skipped][-2] == r"Jump/\udcff.avi 1"


def test_file_names_do_not_lead_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "secret.avi"
    outside.write_bytes(b"")
    (folder / "Jump" / "out.avi").symlink_to(outside)
    (folder / "Out").symlink_to(tmp_path)
    (folder / "Jump" / "in.avi").symlink_to(folder / "Run" / "a.avi")
    (folder / "Jump" / "loop.avi").symlink_to(folder / "Jump" / "loop.avi")
    os.mkfifo(folder / "Jump" / "pipe.avi")
    names = {
        "../secret.avi": "outside the folder",
        "Jump/../../secret.avi": "outside the folder",
        "Jump/../Run/a.avi": "outside the folder",
        r"Jump\..\..\secret.avi": "outside the folder",
        str(outside): "outside the folder",
        r"C:\secret.avi": "outside the folder",
        r"\\host\share\secret.avi": "outside the folder",
        "Jump/out.avi": "outside the folder",
        "Out/secret.avi": "outside the folder",
        "Jump/loop.avi": "missing",
        "Jump/pipe.avi": "missing",
    }
    split = read_split(folder, write_split(tmp_path / "s", "\n".join([*names, "Jump/in.avi"])))
    assert {entry.name: entry.kind for entry in split.skipped} == names
    assert [v.path for v in split.train] == [(folder / "Run" / "a.avi").resolve()]
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert [v.name for v in read_split(linked, tmp_path / "s").train] == ["Jump/in.avi"]


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_samples_what_is_on_screen(tmp_path, suffix):
    """mkv rounds time stamps to milliseconds."""
    path = write_video(tmp_path / f"a{suffix}", frames=12, rate=30)
    assert shown(path, num_frames=6, fps=15.0) == [0, 2, 4, 6, 8, 10]
    assert shown(path, num_frames=5, fps=12.0) == [0, 2, 5, 7, 10]
    assert shown(path, num_frames=4, fps=15.0, start=2) == [4, 6, 8, 10]
    assert shown(path, num_frames=6, fps=60.0) == [0, 0, 1, 1, 2, 2]
    assert shown(path, num_frames=12, fps=None) == list(range(12))
    film = write_video(tmp_path / f"film{suffix}", frames=12, rate=Fraction(30000, 1001))
    assert shown(film, num_frames=12, fps=30000 / 1001) == list(range(12))


def test_short_videos_are_skipped_or_start_over(tmp_path):
    path = write_video(tmp_path / "a.avi", frames=12, rate=30)
    assert shown(path, num_frames=10, start=3, fps=15.0, short="wrap") == [2 * (k % 6) for k in range(3, 13)]
    with pytest.raises(VideoError, match="too short: 6 sampled frames, wanted 7") as caught:
        shown(path, num_frames=4, start=3, fps=15.0)
    assert caught.value.kind == "too short"


def test_frames_are_scaled_and_cut_out_of_the_middle(tmp_path):
    path = write_video(tmp_path / "a.avi", frames=6, size=(64, 32))
    clip = read_clip(path, ALL)
    assert clip.shape == (6, 3, 16, 16)
    assert clip.dtype == torch.uint8
    for t in range(6):
        assert (clip[t, :, :, :7] == 6 * t + 5).all()
        assert (clip[t, :, :, 9:] == 6 * t).all()
    assert read_clip(path, ClipSettings(6, 0, None, 20, 16, grey=True)).shape == (6, 1, 16, 16)


def test_damaged_files_are_errors_of_their_own(tmp_path):
    """Playlists too, which FFmpeg alone would follow to other files."""
    good = write_video(tmp_path / "good.avi", frames=40, codec="mpeg4").read_bytes()
    address = "http://localhost:9/segment.ts"
    contents = {
        "empty.avi": b"",
        "text.avi": b"no video at all\n" * 40,
        "head.avi": good[:200],
        "playlist.avi": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n".encode(),
        "concat.avi": b"ffconcat version 1.0\nfile good.avi\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError) as caught:
            read_clip(tmp_path / name, ALL)
        assert caught.value.kind == "corrupt", name
    with pytest.raises(VideoError, match="missing"):
        read_clip(tmp_path / "nothing.avi", ALL)
    noise = bytearray(good)
    noise[len(good) // 3 :] = np.random.default_rng(0).bytes(len(good) - len(good) // 3)
    (tmp_path / "noise.avi").write_bytes(noise)
    with pytest.raises(VideoError) as caught:
        read_clip(tmp_path / "noise.avi", ClipSettings(40, 0, None, None, 16))
    assert caught.value.kind in ("corrupt", "too short")


def test_a_video_without_pictures_or_of_a_silly_shape(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no pictures"):
        read_clip(tmp_path / "sound.mkv", ALL)
    with pytest.raises(VideoError, match="frames of 1024 x 16 pixels"):
        read_clip(write_video(tmp_path / "wide.avi", frames=6, size=(1024, 16)), ALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames: got 0"),
        ({"start": -1}, "start: got -1"),
        ({"fps": 0.0}, "fps: got 0"),
        ({"resize": 100}, "resize: got 100"),
        ({"image_size": 4}, "image_size: got 4"),
        ({"short": "pad"}, "short: got 'pad'"),
    ],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ClipSettings(**options)


def test_flow_is_that_of_moving_digits():
    """Against exact flow, where a digit is seen; frames are shown larger, for the search needs texture."""
    pytest.importorskip("cv2")
    pytest.importorskip("sklearn")
    from mkconvlstm_cuda.data import MovingDigits
    from mkconvlstm_cuda.flow import optical_flow

    clip = MovingDigits(speeds=(2.0,), num_frames=5)[3]
    flow = optical_flow((255 * clip.frames).byte())
    assert flow.shape == clip.flow.shape
    seen = clip.frames[:, 0] > 0.3
    errors = (flow - clip.flow).norm(dim=1)[seen]
    assert clip.flow.norm(dim=1)[seen].min() >= 1
    assert errors.median() < 0.4
    coloured = optical_flow((255 * clip.frames).byte().expand(-1, 3, -1, -1))
    torch.testing.assert_close(coloured, flow)
    assert not optical_flow((255 * clip.frames[:1]).byte()).any()
    for wrong in (clip.frames, clip.frames[0].byte(), clip.frames[..., :8].byte()):
        with pytest.raises(ValueError, match="frames: got"):
            optical_flow(wrong)
