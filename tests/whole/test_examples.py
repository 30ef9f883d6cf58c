"""Examples run as a user runs them, and what they print is what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(
    r"^(plain network|(?:tempered|Laplace), [a-z -]+?)" + r"\s+(\d+\.\d+)" * 5 + "$", re.MULTILINE
)
READY = find_spec("sklearn") is not None and find_spec("matplotlib") is not None


def run(script: str, folder: Path, *args: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not READY, reason="needs scikit-learn and matplotlib (extra 'examples')")
def test_digits(tmp_path):
    out = run("digits.py", tmp_path, "--quick", "--out", "picture.png")
    rows = {name: [float(v) for v in values] for name, *values in ROW.findall(out)}
    assert list(rows) == [
        "plain network",
        "tempered, held-out digits",
        "Laplace, marginal likelihood",
        "Laplace, held-out digits",
    ], out
    for name, (accuracy, nll, ece, rotated, noisy) in rows.items():
        assert (
            0.75 < accuracy <= 1
            and 0 < nll < 2.31
            and 0 <= ece <= 1
            and 0 <= rotated <= 1
            and 0.5 < noisy <= 1
        ), name
    plain, laplace = rows["plain network"], rows["Laplace, held-out digits"]
    assert laplace[1] < plain[1] and laplace[0] > plain[0] - 0.02, out
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000
    assert os.listdir(tmp_path) == ["picture.png"]


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )


def test_the_readme_shows_what_is_there():
    """If this fails: paste the output of `python -m nnj`, or the file, into the README."""
    done = subprocess.run(
        [sys.executable, "-m", "nnj"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = re.compile(r" nnj \d")
    shown = next(block for block in blocks("text") if "torch.nn.Linear" in block)
    assert [line.split() for line in shown.splitlines() if ours.search(line)] == [
        line.split() for line in done.stdout.splitlines() if ours.search(line)
    ]
    assert (ROOT / "examples" / "third_party" / "nnj_siren" / "layers.py").read_text() in blocks(
        "python"
    )


def test_the_snippet_of_the_readme():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    names = {"model": model, "loader": [(torch.randn(8, 4), torch.randint(3, (8,)))] * 2}
    exec(blocks("python")[0], names)
    assert all(p.ggn_diag.shape == p.shape and p.ggn_diag.any() for p in model.parameters())
    assert model[0].ggn_block.shape == (25, 25)
