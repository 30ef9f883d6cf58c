"""Examples run as a user runs them, and what they print is what they promise."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.documents import ROOT, fenced

ROW = re.compile(r"^([\w ]+?)" + r"\s+(\d+\.\d+) \(\d+\.\d+\)" * 4 + "$", re.MULTILINE)
READY = find_spec("sklearn") is not None and find_spec("matplotlib") is not None


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script of the examples in an empty folder, and gives what it prints. In this process:
    what it imports takes longer than what it does.
    """

    def run(script: str, *args: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *args])
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        finally:
            torch.set_rng_state(state)
            torch.set_num_threads(threads)
        return str(capsys.readouterr().out)

    return run


@pytest.mark.skipif(not READY, reason="needs scikit-learn and matplotlib (extra 'examples')")
def test_digits(tmp_path, run):
    out = run("digits.py", "--quick", "--evidence", "--out", "picture.png")
    rows = {name: [float(v) for v in values] for name, *values in ROW.findall(out)}
    laplace = ["diagonal Laplace", "Kronecker Laplace", "last layer"]
    assert list(rows) == ["plain", "tempered", *laplace, "evidence"], out
    for name, (accuracy, nll, ece, rotated) in rows.items():
        assert 0.75 < accuracy <= 1 and 0 < nll < 2.31, name
        assert 0 <= ece <= 1 and 0 <= rotated <= 1, name
    for name in laplace:  # better calibrated, at the same accuracy
        assert rows[name][1] < rows["plain"][1] and rows[name][0] > rows["plain"][0] - 0.02, out
    for name in laplace[:2]:  # and it notices more
        assert rows[name][3] > rows["plain"][3], out
    assert rows["evidence"][1] > rows["plain"][1], out
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000
    assert os.listdir(tmp_path) == ["picture.png"]


@pytest.mark.skipif(not READY, reason="needs scikit-learn and matplotlib (extra 'examples')")
def test_distributed(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--local-addr",
        "127.0.0.1",
    ]
    script = [str(ROOT / "examples" / "distributed.py"), "--epochs", "2"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    done = subprocess.run(
        [*launch, *script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    off = [
        float(v)
        for v in re.findall(r"(?:one process|the posterior) to ([\d.e-]+)", done.stdout, re.M)
    ]
    sent = [int(v) for v in re.findall(r"(\d+) bytes sent", done.stdout)]
    assert len(off) == 4 and max(off) < 1e-10, done.stdout
    assert len(sent) == 2 and sent[0] == sent[1] > 0, done.stdout


# by example: what its output must have in each line, and what must hold of the numbers
GALLERY = {
    "influence": (r"finds (\d\.\d+) of \d+", lambda ours, loss: ours > loss),
    "ewc": (r"trace +(\S+), best", lambda ggn, fisher, squared: min(ggn, fisher) > 10 * squared),
    "kernel": (r"accuracy (\d\.\d+)", lambda net, start, end: min(net, start, end) > 0.85),
    "spectrum": (r"largest +(\S+),", lambda first, last: 0 < first < last),
    "pruning": (
        r"(\d\.\d+) without 80%",
        lambda size, curvature, steps, solved: solved > max(size, curvature, steps),
    ),
    "lora": (r"NLL (\d\.\d+)", lambda plain, posterior: posterior < plain),
}
NEEDS = {"spectrum": ["scipy"], "lora": ["transformers", "peft"]}


@pytest.mark.skipif(not READY, reason="needs scikit-learn and matplotlib (extra 'examples')")
@pytest.mark.parametrize("name", GALLERY)
def test_gallery(name, tmp_path, run):
    missing = [package for package in NEEDS.get(name, []) if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    out = run(f"{name}.py", "--quick", "--out", "picture.png")
    pattern, holds = GALLERY[name]
    numbers = [float(found) for found in re.findall(pattern, out)]
    assert holds(*numbers), out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["picture.png"]


def test_every_example_is_on_its_page():
    page = (ROOT / "examples" / "README.md").read_text()
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {*GALLERY, "digits", "distributed", "jacobians"}
    for name in scripts:
        assert f"]({name}.py)" in page and f"## {name}.py" in page
        assert name in ("distributed", "jacobians") or f"]({name}.png)" in page


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return fenced((ROOT / "README.md").read_text(), language)


def table_of(text: str) -> list[list[str]]:
    """The lines of nnj's own plugins: others may be installed beside it."""
    return [line.split() for line in text.splitlines() if re.search(r" nnj \d", line)]


def test_the_table_of_the_plugins_is_what_the_command_prints(tmp_path):
    """If this fails: run the command that is given in nnj_plugins/README.md, which is run here on a
    copy.
    """
    page = (ROOT / "nnj_plugins" / "README.md").read_text()
    (shown,) = fenced(page, "text")
    assert "torch.nn.Linear" in shown
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment = {**os.environ, "PYTHONPATH": path, "PATH": os.pathsep.join(folders)}
    (tmp_path / "nnj_plugins").mkdir()
    (tmp_path / "nnj_plugins" / "README.md").write_text(page)
    (command,) = fenced(page, "sh")
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "nnj_plugins" / "README.md").read_text()
    (printed,) = fenced(made, "text")
    assert table_of(shown) == table_of(printed)
    assert made[: made.index(printed)] == page[: page.index(shown)]


def test_the_readme_shows_what_is_there():
    """If this fails: paste the file into the README."""
    assert (ROOT / "examples" / "third_party" / "nnj_siren" / "layers.py").read_text() in blocks(
        "python"
    )


def test_the_snippet_of_the_readme():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    names = {"model": model, "loader": [(torch.randn(8, 4), torch.randint(3, (8,)))] * 2}
    exec(blocks("python")[0], names)
    assert all(p.ggn_diag.shape == p.shape and p.ggn_diag.any() for p in model.parameters())
    assert model[0].ggn_block.shape == (25, 25)
