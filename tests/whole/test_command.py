"""`python -m nnj`."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import pytest
from torch import nn

from nnj import __main__ as command
from nnj.registry.claim import Source
from nnj.registry.manager import PluginManager
from tests.support.distributions import CLAIM, ROOT, Fakes, Plugin, Squash, twice


def test_the_table():
    manager = PluginManager(load=False)
    made = lambda: lambda m, x, y: {}
    layers = lambda register: (
        register(nn.ReLU, functools.partial(twice)),
        register(nn.Linear, made()),
    )
    manager.register(
        Plugin(layers, losses=lambda register: register(nn.MSELoss, twice)),
        Source("nnj-a", "nnj", "1.0"),
    )
    manager.register(Plugin(quantities=lambda register: register("ggn_diag", Squash)), "by hand")
    manager.disabled = ["nnj-b", "nnj-c"]
    assert (
        command.table(manager)
        == """\
layer             rule            plugin   distribution
----------------  --------------  -------  ------------
torch.nn.Linear   test_the_table  nnj-a    nnj 1.0
torch.nn.ReLU     twice           nnj-a    nnj 1.0

loss              rule            plugin   distribution
----------------  --------------  -------  ------------
torch.nn.MSELoss  twice           nnj-a    nnj 1.0

quantity          rule            plugin   distribution
----------------  --------------  -------  ------------
ggn_diag          Squash          by hand

disabled: nnj-b, nnj-c"""
    )


@pytest.fixture
def run(tmp_path):
    """`python -m nnj` on its own, beside the distributions of `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    start = lambda **options: subprocess.Popen(
        [sys.executable, "-m", "nnj"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    return Fakes(tmp_path), start


def test_the_command(run):
    fakes, start = run
    fakes.install(
        "nnj-squash",
        CLAIM.format(cls="type('Squash', (torch.nn.Module,), {})", more=""),
        version="0.3",
    )
    process = start()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(
        r"^nnj_squash_fake\.Squash +rule +nnj-squash +nnj-squash 0\.3$", out, re.MULTILINE
    )
    assert [line.split()[0] for line in out.splitlines() if line.endswith("distribution")] == [
        "layer",
        "loss",
        "quantity",
    ]


def test_the_command_and_a_broken_plugin(run):
    fakes, start = run
    fakes.install("nnj-squash", "import squash")
    process = start()
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith(
        "plugin 'nnj-squash' (nnj_squash_fake, from nnj-squash 0.1) cannot be imported: No module "
        "named"
    )
    assert "Traceback" not in err


def test_the_command_and_a_reader_that_goes_away(run):
    fakes, start = run
    fakes.claim("nnj-squash", "type('Squash', (torch.nn.Module,), {})")
    process = start()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
