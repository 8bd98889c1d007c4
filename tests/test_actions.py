"""Generated actions: only motion tells the classes apart; the experiment on them runs and judges as its rules say."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from rich.console import Console

for package in ("matplotlib", "safetensors", "scipy", "sklearn"):
    pytest.importorskip(package)

from mkconvlstm_cuda import experiments  # noqa: E402
from mkconvlstm_cuda.actions import MovingActions  # noqa: E402
from mkconvlstm_cuda.classifier import VideoClassifier, frame_cross_entropy  # noqa: E402
from mkconvlstm_cuda.encoders import SmallEncoder  # noqa: E402
from mkconvlstm_cuda.experiments import table1_actions  # noqa: E402
from mkconvlstm_cuda.experiments.experiment import Measured, Results  # noqa: E402

SMALL = {"image_size": 24, "digit_size": 9, "num_frames": 4}


def test_a_class_is_a_direction_and_a_speed():
    actions = MovingActions(directions=4, speeds=(1, 3), **SMALL)
    frames, labels = actions.batch(range(16))
    assert frames.shape == (16, 4, 1, 24, 24)
    assert labels.tolist() == 2 * list(range(8))
    steps = {0: (1, 0), 1: (3, 0), 2: (0, 1), 3: (0, 3), 4: (-1, 0), 5: (-3, 0), 6: (0, -1), 7: (0, -3)}
    for clip, label in zip(frames[:, :, 0], labels.tolist(), strict=True):
        dx, dy = steps[label]
        for before, after in itertools.pairwise(clip):
            assert torch.equal(after, before.roll((dy, dx), (0, 1)))
        assert clip.amax() > 0.5


def test_oblique_directions_keep_their_speed():
    actions = MovingActions(directions=8, speeds=(5,), image_size=64, digit_size=9, num_frames=9)
    clip = actions.batch([1]).frames[0, :, 0]
    shift = round(8 * 5 / 2**0.5)
    assert torch.equal(clip[-1], clip[0].roll((shift, shift), (0, 1)))


def test_clips_are_functions_of_their_index_seed_and_split():
    actions = MovingActions(**SMALL)
    whole = actions.batch(range(12)).frames
    torch.testing.assert_close(actions.batch([7, 3]).frames, whole[[7, 3]])
    assert not torch.equal(MovingActions(seed=1, **SMALL).batch(range(12)).frames, whole)
    test = MovingActions(split="test", **SMALL)
    ours, theirs = ({canvas.numpy().tobytes() for canvas in a.canvases} for a in (actions, test))
    assert not ours & theirs


def test_a_single_frame_tells_nothing():
    """Where digits are, in any frame, is as likely in each class: the mean position is the canvas's for all."""
    actions = MovingActions(directions=2, speeds=(1, 5), **SMALL)
    frames, labels = actions.batch(range(8000))
    for t in (0, 3):
        shown = frames[:, t, 0].mean(dim=1)  # [B, W]
        means = torch.stack([shown[labels == label].mean(dim=0) for label in range(4)])
        assert means.std(dim=0).max() < 0.12 * means.mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"directions": 0}, "directions: got 0"), ({"speeds": ()}, "speeds"), ({"split": "x"}, "split")],
)
def test_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        MovingActions(**options)


def test_a_classifier_learns_to_see_motion():
    torch.manual_seed(0)
    actions = MovingActions(directions=2, speeds=(2,), **SMALL)
    model = VideoClassifier(8, 2, {3: 4, 5: 4}, encoder=SmallEncoder(1, 8, (2, 1, 1)), pool="max", lstm_features=16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(120):
        frames, labels = actions.batch(range(16 * step, 16 * step + 16))
        loss = frame_cross_entropy(model(frames)[:, 1:], labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.4 < np.mean(losses[:5])


def test_experiment_runs(tmp_path):
    tiny = {"seeds": [0, 1], "steps": 1, "batch_size": 3, "test_clips": 8}
    told = experiments.run(
        table1_actions.EXPERIMENT,
        tmp_path,
        quick=True,
        settings=tiny,
        device=torch.device("cpu"),
        console=Console(file=io.StringIO()),
    )
    assert json.loads((tmp_path / "table1-actions" / "results.json").read_text()) == told
    assert len(told["runs"]) == 8
    for run in told["runs"]:
        speeds = [run[f"frame_accuracy, speed {v}"] for v in (2, 7)]
        assert run["frame_accuracy"] == pytest.approx(np.mean(speeds))
    for settings in (table1_actions.FULL, table1_actions.QUICK):
        classes = settings["directions"] * len(settings["speeds"])
        assert settings["test_clips"] % classes == 0, "each class shall count the same"
        assert len(settings["seeds"]) >= 3


def test_experiment_wants_a_clip_of_each_class(tmp_path):
    tiny = {"seeds": [0], "steps": 1, "batch_size": 3, "test_clips": 7}
    with pytest.raises(ValueError, match="test_clips: got 7, wanted one of each of 8 classes"):
        experiments.run(table1_actions.EXPERIMENT, tmp_path, quick=True, settings=tiny, device=torch.device("cpu"))


def test_experiment_is_judged_by_accuracy():
    settings = table1_actions.FULL

    def verdicts(accuracy):
        def run(variant, seed):
            slow, fast = accuracy[variant]
            noise = seed / 100 * (len(variant) - 2)
            numbers = {"frame_accuracy": (slow + fast) / 2 + noise}
            return {**numbers, "frame_accuracy, speed 2": slow, "frame_accuracy, speed 12": fast + noise}

        results = {v: [Measured(run(v, seed)) for seed in settings["seeds"]] for v in settings["variants"]}
        return [claim.verdict for claim in table1_actions.judge(settings, Results(results))]

    papers = {"3x3": (80, 60), "5x5": (80, 70), "{3,5}": (85, 75), "{3,5} + 1x1": (86, 76)}
    assert verdicts(papers) == ["reproduced"] * 5
    contrary = {"3x3": (80, 80), "5x5": (80, 70), "{3,5}": (60, 60), "{3,5} + 1x1": (50, 50)}
    assert verdicts(contrary) == ["not reproduced"] * 5
