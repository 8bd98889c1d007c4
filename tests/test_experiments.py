"""What experiments share: runs that are kept, resumed and shared out, intervals, verdicts; and the command."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mkconvlstm_cuda import cli, experiments
from mkconvlstm_cuda.experiments import settings
from mkconvlstm_cuda.experiments.claims import Claim, interval
from mkconvlstm_cuda.experiments.experiment import Experiment, Measured

for package in ("matplotlib", "safetensors", "scipy", "sklearn"):
    pytest.importorskip(package)


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["experiment", *args])
    assert result.exit_code == code, result.output
    return result.output


def fake(done: list, stop_at: int | None = None) -> Experiment:
    """An experiment whose runs only note that they were done."""
    settings = {"seeds": [0, 1, 2], "variants": {"{3,5}": {"shift": 1.0}, "3,5": {"shift": -1.0}}}

    def measure(settings, variant, seed, device, progress):
        if len(done) == stop_at:
            raise KeyboardInterrupt
        done.append((variant, seed))
        progress(0.5)
        shift = settings["variants"][variant]["shift"]
        return Measured({"x": shift + seed / 10}, {"map": torch.full((2, 3), shift)})

    def judge(settings, results):
        return [Claim.positive("it is more", "Fig. 0", "x", results.over_seeds(v, "x")) for v in settings["variants"]]

    def draw(settings, results, folder):
        (folder / "map.txt").write_text(str(results["{3,5}"][0].tensors["map"].tolist()))
        return [folder / "map.txt"]

    return Experiment("fake", "is it?", settings, settings, measure, judge, draw)


def test_interval_is_student_s():
    """Against the table: t_0.975 with 2 degrees of freedom is 4.3027; that of 1, 2, 3 has s = 1."""
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2, 3)
    np.testing.assert_allclose([found.low, found.high], [2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5], rtol=1e-6)
    assert interval([5.0]).low == -np.inf
    with pytest.raises(ValueError, match="finite"):
        interval([1.0, float("nan")])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1, 1.1, 0.9), "reproduced"),
        ((-1, -1.1, -0.9), "not reproduced"),
        ((1, -1, 0.5), "undecided"),
        ((3,), "undecided"),
    ],
)
def test_a_sign_is_judged_by_its_interval(values, verdict):
    claim = Claim.positive("more", "here", "x", values)
    assert claim.verdict == verdict
    json.dumps(claim.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((2, 2.01, 1.99), "reproduced"), ((2,), "reproduced"), ((4,), "not reproduced"), ((1, 2, 3), "undecided")],
)
def test_a_number_is_judged_by_its_interval(values, verdict):
    assert Claim.within("two", "here", "x", values, 1.9, 2.1).verdict == verdict


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_settings_of_its_own_are_taken(name):
    experiment = experiments.EXPERIMENTS[name]
    for own in (experiment.full, experiment.quick):
        own = json.loads(json.dumps(own))
        for chosen in (own, {**own, "seeds": [5]}):
            settings.check(chosen, own)
            settings.rehearse(experiment, chosen, ["seeds"])


def test_settings_are_numbers_of_the_same_kind():
    settings.compare("speed", 3, [4.0])
    settings.compare("bias", -1, [0.0])
    settings.compare("mix", "full", [None, "gate"])
    for value, example in ((2.5, 4), (True, 4), (0, 4), (-1.0, 4.0), (float("inf"), 4.0), ("4", 4), (None, 4)):
        with pytest.raises(ValueError, match=r"steps: got .*, wanted "):
            settings.compare("steps", value, [example])


def test_runs_that_are_done_are_not_done_again(tmp_path):
    done = []
    with pytest.raises(KeyboardInterrupt):
        experiments.run(fake(done, stop_at=4), tmp_path)
    assert not (tmp_path / "fake" / "results.json").exists()
    told = experiments.run(fake(done), tmp_path, resume=True)
    assert done == [(variant, seed) for variant in ("{3,5}", "3,5") for seed in range(3)]
    assert [claim["verdict"] for claim in told["claims"]] == ["reproduced", "not reproduced"]
    assert json.loads((tmp_path / "fake" / "results.json").read_text()) == told
    assert (tmp_path / "fake" / "map.txt").read_text() == str([[1.0] * 3] * 2)
    for choice, says in (({}, "--resume continues it, --overwrite"), ({"resume": True, "overwrite": True}, "one of")):
        with pytest.raises(ValueError, match=says):
            experiments.run(fake(done), tmp_path, **choice)
    assert len(list((tmp_path / "fake" / "runs").glob("*.json"))) == 6
    experiments.run(fake(done), tmp_path, overwrite=True)
    assert len(done) == 12


def test_resume_takes_more_seeds_and_refuses_other_settings(tmp_path):
    done = []
    experiments.run(fake(done), tmp_path, settings={"seeds": [0]})
    told = experiments.run(fake(done), tmp_path, resume=True, settings={"seeds": [0, 5]})
    assert done == [("{3,5}", 0), ("3,5", 0), ("{3,5}", 5), ("3,5", 5)]
    assert len(told["runs"]) == 4
    kept = tmp_path / "fake" / "settings.json"
    before = kept.read_text()
    kept.write_text("{")
    with pytest.raises(ValueError, match=r"resume: \S*settings\.json is damaged"):
        experiments.run(fake(done), tmp_path, resume=True)
    kept.write_text(before)
    with pytest.raises(ValueError, match="other settings: steps"):
        experiments.run(fake(done), tmp_path, resume=True, settings={"steps": 1})
    with pytest.raises(ValueError, match="other settings: 3,5"):
        experiments.run(fake(done), tmp_path, resume=True, settings={"variants": {"3,5": {"shift": 9.0}}})


def test_processes_share_out_the_runs(tmp_path):
    """As torchrun starts them: every run is done once, and one process tells."""
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from test_experiments import fake\n"
        "from mkconvlstm_cuda import experiments\n"
        "done = []\n"
        "told = experiments.run(fake(done), '.')\n"
        "pathlib.Path(os.environ['RANK']).write_text(repr((done, told is not None)))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    here = os.path.dirname(__file__)
    subprocess.run([*command, here], cwd=tmp_path, check=True, timeout=120, capture_output=True)
    parts = [eval((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert sorted(parts[0][0] + parts[1][0]) == sorted((v, s) for v in ("{3,5}", "3,5") for s in range(3))
    assert [told for _, told in parts] == [True, False]
    assert len(json.loads((tmp_path / "fake" / "results.json").read_text())["runs"]) == 6


def test_command_lists_names_and_refuses_others(tmp_path):
    assert run("--list").split() == list(experiments.EXPERIMENTS)
    assert "table3-parameters" in run("fig99", code=2)


def test_command_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.EXPERIMENTS, "fake", fake([], stop_at=2))
    assert "--resume" in run("fake", "--out", str(tmp_path), code=130)
    assert "--overwrite" in run("fake", "--out", str(tmp_path), code=2)
    assert "in place of --overwrite" in " ".join(run("fake", "--out", str(tmp_path), "--overwrite", code=130).split())
    monkeypatch.setitem(experiments.EXPERIMENTS, "fake", fake([]))
    run("fake", "--out", str(tmp_path), "--resume")


def test_command_takes_settings(tmp_path, monkeypatch):
    done = []
    monkeypatch.setitem(experiments.EXPERIMENTS, "fake", fake(done))
    run("fake", "--out", str(tmp_path), "--set", "seeds=[7]")
    assert done == [("{3,5}", 7), ("3,5", 7)]
    assert "no setting 'sneeds'" in run("fake", "--set", "sneeds=[7]", code=2)
    assert "is not JSON" in run("fake", "--set", "seeds=[7", code=2)


def test_command_writes_a_page_of_results_that_are_there(tmp_path, monkeypatch):
    folder = tmp_path / "found"
    (folder / "table3-parameters").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "there is no NAME/results.json" in " ".join(run("--page", ".", code=2).split())
    results = folder / "table3-parameters" / "results.json"
    for damaged in ("{", "{}", "[]", "3", '{"claims": [3]}'):
        results.write_text(damaged)
        assert "results.json is damaged" in " ".join(run("--page", ".", code=2).replace("│", "").split())
    assert not (tmp_path / "found.md").exists()
    results.unlink()
    run("table3-parameters", "--out", str(folder))
    assert f"wrote {tmp_path / 'found.md'}" in run("--page", ".")
    assert "](found/table3-parameters/parameters.png)" in (tmp_path / "found.md").read_text()


def test_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("mkconvlstm_cuda.experiments.runner.find_spec", lambda name: None)
    assert "mkconvlstm_cuda[experiments]" in run("table3-parameters", "--out", str(tmp_path / "new"), code=2)
    assert not (tmp_path / "new").exists()


def test_parameters_are_counted(tmp_path):
    output = run("table3-parameters", "--out", str(tmp_path))
    assert "input-to-hidden" in output
    told = json.loads((tmp_path / "table3-parameters" / "results.json").read_text())
    verdicts = [claim["verdict"] for claim in told["claims"]]
    assert verdicts == ["reproduced"] * 5 + ["not reproduced"] + ["reproduced"] * 2
    counted = {run["variant"]: run["input_weights"] for run in told["runs"]}
    assert counted["3x3"] == 512 * 9 * 4 * 256
    assert counted["{3,5} + 1x1"] == 512 * (9 + 25) * 4 * 128 + 4 * 256 * 256
    assert (tmp_path / "table3-parameters" / "parameters.png").stat().st_size > 5000
