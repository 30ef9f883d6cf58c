"""`python -m nnj MODEL`: what each module of a model gets, with and without a call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import nnj
from nnj import __main__ as command
from nnj.testing.describe import lines, load, text

ROOT = Path(__file__).resolve().parents[2]


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.w.softmax(0)


class Centred(Own):
    """No row is a function of its own input alone."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Loud(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shift(nn.Module):
    def forward(self, x):
        return x + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), nn.SiLU(inplace=True), Own(), Centred(), Loud(4, 4), Shift()
        )
        self.drop, self.flat = nn.Dropout(0.5), nn.Flatten(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(3, 3), dim=None)
        self.unused, self.more = nn.Linear(2, 2), nn.ModuleList([nn.BatchNorm1d(3)])
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        z = self.drop(self.body(x))[:, None]
        z = self.lstm(self.attention(z, z, z)[0])[0][:, 0]
        return self.flat(self.more[0](self.normed(z)))


def table(model, x=None):
    return {line.path: (line.rule, line.plugin, line.note) for line in lines(model, x)}


IF_ONE = "if it takes one tensor, gives one, and its weights are computed"


def test_without_a_call():
    found = table(Net())
    assert list(found) == [name for name, _ in Net().named_modules()]
    assert found[""] == ("autograd", "", "container")
    assert found["body.0"] == ("linear", "nnj-linear", "")
    assert found["body.1"] == ("from_y", "nnj-activation", "")
    assert found["body.3"] == ("fallback", "nnj-fallback", IF_ONE)
    assert found["body.5"] == (
        "autograd",
        "",
        "Loud has another forward than Linear; bare parameters: weight, bias",
    )
    assert found["body.6"] == ("autograd", "", "no plugin knows it")
    assert found["attention"] == (
        "autograd",
        "",
        "container; bare parameters: in_proj_weight, in_proj_bias",
    )
    assert found["attention.out_proj"] == ("linear", "nnj-linear", "")
    assert found["lstm"] == ("fallback", "nnj-fallback", IF_ONE)
    assert found["normed"][2].startswith("its parameters are computed by a parametrization")
    assert found["more"] == ("", "", "container")
    assert found["more.0"] == ("batch_norm", "nnj-norm", "")
    assert found["loss"] == ("loss", "", "")


def test_with_a_call():
    torch.manual_seed(0)
    model = Net()
    found = table(model, torch.randn(5, 4))
    assert found["body.0"] == ("linear", "nnj-linear", "")
    assert found["body.2"] == (
        "autograd",
        "",
        "declined: what its rule reads was written over in place",
    )
    assert found["body.3"] == ("fallback", "nnj-fallback", "")
    assert found["body.4"] == (
        "autograd",
        "",
        "declined: run on each sample alone it gives something else than on the batch",
    )
    assert found["drop"] == (
        "autograd",
        "",
        "declined: the mask of this call is known to autograd's node alone",
    )
    assert found["flat"] == (
        "autograd",
        "",
        "declined: a hook, or the shapes of its input and output, hide what its rows are",
    )
    assert found["attention"] == (
        "autograd",
        "",
        "container; bare parameters: in_proj_weight, in_proj_bias",
    )
    assert found["attention.out_proj"] == ("linear", "nnj-linear", "not called")
    assert found["lstm"] == ("autograd", "", "declined: it takes or gives several tensors")
    assert found["unused"] == ("linear", "nnj-linear", "not called")
    rule, plugin, note = found["more.0"]
    assert (rule, plugin) == ("refused", "nnj-norm")
    assert note.startswith(
        "refused: layer 'more.0': BatchNorm1d in training mode makes the samples"
    )


def test_the_model_is_left_as_it_was():
    model, x = Net().eval(), torch.randn(3, 4)
    before, y = {k: t.clone() for k, t in model.state_dict().items()}, model(x)
    lines(model, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert torch.equal(model(x), y) and all(p.grad is None for p in model.parameters())


def test_hooks_go_when_the_model_raises():
    model = Net()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        lines(model, torch.randn(3, 7))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_several_arguments_and_an_extended_model():
    model = nnj.extend(nn.Bilinear(2, 3, 4))
    assert (
        table(model, (torch.randn(5, 2), torch.randn(5, 3)))[""][2]
        == "declined: it takes or gives several tensors"
    )
    assert table(nnj.extend(nn.Sequential(nn.Linear(2, 2))), torch.randn(3, 2))["0"] == (
        "linear",
        "nnj-linear",
        "",
    )


def test_a_hook_of_another_and_a_frozen_layer():
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda m, x, y: 2 * y)
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), layer)
    found = table(model, torch.randn(3, 2))
    assert found["0"] == ("linear", "nnj-linear", "nothing to be differentiated")
    # what the hook makes of its output is another matter: autograd's
    assert found["1"] == ("linear", "nnj-linear", "")
    layer.register_forward_pre_hook(lambda m, x: (x[0].sin(),))
    assert table(nnj.extend(model), torch.randn(3, 2))["1"] == ("linear", "nnj-linear", "")
    # a hook before ours hides what forward gave
    layer.register_forward_hook(lambda m, x, y: 3 * y, prepend=True)
    before = list(layer._forward_hooks)
    assert table(model, torch.randn(3, 2))["1"][::2] == (
        "autograd",
        "declined: a hook, or the shapes of its input and output, hide what its rows are",
    )
    assert list(layer._forward_hooks) == before


def test_text():
    assert (
        text(lines(nn.Sequential(nn.Linear(2, 2), nn.Tanh())))
        == """\
module   class       rule      plugin          note
-------  ----------  --------  --------------  ---------
(model)  Sequential  autograd                  container
0        Linear      linear    nnj-linear
1        Tanh        from_y    nnj-activation"""
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "no_such_module:net",
            r"no_such_module:net is not there: No module named 'no_such_module'",
        ),
        (
            "torch.nn:NoSuch",
            "torch.nn:NoSuch is not there: module 'torch.nn' has no attribute 'NoSuch'",
        ),
        ("torch.nn", "MODEL is 'module:callable', not 'torch.nn'"),
        (
            "os:getcwd",
            "os:getcwd gives str, expected a torch.nn.Module, or a tuple of it and its input",
        ),
    ],
)
def test_what_is_no_model(spec, message, capsys):
    with pytest.raises(nnj.NNJError, match=message):
        load(spec)
    assert command.main([spec]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_load():
    model, x = load("torch.nn:Identity")
    assert isinstance(model, nn.Identity) and x is None


MODEL = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout())

def pair():
    return net(), torch.randn(2, 4)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.one(a) + b

def two():
    return Two(), (torch.randn(2, 4), torch.randn(2, 3))

made = net()
"""


@pytest.mark.parametrize(
    "arguments, mask, status",
    [
        (["mine:net"], "dropout   nnj-dropout", 0),
        (["mine:made"], "dropout   nnj-dropout", 0),
        (
            ["mine:net", "--input", "2,4"],
            "declined: the mask of this call is known to autograd's node alone",
            0,
        ),
        (["mine:pair"], "declined: the mask of this call is known to autograd's node alone", 0),
        (["mine:two"], "linear    nnj-linear", 0),
        (["mine:absent"], "mine:absent is not there", 1),
        (["mine:net", "--input", "some"], "argument --input: 'some' is no shape, such as 4,3", 2),
    ],
)
def test_the_command(arguments, mask, status, tmp_path):
    """The model is looked for in the directory where the command is run."""
    (tmp_path / "mine.py").write_text(MODEL)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "nnj", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert mask in (done.stdout if status == 0 else done.stderr)
    assert "Traceback" not in done.stderr
