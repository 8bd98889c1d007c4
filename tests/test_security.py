"""Nothing is fetched, no pickle is trusted, and no data file is."""

import ast
import gzip
import random
import re
import socket
import struct
import zlib
from pathlib import Path

import pytest
import torch
from test_cli import run, wide  # noqa: F401  wide: a fixture

import mkconvlstm_cuda
from mkconvlstm_cuda import convert, data, forecast
from mkconvlstm_cuda.encoders import read_weights

PACKAGE = Path(mkconvlstm_cuda.__file__).parent
SOURCES = sorted(
    p for folder in (PACKAGE, PACKAGE.parent / "bench", PACKAGE.parent / "triton_kernels") for p in folder.rglob("*.py")
)
# What reaches the network, or runs what a file says.
HARMLESS = {"pickle.UnpicklingError", "urllib.parse.quote"}
REFUSED = {"pickle", "marshal", "shelve", "dill", "joblib", "urllib", "http", "requests", "ftplib", "socket"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_source_fetches_or_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & REFUSED
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{name.name}" for name in node.names} - HARMLESS
            assert not {name.split(".")[0] for name in names} & REFUSED
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "torch.hub.load",
            "np.load",
            "numpy.load",
        ):
            assert ast.unparse(node.func) == "torch.load"
            (option,) = [k.value for k in node.keywords if k.arg == "weights_only"]
            assert ast.unparse(option) == "True"


class Touch:
    """What a pickle can do to who loads it: here it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("damage", ["runs code", "cut off", "random bytes", "empty", "text", "another's"])
def test_a_checkpoint_runs_nothing(damage, tmp_path):
    checkpoint = tmp_path / forecast.CHECKPOINT
    torch.save({"settings": "{}", "model": Touch(tmp_path / "touched")}, checkpoint)
    if damage == "another's":
        torch.save({"epoch": 3}, checkpoint)
    elif damage == "text":
        checkpoint.write_text("hello\n")
    elif damage != "runs code":
        size = {"cut off": 100, "random bytes": 0, "empty": 0}[damage]
        noise = random.Random(0).randbytes(500) if damage == "random bytes" else b""
        checkpoint.write_bytes(checkpoint.read_bytes()[:size] + noise)
    arguments = ("forecast", "--output", str(tmp_path), "--channels", "2", "--device", "cpu")
    output = run(*arguments, "--steps", "1", "--resume", code=2)
    why = "no checkpoint .*: it holds no settings" if damage == "another's" else "damaged, or holds more than tensors"
    assert re.search(rf"resume: \S*{checkpoint.name} is {why}", " ".join(output.split()))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("damage", ["runs code", "text", "one byte", "empty"])
def test_a_file_of_weights_runs_nothing(damage, tmp_path):
    weights = tmp_path / "weights.pt"
    if damage == "runs code":
        torch.save({"weight": Touch(tmp_path / "touched")}, weights)
    else:
        weights.write_text({"text": "hello\n", "one byte": "b", "empty": ""}[damage])
    with pytest.raises(ValueError, match=r"state_dict: \S*weights\.pt is damaged, or holds more than tensors"):
        convert.from_ndrplz(weights)
    with pytest.raises(ValueError, match=r"encoder weights: \S*weights\.pt is damaged, or holds more than tensors"):
        read_weights(weights)
    assert not (tmp_path / "touched").exists()


def test_the_demo_opens_no_connection(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    run("forecast", "--output", str(tmp_path), "--channels", "2", "--device", "cpu", "--steps", "1")
    run("check", "--device", "cpu", "--dtype", "float32")


def test_idx_files_of_random_bytes_are_images_or_a_value_error(tmp_path):
    rng = random.Random(0)
    images, labels = (struct.pack(f">{n}I", 0x0800 + n - 1, 2, *size) for n, size in ((4, (3, 3)), (2, ())))
    images, labels = images + bytes(18), labels + bytes(2)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    refused = 0
    for n in range(2000):
        packed = gzip.compress(images) if n % 2 else images
        broken = bytearray(packed)
        for _ in range(rng.randint(0, 3)):
            broken[rng.randrange(len(broken))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        broken = broken[: rng.choice((len(broken), rng.randrange(len(broken) + 1)))]
        for name in ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / f"train-images-idx3-ubyte{'.gz' if n % 2 else ''}").write_bytes(broken)
        try:
            assert len(data.load_mnist(tmp_path)[0]) == 2
        except ValueError:
            refused += 1
    assert 200 < refused < 2000


def test_a_damaged_gzip_file_is_a_value_error(tmp_path):
    packed = bytearray(gzip.compress(bytes(range(256)) * 4))
    packed[10] = 0xFF
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(packed))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="not a complete gzip file"):
        data.load_mnist(tmp_path)
