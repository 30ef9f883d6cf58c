"""A stranger's package, the template of examples/third_party: built, installed and used as pip leaves it."""
from __future__ import annotations

import re
import shutil

import pytest

from tests.fakes import ROOT
from tests.installing import install

SOURCE = ROOT / "examples" / "third_party"
PLUGINS = ["nnj-siren", "nnj-siren-fast", "nnj-siren-loss", "nnj-siren-trace"]
USE = """
import os, sys
import nnj, nnj_siren, torch
from nnj_siren import fast, sine

calls = []
def noted(module):  # the hooks have not run yet: loading is lazy
    rule = module.sine
    module.sine = lambda m, x, y: calls.append(module) or rule(m, x, y)
noted(sine), noted(fast)

torch.manual_seed(0)
x, y = torch.randn(6, 2, dtype=torch.float64), torch.randint(3, (6,))
net = torch.nn.Sequential(torch.nn.Linear(2, 5), nnj_siren.Sine(5, frequency=2.0), torch.nn.Linear(5, 3)).double()
model = nnj.extend(net)
loss_func = nnj.extend(torch.nn.CrossEntropyLoss())
with nnj.collect("ggn_diag", "ggn_block"):
    loss_func(model(x), y).backward()
assert set(calls) == {sine if os.environ["NNJ_DISABLED_PLUGINS"] else fast}, calls

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
def run(tmp_path_factory):
    """`run(*args)`: what an interpreter prints that finds the package where pip has put it."""
    folder = tmp_path_factory.mktemp("third_party")
    source = folder / "source"
    shutil.copytree(SOURCE, source)  # pip leaves build folders in what it builds
    start = install(folder / "target", source)

    def run(*args, **options) -> str:
        done = start(*args, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_it_is_listed(run):
    lines = [line.split() for line in run("-m", "nnj").splitlines()]
    assert [line for line in lines if line[-2:] == ["nnj-siren", "0.2"]] == [
        ["nnj_siren.sine.Sine", "sine", "nnj-siren-fast", "nnj-siren", "0.2"],
        ["nnj_siren.charbonnier.Charbonnier", "charbonnier", "nnj-siren-loss", "nnj-siren", "0.2"],
        ["ggn_trace", "GGNTrace", "nnj-siren-trace", "nnj-siren", "0.2"]]


def test_its_own_tests_pass(run):
    tests = str(SOURCE / "tests")
    out = run("-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    found = re.search(r"^(\d+) passed(?!.*(failed|error|skipped))", out.splitlines()[-1])
    assert found and int(found[1]) >= 14, out


@pytest.mark.parametrize("disabled", [[], ["nnj-siren-fast"]], ids=["fast", "only its Jacobian"])
def test_it_is_used_and_exact(run, disabled):
    run("-c", USE, disabled=disabled)


def test_its_readme_says_what_is_there():
    readme, project = (SOURCE / "README.md").read_text(), (SOURCE / "pyproject.toml").read_text()
    told = dict(re.findall(r"^\| `nnj_siren/(\w+)\.py` \| `([\w-]+)` \|", readme, re.MULTILINE))
    points = {module: name for name, module in re.findall(r'^(nnj-[\w-]+) = "nnj_siren\.(\w+)"$', project, re.MULTILINE)}
    assert told == points and sorted(points.values()) == PLUGINS
