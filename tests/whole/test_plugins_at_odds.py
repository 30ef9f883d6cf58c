"""Strangers' packages that are at odds with nnj or with one another, each really installed: what a
user then reads.
"""

from __future__ import annotations

import re

import pytest

import nnj
from tests.support.distributions import install

HEAD = "import nnj, torch\nfrom torch import nn\n"
LAYERS = "@nnj.hookimpl\ndef nnj_register_layers(register):\n    register(%s)\n"
PICKY = (
    HEAD
    + """
class Power(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k, self.weight = k, nn.Parameter(torch.randn(4))
    def forward(self, x):
        return self.weight * x ** self.k

def power(m, x, y):
    if m.k != 2:
        raise NotImplementedError(f"an exponent of {m.k} is not described")
    weight = nnj.ScaleShift((4,), x.shape[1:], x, m=lambda: x * x)
    return {"input": nnj.Diagonal(2 * m.weight.detach() * x), "weight": weight}

"""
    + LAYERS % "Power, power, uses='x'"
)
# distribution, version, what it asks for, {entry point: code}
STRANGERS = [
    ("nnj-left", "0.1", "nnj", {"nnj-left": HEAD + LAYERS % "nn.Bilinear, print"}),
    ("nnj-right", "0.2", "nnj", {"nnj-right": HEAD + LAYERS % "nn.Bilinear, print"}),
    ("nnj-broken", "0.3", "nnj", {"nnj-broken": "import squash"}),
    (
        "nnj-idle",
        "0.4",
        "nnj",
        {"nnj-idle": "def nnj_register_layers(register):\n    register(int, print)"},
    ),
    ("nnj-future", "3.0", "nnj>=2", {"nnj-future": HEAD + LAYERS % "nn.Bilinear, print"}),
    ("nnj-picky", "0.7", "nnj", {"nnj-picky": PICKY}),
    (
        "nnj-old",
        "0.5",
        "nnj",
        {
            "nnj-old-hook": HEAD + "@nnj.hookimpl\ndef nnj_register_metrics(register):\n    pass",
            "nnj-old-argument": HEAD
            + "@nnj.hookimpl\ndef nnj_register_layers(register, model):\n    pass",
            "nnj-old-name": "from nnj import Banded",
            "nnj-old-option": HEAD + LAYERS % "nn.Bilinear, print, batched=True",
            "nnj-old-rule": HEAD
            + """
class Old(nn.Module):
    def forward(self, x):
        return x.sin()

"""
            + LAYERS % "Old, lambda m, x, y: {'input': nnj.Banded(x.cos())}",
            "nnj-old-loss": HEAD
            + """
class OldLoss(nn.Module):
    def forward(self, y, target):
        return (y - target).square().sum()

@nnj.hookimpl
def nnj_register_losses(register):
    register(OldLoss, lambda m, scale, y, target: nnj.DiagonalHessian(2 * scale, diagonal=True))
""",
            "nnj-old-quantity": HEAD
            + """
class OldDiag(nnj.Quantity):
    def parameter(self, factor):
        return factor.square_sum()

@nnj.hookimpl
def nnj_register_quantities(register):
    register("old_diag", OldDiag)
    register("old_sum", lambda: sum)
""",
        },
    ),
]
ENTRIES = [entry for *_, entries in STRANGERS for entry in entries]
# no error before they are used
AT_WORK = ["nnj-idle", "nnj-picky", "nnj-old-rule", "nnj-old-loss", "nnj-old-quantity"]
BROKEN = [entry for entry in ENTRIES if entry not in AT_WORK and entry != "nnj-right"]
COLLECT = (
    HEAD
    + """
net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
x = torch.randn(4, 2).double()
with nnj.collect("ggn_diag"):
    loss_func = nnj.extend(nn.MSELoss(reduction="sum"))
    loss_func(nnj.extend(net)(x), torch.zeros(4, 2).double()).backward()
exact = 2 * net[1].weight.detach().square().sum(0)[:, None] * x.square().sum(0)
torch.testing.assert_close(net[0].weight.ggn_diag, exact)
print("exact")
"""
)


def module(entry: str) -> str:
    return entry.replace("-", "_")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(*args, disabled=[...])`: an interpreter that finds all strangers where pip has put
    them.
    """
    folder = tmp_path_factory.mktemp("strangers")
    for name, version, wants, entries in STRANGERS:
        source = folder / name
        source.mkdir()
        points = "\n".join(f'{entry} = "{module(entry)}"' for entry in entries)
        (source / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "{name}"\nversion = "{version}"\ndependencies = ["{wants}"]\n'
            f"[project.entry-points.nnj]\n{points}\n"
            f"[tool.setuptools]\npy-modules = {[module(entry) for entry in entries]}\n"
        )
        for entry, code in entries.items():
            (source / f"{module(entry)}.py").write_text(code)
    return install(folder / "target", *[folder / name for name, *_ in STRANGERS])


@pytest.fixture(scope="module")
def table(run):
    """What `python -m nnj` says if nothing is disabled."""
    return run("-m", "nnj")


HOOKSPECS = (
    "nnj.registry.hookspecs says what there is. Disable it with NNJ_DISABLED_PLUGINS=nnj-old-"
)
ERRORS = {
    "two claim one class": "torch.nn.Bilinear is claimed twice: by 'nnj-left' (nnj-left 0.1) and "
    "by 'nnj-right' (nnj-right 0.2). Disable one of them with "
    "NNJ_DISABLED_PLUGINS=nnj-left or NNJ_DISABLED_PLUGINS=nnj-right. A "
    "plugin that means to take over a class registers with replace=True",
    "broken at import": "plugin 'nnj-broken' (nnj_broken, from nnj-broken 0.3) cannot be imported: "
    "No module named 'squash'. Disable it with NNJ_DISABLED_PLUGINS=nnj-broken",
    "asks for another version": "plugin 'nnj-future' (nnj-future 3.0) was written for another "
    f"version: it asks for nnj>=2, and this is nnj {nnj.__version__}. "
    "Install a nnj-future that goes with it, or disable the plugin "
    "with NNJ_DISABLED_PLUGINS=nnj-future",
    "a hook that is gone": "plugin 'nnj-old-hook' (nnj-old 0.5) does not fit nnj "
    f"{nnj.__version__}: it implements nnj_register_metrics, which is no "
    f"hook of this version. {HOOKSPECS}hook",
    "a hook with other arguments": "plugin 'nnj-old-argument' (nnj-old 0.5) does not fit nnj "
    f"{nnj.__version__}: its nnj_register_layers takes (register, "
    "model), and this version gives (register). "
    f"{HOOKSPECS}argument",
    "an option that is gone": "plugin 'nnj-old-option' (nnj-old 0.5) registers the layer "
    f"torch.nn.Bilinear, but nnj {nnj.__version__} knows no option "
    "'batched' of register. Disable it with "
    "NNJ_DISABLED_PLUGINS=nnj-old-option",
}


@pytest.mark.parametrize("line", ERRORS.values(), ids=ERRORS)
def test_the_command_names_each_of_them(table, line):
    assert table.returncode == 1 and table.stdout == "" and "Traceback" not in table.stderr
    assert line in table.stderr.splitlines()


def test_a_name_that_is_gone(table):
    (line,) = [line for line in table.stderr.splitlines() if "nnj-old-name" in line]
    assert re.fullmatch(
        r"plugin 'nnj-old-name' \(nnj_old_name, from nnj-old 0\.5\) cannot be imported: cannot "
        r"import name "
        r"'Banded' from 'nnj' \(.*\)\. Disable it with NNJ_DISABLED_PLUGINS=nnj-old-name",
        line,
    )


def test_all_in_one_error(table):
    named = [
        line for line in table.stderr.splitlines() if line.startswith(("plugin ", "torch.nn."))
    ]
    assert len(named) == len(ERRORS) + 1


def test_a_collect_ends_in_the_same_words(run):
    done = run("-c", COLLECT)
    assert done.returncode == 1 and done.stdout == ""
    found = done.stderr.split("nnj.errors.PluginError: ")[-1].splitlines()
    assert set(ERRORS.values()) <= set(found)


def test_the_remedy_of_the_errors_helps(run):
    done = run("-c", COLLECT, disabled=BROKEN)
    assert done.stdout == "exact\n", done.stderr
    out = run("-m", "nnj", disabled=BROKEN)
    assert out.returncode == 0, out.stderr
    assert re.search(
        r"^torch\.nn\.Bilinear +print +nnj-right +nnj-right 0\.2$", out.stdout, re.MULTILINE
    )
    assert out.stdout.splitlines()[-1] == f"disabled: {', '.join(sorted(BROKEN))}"
    assert (
        "plugin 'nnj-idle' (nnj-idle 0.4) registers nothing: does it implement a hook of "
        "nnj.registry.hookspecs with @nnj.hookimpl? Disable it with "
        "NNJ_DISABLED_PLUGINS=nnj-idle" in out.stderr
    )


USE_OLD = (
    HEAD
    + """
from nnj_old_loss import OldLoss
from nnj_old_rule import Old

x, y = torch.randn(4, 2), torch.randn(4, 2)
for name, layer, loss in [("ggn_diag", Old(), nn.MSELoss()), ("ggn_diag", nn.ReLU(), OldLoss()),
                          ("old_diag", nn.ReLU(), nn.MSELoss()),
                          ("old_sum", nn.ReLU(), nn.MSELoss())]:
    model = nnj.extend(nn.Sequential(nn.Linear(2, 2), layer))
    try:
        with nnj.collect(name):
            nnj.extend(loss)(model(x), y).backward()
    except nnj.NNJError as error:
        print(type(error).__name__, error)
"""
)


def test_what_shows_only_at_work(run):
    done = run("-c", USE_OLD, disabled=[*BROKEN, "nnj-idle"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "PluginError plugin 'nnj-old-rule' (layer '1'): the rule failed with AttributeError: "
        "module 'nnj' has no attribute 'Banded'. It is of nnj-old 0.5, and "
        "NNJ_DISABLED_PLUGINS=nnj-old-rule disables it",
        "PluginError plugin 'nnj-old-loss' (loss 'OldLoss'): the rule failed with TypeError: "
        "DiagonalHessian.__init__() got an unexpected keyword argument 'diagonal'. It is of "
        "nnj-old 0.5, and NNJ_DISABLED_PLUGINS=nnj-old-loss disables it",
        "NNJError the quantity 'old_diag', of plugin 'nnj-old-quantity' (nnj-old 0.5), failed with "
        "TypeError: OldDiag.parameter() takes 2 positional arguments but 3 were given",
        "PluginError plugin 'nnj-old-quantity' (nnj-old 0.5) gives builtin_function_or_method for "
        "the quantity 'old_sum', expected a nnj.Quantity",
    ]


DECLINES = (
    HEAD
    + """
from nnj_picky import Power

def net():
    torch.manual_seed(0)
    layers = nn.Linear(2, 4), Power(2), nn.Linear(4, 4), Power(3), nn.Linear(4, 3)
    return nn.Sequential(*layers).double()

def asked():
    return net(), torch.randn(5, 2).double()

def single():
    return net().float()

if __name__ == "__main__":
    (model, x), y = asked(), torch.randint(3, (5,))
    params = {name: p.detach() for name, p in model.named_parameters()}
    j = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    p = model(x).detach().softmax(-1)
    h = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    model, loss_func = nnj.extend(model), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss_func(model(x), y).backward()
    for name, p in model.named_parameters():
        flat = j[name].reshape(5, 3, -1)
        expected = torch.einsum("noi,nop,npi->i", flat, h, flat)
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(p.ggn_diag.flatten(), expected, rtol=1e-9, atol=1e-12)
    print("exact")
"""
)


def test_a_rule_that_declines_one_configuration(run, tmp_path):
    """The numbers are exact without it, and the command says why it was not taken."""
    (tmp_path / "mine.py").write_text(DECLINES)
    others = [entry for entry in ENTRIES if entry != "nnj-picky"]
    done = run("mine.py", disabled=others, cwd=tmp_path)
    assert done.stdout == "exact\n", done.stderr
    for arguments in (["mine:asked"], ["mine:single", "--input", "5,2"]):
        found = run("-m", "nnj", *arguments, disabled=others, cwd=tmp_path).stdout
        assert re.search(r"^1 +Power +power +nnj-picky$", found, re.MULTILINE), found
        assert re.search(
            r"^3 +Power +autograd +declined: an exponent of 3 is not described$",
            found,
            re.MULTILINE,
        ), found
