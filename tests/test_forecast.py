"""The demo: all files are written, training learns, and resuming is exact."""

import io
import json
import signal
import sys

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from mkconvlstm_cuda import forecast  # noqa: E402

TINY = {
    "kernels": {1: 2, 3: 3},
    "image_size": 16,
    "digit_size": 8,
    "patch_size": 4,
    "past": 3,
    "horizon": 2,
    "batch_size": 2,
    "test_clips": 4,
    "device": "cpu",
    "precision": "float32",
}


def run(output, **options):
    return forecast.run(output, console=Console(file=io.StringIO()), **{**TINY, **options})


def weights(output):
    return torch.load(output / forecast.CHECKPOINT, weights_only=True)


def test_writes_pictures_metrics_and_checkpoint(tmp_path):
    output = tmp_path / "new" / "folder"
    metrics = run(output, steps=3)
    names = ["checkpoint.pt", "forecast.gif", "forecast.png", "metrics.json"]
    assert sorted(path.name for path in output.iterdir()) == names
    with Image.open(output / "forecast.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors()) > 10
    with Image.open(output / "forecast.gif") as movie:
        assert movie.n_frames == 5
    written = json.loads((output / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    assert len(written["losses"]) == written["training"]["steps"] == 3
    assert written["settings"]["kernels"] == {"1": 2, "3": 3}
    assert written["evaluation"]["prediction"]["mse"] > 0
    assert written["evaluation"]["pixels_per_sequence"] == 2 * 16 * 16
    assert written["training"]["backend"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_training_ends_with_the_same_weights(tmp_path, precision):
    def interrupt(step, loss):
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    options = {"steps": 9, "precision": precision}
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", on_step=interrupt, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert weights(tmp_path / "parts")["step"] == 4
    run(tmp_path / "parts", resume=True, **options)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole["losses"] == parts["losses"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name


def test_resume_refuses_another_run(tmp_path):
    with pytest.raises(ValueError, match="resume: there is no checkpoint"):
        run(tmp_path, steps=1, resume=True)
    run(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"batch_size = 2, not 3; seed = 0, not 7"):
        run(tmp_path, steps=2, resume=True, batch_size=3, seed=7)


def test_a_checkpoint_is_not_overwritten_unasked(tmp_path):
    run(tmp_path, steps=2)
    before = (tmp_path / forecast.CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match="--resume continues it, --overwrite throws it away"):
        run(tmp_path, steps=1)
    with pytest.raises(ValueError, match="one of the two"):
        run(tmp_path, steps=1, resume=True, overwrite=True)
    assert (tmp_path / forecast.CHECKPOINT).read_bytes() == before
    assert run(tmp_path, steps=1, overwrite=True)["training"]["steps"] == 1


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run(tmp_path, steps=1)
    before = (tmp_path / forecast.CHECKPOINT).read_bytes()

    def torn(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, steps=2, overwrite=True)
    assert (tmp_path / forecast.CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_loss_goes_down(tmp_path):
    losses = run(tmp_path, steps=60, batch_size=8, speeds=(1.0,), learning_rate=0.02)["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_minutes_bound_the_training(tmp_path):
    metrics = run(tmp_path, minutes=0.01)
    assert 0.6 <= metrics["training"]["seconds"] < 60
    again = run(tmp_path, minutes=0.01, resume=True)
    assert again["training"]["steps"] == metrics["training"]["steps"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 1, "minutes": 1}, ValueError, "one of the two"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"minutes": 0}, ValueError, "minutes: got 0, wanted"),
        ({"minutes": -1}, ValueError, "minutes: got -1"),
        ({"test_clips": 0}, ValueError, "test_clips: got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate: got 0\.0"),
        ({"precision": "int8"}, ValueError, "precision: got 'int8'"),
        ({"speeds": ()}, ValueError, "speeds"),
        ({"epochs": 3}, TypeError, "epochs"),
        ({"mnist": "nowhere"}, FileNotFoundError, "nowhere has none of"),
    ],
)
def test_refuses_what_makes_no_sense_before_writing(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_says_what_to_install_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib pillow"):
        run(tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()
