"""A stranger's package teaches nnj a layer: examples/third_party, built, installed and used as pip
leaves it.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.support.distributions import ROOT, install
from tests.support.documents import fenced

USE = """
import nnj, nnj_siren, torch
from nnj_siren import layers

calls, rule = [], layers.sine
# The hook has not run yet: loading is lazy.
layers.sine = lambda m, x, y: calls.append(m) or rule(m, x, y)

torch.manual_seed(0)
x, y = torch.randn(6, 2, dtype=torch.float64), torch.randint(3, (6,))
first, last = torch.nn.Linear(2, 5), torch.nn.Linear(5, 3)
net = torch.nn.Sequential(first, nnj_siren.Sine(5, frequency=2.0), last).double()
model = nnj.extend(net)
loss_func = nnj.extend(torch.nn.CrossEntropyLoss())
with nnj.collect("ggn_diag", "ggn_block"):
    loss_func(model(x), y).backward()
assert model[1] in calls, "the rule has not run"

params = dict(model.named_parameters())
j = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
p = model(x).detach().softmax(-1)
h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
for name, param in params.items():
    flat = j[name].detach().reshape(6, 3, -1)
    ggn = torch.einsum("noi,nop,npj->ij", flat, h, flat)
    torch.testing.assert_close(param.ggn_diag.flatten(), ggn.diagonal(), rtol=1e-9, atol=1e-12)
    if name == "1.weight":
        torch.testing.assert_close(model[1].ggn_block, ggn, rtol=1e-9, atol=1e-12)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """`python(*args)`: what an interpreter prints that finds nnj as here, and the package where pip
    has put it.
    """
    folder = tmp_path_factory.mktemp("third_party")
    # pip leaves build folders in what it builds
    shutil.copytree(ROOT / "examples" / "third_party", folder / "source")
    start = install(folder / "target", folder / "source")

    def run(*args: str) -> str:
        done = start(*args)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_it_is_listed(python):
    lines = [line.split() for line in python("-m", "nnj").splitlines()]
    assert ["nnj_siren.layers.Sine", "sine", "nnj-siren", "nnj-siren", "0.1"] in lines
    assert [
        "nnj_siren.first.FirstSine",
        "first_sine",
        "nnj-siren-first",
        "nnj-siren",
        "0.1",
    ] in lines
    assert ["nnj_siren.losses.LogCosh", "log_cosh", "nnj-siren-losses", "nnj-siren", "0.1"] in lines
    assert ["fisher_diag", "FisherDiag", "nnj-siren-quantities", "nnj-siren", "0.1"] in lines


def test_its_own_tests_pass(python):
    tests = ROOT / "examples" / "third_party" / "tests"
    assert "6 passed" in python(
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tests),
        "-c",
        os.devnull,
        str(tests),
    )


def test_it_is_used_and_exact(python):
    python("-c", USE)


def test_its_guide_is_right(python):
    guide = (ROOT / "examples" / "third_party" / "README.md").read_text()
    (snippet,) = fenced(guide, "python")
    python("-c", snippet)
    (entry,) = fenced(guide, "toml")
    assert entry.strip() in (ROOT / "examples" / "third_party" / "pyproject.toml").read_text()
