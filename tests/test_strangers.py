"""What a user sees of plugins that clash or are broken: distributions that pip has installed, an interpreter of its own."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "{version}"
[project.entry-points.nnj]
{name} = "{module}"
[tool.setuptools]
py-modules = ["{module}"]
"""
LAYER = """
import nnj, torch

class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x

def twice(m, x, y):
    {body}

@nnj.hookimpl
def nnj_register_layers(register):
    register({cls}, twice, uses="x")
"""
RIGHT = 'return {"input": nnj.Diagonal(torch.full_like(x, 2.0))}'
MODEL = """
import torch
from {module} import Twice

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), Twice(), torch.nn.Linear(3, 3)).double()
"""
COLLECT = """
import nnj, torch
from user_model import model

net = nnj.extend(model())
x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
with nnj.collect("ggn_diag"):
    nnj.extend(torch.nn.CrossEntropyLoss())(net(x), y).backward()
p = net(x).detach().softmax(1)
h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
j = 2 * net[2].weight.detach()  # of the output in the first layer's
exact = torch.einsum("nij,ia,ja->na", h, j, j).mT @ x.square()
torch.testing.assert_close(net[0].weight.ggn_diag, exact)
print("exact")
"""


class Place:
    """A folder in which pip has installed some distributions, and a user's model."""

    def __init__(self, folder: Path):
        self.folder, self.target = folder, folder / "target"

    def install(self, **codes: str) -> None:
        """`module="code"`: each a distribution of one plugin, version 0.3."""
        sources = []
        for module, code in codes.items():
            source = self.folder / module
            source.mkdir(parents=True)
            (source / f"{module}.py").write_text(code)
            (source / "pyproject.toml").write_text(PROJECT.format(name=module.replace("_", "-"), version="0.3", module=module))
            sources.append(str(source))
        options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(self.target), *sources],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def python(self, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(self.target), str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run([sys.executable, *args], cwd=self.folder, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": path, **environment})


@pytest.fixture
def place(tmp_path):
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building a package without a network needs pip and setuptools (extra 'test')")
    return Place(tmp_path)


def test_two_plugins_that_claim_one_class(place):
    place.install(nnj_first=LAYER.format(cls="torch.nn.Upsample", body=RIGHT),
                  nnj_second=LAYER.format(cls="torch.nn.Upsample", body=RIGHT), nnj_third=LAYER.format(cls="Twice", body=RIGHT))
    (place.folder / "user_model.py").write_text(MODEL.format(module="nnj_third"))
    done = place.python("-c", COLLECT)
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("nnj.errors.PluginError: torch.nn.Upsample is claimed ")
    for name in ("'nnj-first'", "'nnj-second'", "NNJ_DISABLED_PLUGINS=nnj-first", "replace=True", "0.3"):
        assert name in said, said
    done = place.python("-m", "nnj")
    assert done.returncode == 1 and "torch.nn.Upsample is claimed" in done.stderr and "Traceback" not in done.stderr
    done = place.python("-c", COLLECT, NNJ_DISABLED_PLUGINS="nnj-first,nnj-second")
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr


def test_a_plugin_that_is_broken_at_import(place):
    place.install(nnj_broken="import a_package_that_is_not_there\n", nnj_whole=LAYER.format(cls="Twice", body=RIGHT))
    (place.folder / "user_model.py").write_text(MODEL.format(module="nnj_whole"))
    done = place.python("-c", COLLECT)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert "PluginError: plugin 'nnj-broken' (nnj_broken, from nnj-broken 0.3) cannot be imported: No module named" in said
    assert "Disable it with NNJ_DISABLED_PLUGINS=nnj-broken" in said
    done = place.python("-c", COLLECT, NNJ_DISABLED_PLUGINS="nnj-broken")
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr


def test_a_plugin_that_registers_nothing(place):
    place.install(nnj_empty="import nnj\n\ndef nnj_register_layers(register):  # without @nnj.hookimpl\n    pass\n",
                  nnj_whole=LAYER.format(cls="Twice", body=RIGHT))
    (place.folder / "user_model.py").write_text(MODEL.format(module="nnj_whole"))
    done = place.python("-c", COLLECT)
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr
    assert "UserWarning: plugin 'nnj-empty' (nnj-empty 0.3) registers nothing: does it implement a hook" in done.stderr


@pytest.mark.parametrize(("code", "fact"), [
    ("@nnj.hookimpl\ndef nnj_register_metrics(register):\n    pass\n", "nnj_register_metrics"),
    ("@nnj.hookimpl\ndef nnj_register_layers(register, device):\n    pass\n", "device"),
    ("@nnj.hookimpl\ndef nnj_register_layers(register):\n    register(torch.nn.Upsample, len, order=2)\n", "order"),
], ids=["a hook", "an argument of a hook", "an option of register"])
def test_a_plugin_that_was_written_for_another_version(place, code, fact):
    place.install(nnj_future=f"import nnj, torch\n\n{code}")
    done = place.python("-m", "nnj")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "plugin 'nnj-future' (nnj-future 0.3)" in done.stderr and fact in done.stderr, done.stderr
    assert "Disable it with NNJ_DISABLED_PLUGINS=nnj-future" in done.stderr


def test_a_rule_that_declines(place):
    place.install(nnj_picky=LAYER.format(cls="Twice", body='raise NotImplementedError("Twice on a Monday")'))
    (place.folder / "user_model.py").write_text(MODEL.format(module="nnj_picky"))
    done = place.python("-c", COLLECT)
    assert (done.returncode, done.stdout) == (0, "exact\n"), done.stderr
    (place.folder / "user_model.py").write_text(MODEL.format(module="nnj_picky").replace(".double()", ""))
    done = place.python("-m", "nnj", "user_model:model", "--input", "5,4")
    line = next(line.split(maxsplit=3) for line in done.stdout.splitlines() if " Twice " in line)
    assert line == ["1", "Twice", "autograd", "declined: Twice on a Monday"], done.stdout + done.stderr
