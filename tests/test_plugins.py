"""Plugins: how they are found, what they may claim, and the error that each mistake gets. Distributions are fakes on sys.path."""
from __future__ import annotations

import ast
import configparser
import functools
import importlib
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nnj
from nnj import __main__ as command
from nnj import plugins
from nnj.plugins import DISABLED, PluginManager, Source
from nnj.rules import apply_rule, checked, find_rule
from nnj.testing import check_layer, layer_jacobians

ROOT = Path(__file__).resolve().parent.parent
CLAIM = """
import nnj, torch
def rule(m, x, y): return {{}}
@nnj.hookimpl
def nnj_register_layers(register):
    register({cls}, rule{more})
"""


class Fakes:
    """Distributions in a folder on sys.path: real metadata, real modules."""

    def __init__(self, path: Path):
        self.path, self.modules = path, []

    def install(self, name: str, code: str | None, *, version: str = "0.1", entries: dict[str, str] | None = None) -> None:
        """A distribution of one module (no module if `code` is None) and of one entry point of its own name."""
        module = name.replace("-", "_") + "_fake"
        if code is not None:
            (self.path / f"{module}.py").write_text(code)
            self.modules.append(module)
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{entry} = {value}" for entry, value in (entries or {name: module}).items()]
        (info / "entry_points.txt").write_text("\n".join(["[nnj]", *lines, ""]))

    def claim(self, name: str, cls: str = "torch.nn.Linear", more: str = "", **options) -> None:
        self.install(name, CLAIM.format(cls=cls, more=more), **options)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Only these distributions are found, not nnj's own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(DISABLED, raising=False)
    found = metadata.entry_points
    inside = lambda point: Path(point.dist.locate_file("")) == tmp_path
    monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [p for p in found(group=group) if inside(p)])
    importlib.invalidate_caches()
    fakes = Fakes(tmp_path)
    yield fakes
    for name in fakes.modules:
        sys.modules.pop(name, None)


def load() -> PluginManager:
    importlib.invalidate_caches()
    manager = PluginManager()
    manager.load()
    return manager


def refusal() -> str:
    with pytest.raises(nnj.PluginError) as caught:
        load()
    return str(caught.value)


# -- finding and loading ------------------------------------------------------------------------------------------------


def test_found_by_its_entry_point(fakes):
    fakes.claim("nnj-squash", version="0.3")
    entry = load().find("layer", nn.Linear)
    assert entry.source == Source("nnj-squash", "nnj-squash", "0.3")
    assert entry.rule is sys.modules["nnj_squash_fake"].rule


def test_nothing_is_loaded_before_the_first_use(fakes):
    fakes.claim("nnj-squash")
    manager = PluginManager()
    assert "nnj_squash_fake" not in sys.modules
    assert manager.find("layer", nn.Linear) is not None
    assert "nnj_squash_fake" in sys.modules


@pytest.mark.parametrize("statement", ["import nnj", "import nnj, nnj.testing, torch; torch.nn.Linear(2, 2)"])
def test_importing_nnj_imports_no_plugin(tmp_path, statement):
    fakes = Fakes(tmp_path)
    fakes.claim("nnj-squash")
    code = f"{statement}; import sys; print([m for m in sys.modules if m.startswith('nnj_')])"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip()) == (0, "[]"), out.stderr


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nnj").rglob("*.py")), ids=lambda path: path.stem)
def test_the_core_knows_no_plugin(path):
    assert "nnj_plugins" not in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "nnj_plugins").rglob("*.py")), ids=lambda path: path.stem)
def test_a_plugin_uses_public_names_only(path):
    mine = {name for name in imports(path) if name.split(".")[0] in ("nnj", "nnj_plugins")}
    assert mine <= {"nnj"}
    used = {node.attr for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnj"}
    assert used <= set(nnj.__all__)


def test_first_party_plugins_are_entry_points_that_agree():
    """Also without an installation: all that setup.cfg names can be imported, registers something, and no class twice."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = dict(line.split(" = ") for line in config["options.entry_points"]["nnj"].split("\n") if line)
    manager = PluginManager(load=False)
    for name, module in points.items():
        assert name.startswith("nnj-")
        manager.register(importlib.import_module(module), name)
    files = {f"nnj_plugins.{path.stem}" for path in (ROOT / "nnj_plugins").glob("*.py") if path.stem != "__init__"}
    assert files | {"nnj.quantities"} == set(points.values())


def test_a_manager_knows_nothing_of_another(fakes):
    first, second = PluginManager(load=False), nnj.PluginManager(load=False)
    first.register(Plugin(lambda register: register(nn.Linear, lambda m, x, y: {})))
    assert first.find("layer", nn.Linear) is not None
    assert second.find("layer", nn.Linear) is None


def test_a_manager_put_to_use():
    mine = PluginManager(load=False)
    former = plugins.use(mine)
    try:
        assert plugins.manager() is mine
        assert find_rule(nn.Linear(2, 2)) is None
    finally:
        assert plugins.use(former) is mine


def test_one_distribution_twice_on_the_path_is_one(fakes, tmp_path, monkeypatch):
    fakes.claim("nnj-squash")
    again = tmp_path / "again"
    again.mkdir()
    Fakes(again).claim("nnj-squash", version="0.2")
    monkeypatch.setattr(sys, "path", [*sys.path, str(again)])
    assert load().find("layer", nn.Linear).source.version == "0.1"


def test_loading_again_changes_nothing(fakes):
    fakes.claim("nnj-squash")
    manager = load()
    entry = manager.find("layer", nn.Linear)
    manager.load()
    assert manager.find("layer", nn.Linear) is entry


def test_what_was_registered_by_hand_meets_what_is_installed(fakes):
    fakes.claim("nnj-squash", "torch.nn.Linear")
    importlib.invalidate_caches()
    manager = PluginManager()
    manager.register(Plugin(lambda register: register(nn.ReLU, lambda m, x, y: {})), "mine")
    assert [entry.source.plugin for entry in manager.entries("layer")] == ["nnj-squash", "mine"]


# -- disabling ----------------------------------------------------------------------------------------------------------


def test_disabled_plugins_are_not_imported(fakes, monkeypatch):
    fakes.install("nnj-squash", "raise RuntimeError")
    fakes.claim("nnj-other", "torch.nn.ReLU")
    monkeypatch.setenv(DISABLED, " nnj-squash ,, ")
    manager = load()
    assert manager.disabled == ["nnj-squash"]
    assert [entry.source.plugin for entry in manager.entries("layer")] == ["nnj-other"]
    assert "nnj_squash_fake" not in sys.modules


def test_a_disabled_name_that_is_not_installed(fakes, monkeypatch):
    fakes.claim("nnj-other")
    monkeypatch.setenv(DISABLED, "nnj-sqash,nnj-other,nnj-aquash")
    with pytest.warns(UserWarning, match=f"^{DISABLED} names plugins that are not installed: nnj-aquash, nnj-sqash$"):
        manager = load()
    assert manager.disabled == ["nnj-other"]


# -- broken plugins -----------------------------------------------------------------------------------------------------


def test_a_plugin_whose_module_is_missing(fakes):
    fakes.install("nnj-squash", None, version="0.3", entries={"nnj-squash": "nnj_squash"})
    assert refusal() == ("plugin 'nnj-squash' (nnj_squash, from nnj-squash 0.3) cannot be imported: No module named "
                         "'nnj_squash'. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash")


def test_a_plugin_that_misses_a_package(fakes):
    fakes.install("nnj-squash", "import squash", version="0.3")
    assert refusal() == ("plugin 'nnj-squash' (nnj_squash_fake, from nnj-squash 0.3) cannot be imported: No module named "
                         "'squash'. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash")


@pytest.mark.parametrize("code, fact", [
    ("{}['key']", "KeyError: 'key'"),
    ("def f(:", "SyntaxError: invalid syntax"),
    ("import nnj; nnj.plugins.manager().find('layer', int)", "PluginError: nnj was asked for its tables while"),
])
def test_a_plugin_that_fails_while_it_is_imported(fakes, code, fact, monkeypatch):
    fakes.install("nnj-squash", code)
    importlib.invalidate_caches()
    manager = PluginManager()
    monkeypatch.setattr(plugins, "_manager", manager)
    with pytest.raises(nnj.PluginError, match=rf"from nnj-squash 0\.1\) cannot be imported: {re.escape(fact)}") as caught:
        manager.load()
    assert caught.value.__cause__ is not None


def test_an_entry_point_that_names_nothing(fakes):
    fakes.install("nnj-squash", "", entries={"nnj-squash": "nnj_squash_fake:plugin"})
    assert "(nnj_squash_fake:plugin, from nnj-squash 0.1) cannot be imported: AttributeError: " in refusal()


def test_all_broken_plugins_in_one_error_and_the_tables_stay_as_they_were(fakes, monkeypatch):
    fakes.install("nnj-a", "import squash")
    fakes.claim("nnj-b", "torch.nn.ReLU")
    fakes.install("nnj-c", "1 / 0")
    fakes.claim("nnj-d")
    fakes.claim("nnj-e")
    importlib.invalidate_caches()
    manager = PluginManager()
    for _ in range(2):  # and again at the next use, in the same words
        with pytest.raises(nnj.PluginError) as caught:
            manager.find("layer", nn.Linear)
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines] == [
            "plugin 'nnj-a' (nnj_a_fake, from nnj-a 0.1) cannot be imported",
            "plugin 'nnj-c' (nnj_c_fake, from nnj-c 0.1) cannot be imported",
            "torch.nn.Linear is claimed twice"]
        assert manager.disabled == []
    monkeypatch.setenv(DISABLED, "nnj-a,nnj-c,nnj-d")
    assert manager.find("layer", nn.Linear).source.plugin == "nnj-e"
    assert manager.find("layer", nn.ReLU).source.plugin == "nnj-b"


def test_two_entries_of_one_name(fakes):
    fakes.claim("nnj-a", "torch.nn.ReLU", entries={"nnj-squash": "nnj_a_fake"})
    fakes.claim("nnj-b", "torch.nn.Linear", entries={"nnj-squash": "nnj_b_fake"})
    names = re.escape("plugin 'nnj-squash' (nnj-x 0.1) has the same entry name as 'nnj-squash' (nnj-x 0.1). Entry names begin "
                      "with the name of the distribution; rename one of them").replace(r"nnj\-x", "nnj-[ab]")
    assert re.fullmatch(names, refusal())


def test_a_misspelt_hook(fakes):
    fakes.install("nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_layer(register): pass")
    assert re.fullmatch(r"plugin 'nnj-squash' \(nnj-squash 0\.1\) does not fit the hooks of nnj: unknown hook "
                        r"'nnj_register_layer' in plugin <module .*>\. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash",
                        refusal())


def test_a_hook_with_an_argument_that_nobody_gives(fakes):
    fakes.install("nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_layers(register, model): pass")
    assert "plugin 'nnj-squash' (nnj-squash 0.1) does not fit the hooks of nnj: " in refusal()


def test_a_hook_that_fails(fakes):
    fakes.install("nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_losses(register): 1 / 0")
    assert refusal() == ("plugin 'nnj-squash' (nnj-squash 0.1) failed in nnj_register_losses: ZeroDivisionError: division by "
                         "zero. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash")


@pytest.mark.parametrize("code", ["", "def nnj_register_layers(register): register(int, print)"], ids=["empty", "unmarked"])
def test_a_plugin_that_registers_nothing(fakes, code):
    fakes.install("nnj-squash", code)
    message = (r"^plugin 'nnj-squash' \(nnj-squash 0\.1\) registers nothing: does it implement a hook of nnj\.hookspecs with "
               r"@nnj\.hookimpl\?$")
    with pytest.warns(UserWarning, match=message):
        assert list(load().entries("layer")) == []


# -- claims -------------------------------------------------------------------------------------------------------------


class Plugin:
    """A plugin made by hand."""

    def __init__(self, layers=None, *, losses=None, quantities=None):
        self.hooks = [layers, losses, quantities]

    @nnj.hookimpl
    def nnj_register_layers(self, register):
        self.hooks[0] and self.hooks[0](register)

    @nnj.hookimpl
    def nnj_register_losses(self, register):
        self.hooks[1] and self.hooks[1](register)

    @nnj.hookimpl
    def nnj_register_quantities(self, register):
        self.hooks[2] and self.hooks[2](register)


def test_a_conflict(fakes):
    fakes.claim("nnj", version="1.0", entries={"nnj-linear": "nnj_fake"})
    fakes.claim("nnj-rival")
    assert refusal() == ("torch.nn.Linear is claimed twice: by 'nnj-linear' (nnj 1.0) and by 'nnj-rival' (nnj-rival 0.1). "
                         "Disable one of them with NNJ_DISABLED_PLUGINS=nnj-linear or NNJ_DISABLED_PLUGINS=nnj-rival. "
                         "A plugin that means to take over a class registers with replace=True")


@pytest.mark.parametrize("name", ["nnj-a", "nnj-z"], ids=["loaded first", "loaded last"])
def test_a_replacement_wins(fakes, name):
    fakes.claim("nnj-linear")
    fakes.claim(name, more=", replace=True")
    assert load().find("layer", nn.Linear).source.plugin == name


@pytest.mark.parametrize("name", ["nnj-a", "nnj-m", "nnj-z"])
def test_a_replacement_settles_the_conflict_of_two_others(fakes, name):
    fakes.claim("nnj-l")
    fakes.claim("nnj-n")
    fakes.claim(name, more=", replace=True")
    assert load().find("layer", nn.Linear).source.plugin == name


def test_two_replacements(fakes):
    for name in ("nnj-a", "nnj-b", "nnj-c"):
        fakes.claim(name, more=", replace=True" if name != "nnj-b" else "")
    assert refusal() == ("torch.nn.Linear is replaced twice: by 'nnj-a' (nnj-a 0.1) and by 'nnj-c' (nnj-c 0.1). Disable one of "
                         "them with NNJ_DISABLED_PLUGINS=nnj-a or NNJ_DISABLED_PLUGINS=nnj-c")


def test_nothing_is_kept_of_a_plugin_that_is_refused():
    manager = PluginManager(load=False)
    manager.register(Plugin(lambda register: register(nn.Linear, print)), "first")
    with pytest.raises(nnj.PluginError, match=r"^torch\.nn\.Linear is claimed twice: by 'first' and by 'second'\. A plugin"):
        manager.register(Plugin(lambda register: (register(nn.ReLU, print), register(nn.Linear, print))), "second")
    assert [entry.key for entry in manager.entries("layer")] == [nn.Linear]


def test_one_class_may_be_a_layer_and_a_loss():
    manager = PluginManager(load=False)
    manager.register(Plugin(lambda register: register(nn.MSELoss, print), losses=lambda register: register(nn.MSELoss, repr)))
    assert manager.find("layer", nn.MSELoss).rule is print
    assert manager.find("loss", nn.MSELoss).rule is repr


@pytest.mark.parametrize("plugin, message", [
    (Plugin(lambda register: register("relu", print)), "registers the layer relu, but it is not a class"),
    (Plugin(losses=lambda register: register(len, print)), "registers the loss <built-in function len>, but it is not a class"),
    (Plugin(quantities=lambda register: register("ggn diag", print)),
     "registers the quantity ggn diag, but its name is not an identifier"),
    (Plugin(quantities=lambda register: register(nn.ReLU, print)),
     "registers the quantity torch.nn.ReLU, but its name is not an identifier"),
    (Plugin(lambda register: register(nn.ReLU, 1)), "registers the layer torch.nn.ReLU, but its rule 1 cannot be called"),
    (Plugin(lambda register: register(nn.ReLU, print, uses="z")),
     "registers the layer torch.nn.ReLU, but uses='z', expected 'x', 'y', 'xy' or ''"),
], ids=["layer", "loss", "name", "quantity", "rule", "uses"])
def test_a_claim_that_makes_no_sense(plugin, message):
    with pytest.raises(nnj.PluginError) as caught:
        PluginManager(load=False).register(plugin, "mine")
    assert str(caught.value) == f"plugin 'mine' {message}."


def test_half_a_jacobian():
    for body in ({}, {"vjp": lambda self, u: u}, {"jvp": lambda self, v: v}):
        with pytest.raises(TypeError, match=r"^Half must define dense, or both jvp and vjp$"):
            type("Half", (nnj.Jacobian,), body)
    type("Whole", (nnj.Jacobian,), {"dense": lambda self: None})
    type("Both", (nnj.Jacobian,), {"jvp": lambda self, v: v, "vjp": lambda self, u: u})


# -- which rule describes a module --------------------------------------------------------------------------------------


def twice(m: nn.Linear, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """A right rule for nn.Linear without bias, on vectors."""
    eye = torch.eye(m.out_features, dtype=x.dtype)
    j = torch.einsum("op,ni->nopi", eye, x).flatten(2)
    return {"input": nnj.Dense(m.weight.detach().expand(len(x), -1, -1), x.shape[1:], y.shape[1:]),
            "weight": nnj.Dense(j, m.weight.shape, y.shape[1:])}


class Squash(nn.Module):
    """(N, 4) -> (N, 4), not symmetric."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * x[:, :1]


@pytest.fixture
def rules():
    """`rules(cls, rule)`: a manager in use that knows only this."""
    former = plugins.manager()

    def use(cls, rule, name="nnj-squash", **options) -> None:
        manager = PluginManager(load=False)
        manager.register(Plugin(lambda register: register(cls, rule, **options)), name)
        plugins.use(manager)

    yield use
    plugins.use(former)


class Renamed(nn.Linear):
    """Overrides nothing that matters."""

    def __init__(self, size: int):
        super().__init__(size, size, bias=False)

    def extra_repr(self) -> str:
        return "renamed"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grandchild(Doubled):
    """Inherits a forward that is not nn.Linear's."""


def test_a_rule_holds_for_its_class_and_harmless_subclasses(rules):
    rules(nn.Linear, twice)
    check_layer(nn.Linear(4, 3, bias=False), torch.randn(5, 4))
    check_layer(Renamed(4), torch.randn(5, 4))


def replaced() -> nn.Module:
    module = nn.Linear(4, 3, bias=False)
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)
    return module


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 3, bias=False), "weight", amount=0.5)


def old_weight_norm() -> nn.Module:
    module = nn.Linear(4, 3, bias=False)
    weight = module._parameters.pop("weight")  # as torch.nn.utils.weight_norm does
    module.register_parameter("weight_v", nn.Parameter(weight.detach()))
    module.weight = module.weight_v * 2
    return module


NOT_ITS_CLASS = {
    "a subclass overrides forward": lambda: Doubled(4, 3, bias=False),
    "a parent overrides forward": lambda: Grandchild(4, 3, bias=False),
    "an instance has another forward": replaced,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3, bias=False)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3, bias=False)),
}


@pytest.mark.parametrize("make", NOT_ITS_CLASS.values(), ids=NOT_ITS_CLASS)
def test_a_module_is_not_taken_for_its_class(rules, make):
    rules(nn.Linear, twice)
    module = make()
    assert find_rule(module) is None
    with pytest.raises(nnj.UnsupportedLayer, match=rf"^no plugin knows {type(module).__name__} "):
        check_layer(module, torch.randn(5, 4))


@pytest.mark.parametrize("make", [pruned, old_weight_norm])
def test_a_weight_that_is_no_parameter(rules, make):
    """What a rule says of `weight` is not taken where the parameter is another one: it is left to others, or refused."""
    rules(nn.Linear, twice)
    module, x = make(), torch.randn(5, 4)
    entry = find_rule(module)
    try:
        assert entry is None or apply_rule(entry, module, x, module(x).detach()) is None
    except nnj.PluginError as error:
        assert "the rule names 'weight', which is neither 'input' nor a parameter of the layer" in str(error)


def test_an_unknown_layer(fakes, monkeypatch):
    fakes.claim("nnj-linear")
    fakes.claim("nnj-fallback", "torch.nn.Module")
    monkeypatch.setenv(DISABLED, "nnj-fallback")
    manager = load()
    error = manager.unsupported(nn.GELU(), "encoder.3.act")
    assert str(error) == ("no plugin knows GELU ('encoder.3.act'). Installed: nnj-linear (disabled: nnj-fallback). Enable what "
                          "is disabled, or write a rule for it (see nnj.hookspecs)")
    error = manager.unsupported(nn.HuberLoss(), "HuberLoss", "loss")
    assert str(error).startswith("no plugin knows HuberLoss ('HuberLoss'). Installed: none (disabled: ")
    assert isinstance(error, nnj.UnsupportedLayer) and isinstance(error, NotImplementedError)


def test_the_nearest_class_has_the_rule(rules):
    rules(nn.Module, lambda m, x, y: {})
    assert plugins.manager().find("layer", nn.Linear).key is nn.Module
    plugins.manager().register(Plugin(lambda register: register(nn.Linear, twice)))
    assert plugins.manager().find("layer", nn.Linear).key is nn.Linear
    assert plugins.manager().find("layer", nn.ReLU).key is nn.Module
    assert plugins.manager().find("layer", int) is None


# -- what a rule answers ------------------------------------------------------------------------------------------------


class Short(nnj.Jacobian):
    """The vjp forgets the last entry."""

    def dense(self) -> Tensor:
        return layer_jacobians(Squash(), self.like)["input"]

    def vjp(self, u: Tensor) -> Tensor:
        return super().vjp(u)[..., :-1]


def eye(x: Tensor, outputs: int = 4) -> Tensor:
    return torch.eye(outputs, 4, dtype=x.dtype).expand(len(x), -1, -1)


@pytest.mark.parametrize("rule, message", [
    (lambda m, x, y: [], "the rule returned list, expected a dict of Jacobians"),
    (lambda m, x, y: {"inputs": nnj.Dense(eye(x), (4,), (4,))},
     "the rule names 'inputs', which is neither 'input' nor a parameter of the layer"),
    (lambda m, x, y: {"input": eye(x)}, "'input' is Tensor, expected a nnj.Jacobian"),
    (lambda m, x, y: {"input": nnj.Dense(eye(x, 3), (4,), (3,))},
     "'input' maps (4,) to (3,) for 5 rows, expected (4,) to (4,) for 5"),
    (lambda m, x, y: {"input": nnj.Dense(eye(x[:2]), (4,), (4,))},
     "'input' maps (4,) to (4,) for 2 rows, expected (4,) to (4,) for 5"),
    (lambda m, x, y: {"input": x.nothing}, "the rule failed with AttributeError: 'Tensor' object has no attribute 'nothing'"),
], ids=["list", "slot", "tensor", "outputs", "rows", "failure"])
def test_an_answer_that_is_none(rules, rule, message):
    rules(Squash, rule)
    module, x = Squash(), torch.randn(5, 4)
    with pytest.raises(nnj.PluginError) as caught:
        apply_rule(find_rule(module), module, x, module(x), "head")
    assert str(caught.value) == f"plugin 'nnj-squash' (layer 'head'): {message}"
    with pytest.raises(nnj.PluginError, match=re.escape(f"plugin 'nnj-squash' (layer 'Squash'): {message}")):
        check_layer(module, x)


def test_the_shape_of_a_product():
    who = "plugin 'nnj-squash' (layer 'head')"
    right = torch.zeros(5, 4)
    assert checked("vjp of 'input'", right, (5, 4), who) is right
    for wrong, found in ((torch.zeros(5, 3), r"\(5, 3\)"), (None, "NoneType")):
        with pytest.raises(nnj.PluginError, match=rf"^{re.escape(who)}: vjp of 'input' returned {found}, expected \(5, 4\)$"):
            checked("vjp of 'input'", wrong, (5, 4), who)


def test_products_of_another_shape(rules):
    rules(Squash, lambda m, x, y: {"input": Short((4,), (4,), x)})
    message = r"^plugin 'nnj-squash' \(layer 'Squash'\).*vjp.* returned \(3, 5, 3\), expected \(3, 5, 4\)$"
    with pytest.raises(nnj.PluginError, match=message):
        check_layer(Squash(), torch.randn(5, 4))


def test_a_rule_that_is_wrong(rules):
    rules(Squash, lambda m, x, y: {"input": nnj.Dense(eye(x), (4,), (4,))})
    with pytest.raises(AssertionError, match=r"plugin 'nnj-squash' .*'input': vjp is wrong"):
        check_layer(Squash(), torch.randn(5, 4))


def test_a_rule_that_declines(rules):
    def rule(m, x, y):
        raise NotImplementedError("odd option")

    rules(Squash, rule)
    module, x = Squash(), torch.randn(5, 4)
    assert apply_rule(find_rule(module), module, x, module(x)) is None
    with pytest.raises(AssertionError, match="its rule declines it"):
        check_layer(module, x)


def test_a_rule_that_leaves_out_a_parameter_is_not_taken(rules):
    rules(nn.Linear, twice)
    module, x = nn.Linear(4, 3), torch.randn(5, 4)
    assert apply_rule(find_rule(module), module, x, module(x)) is None
    module.bias.requires_grad_(False)
    assert apply_rule(find_rule(module), module, x, module(x)) is not None


def test_a_rule_sees_what_it_uses(rules):
    seen = []
    rules(Squash, lambda m, x, y: seen.append((x.device.type, y.device.type)) or {}, uses="y")
    module, x = Squash(), torch.randn(5, 4)
    apply_rule(find_rule(module), module, x, module(x))
    assert seen == [("meta", "cpu")]


# -- python -m nnj ------------------------------------------------------------------------------------------------------


def test_the_table():
    manager = PluginManager(load=False)
    made = lambda: (lambda m, x, y: {})
    layers = lambda register: (register(nn.ReLU, functools.partial(twice)), register(nn.Linear, made()))
    manager.register(Plugin(layers, losses=lambda register: register(nn.MSELoss, twice)), Source("nnj-a", "nnj", "1.0"))
    manager.register(Plugin(quantities=lambda register: register("ggn_diag", Squash)), "by hand")
    manager.disabled = ["nnj-b", "nnj-c"]
    assert command.table(manager) == """\
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


@pytest.fixture
def run(tmp_path):
    """`python -m nnj` on its own, beside the distributions of `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    start = lambda **options: subprocess.Popen([sys.executable, "-m", "nnj"], env=environment, stdout=subprocess.PIPE,
                                               stderr=subprocess.PIPE, text=True, **options)
    return Fakes(tmp_path), start


def test_the_command(run):
    fakes, start = run
    fakes.install("nnj-squash", CLAIM.format(cls="type('Squash', (torch.nn.Module,), {})", more=""), version="0.3")
    process = start()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(r"^nnj_squash_fake\.Squash +rule +nnj-squash +nnj-squash 0\.3$", out, re.MULTILINE)
    assert [line.split()[0] for line in out.splitlines() if line.endswith("distribution")] == ["layer", "loss", "quantity"]


def test_the_command_and_a_broken_plugin(run):
    fakes, start = run
    fakes.install("nnj-squash", "import squash")
    process = start()
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err.startswith("plugin 'nnj-squash' (nnj_squash_fake, from nnj-squash 0.1) cannot be imported: No module named")
    assert "Traceback" not in err


def test_the_command_and_a_reader_that_goes_away(run):
    fakes, start = run
    fakes.claim("nnj-squash", "type('Squash', (torch.nn.Module,), {})")
    process = start()
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
