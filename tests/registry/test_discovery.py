"""How plugins are found, loaded and disabled, and the error that each broken one gets."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys

import pytest
from torch import nn

import nnj
from nnj.registry.claim import DISABLED, Source
from nnj.registry.layer_rules import find_rule
from nnj.registry.manager import PluginManager, manager, use
from tests.support.distributions import ROOT, Fakes, Plugin, load, refusal

# -- finding and loading ---------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "statement", ["import nnj", "import nnj, nnj.testing, torch; torch.nn.Linear(2, 2)"]
)
def test_importing_nnj_imports_no_plugin(tmp_path, statement):
    fakes = Fakes(tmp_path)
    fakes.claim("nnj-squash")
    code = f"{statement}; import sys; print([m for m in sys.modules if m.startswith('nnj_')])"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (out.returncode, out.stdout.strip()) == (0, "[]"), out.stderr


def test_first_party_plugins_are_entry_points_that_agree():
    """Also without an installation: all that setup.cfg names can be imported, registers something,
    and no class twice.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = dict(
        line.split(" = ") for line in config["options.entry_points"]["nnj"].split("\n") if line
    )
    manager = PluginManager(load=False)
    for name, module in points.items():
        assert name.startswith("nnj-")
        manager.register(importlib.import_module(module), name)
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "nnj_plugins").rglob("*.py")
        if path.stem != "__init__"
    }
    assert files == set(points.values())


def test_a_manager_knows_nothing_of_another(fakes):
    first, second = PluginManager(load=False), nnj.PluginManager(load=False)
    first.register(Plugin(lambda register: register(nn.Linear, lambda m, x, y: {})))
    assert first.find("layer", nn.Linear) is not None
    assert second.find("layer", nn.Linear) is None


def test_a_manager_put_to_use():
    mine = PluginManager(load=False)
    former = use(mine)
    try:
        assert manager() is mine
        assert find_rule(nn.Linear(2, 2)) is None
    finally:
        assert use(former) is mine


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


# -- disabling -------------------------------------------------------------------------------------


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
    with pytest.warns(
        UserWarning,
        match=f"^{DISABLED} names plugins that are not installed: nnj-aquash, nnj-sqash$",
    ):
        manager = load()
    assert manager.disabled == ["nnj-other"]


# -- broken plugins --------------------------------------------------------------------------------


def test_a_plugin_whose_module_is_missing(fakes):
    fakes.install("nnj-squash", None, version="0.3", entries={"nnj-squash": "nnj_squash"})
    assert refusal() == (
        "plugin 'nnj-squash' (nnj_squash, from nnj-squash 0.3) cannot be imported: No module named "
        "'nnj_squash'. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash"
    )


def test_a_plugin_that_misses_a_package(fakes):
    fakes.install("nnj-squash", "import squash", version="0.3")
    assert refusal() == (
        "plugin 'nnj-squash' (nnj_squash_fake, from nnj-squash 0.3) cannot be imported: No module "
        "named 'squash'. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash"
    )


@pytest.mark.parametrize(
    "code, fact",
    [
        ("{}['key']", "KeyError: 'key'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        (
            "import nnj; nnj.registry.manager.manager().find('layer', int)",
            "PluginError: nnj was asked for its tables while",
        ),
    ],
)
def test_a_plugin_that_fails_while_it_is_imported(fakes, code, fact, monkeypatch):
    fakes.install("nnj-squash", code)
    importlib.invalidate_caches()
    manager = PluginManager()
    monkeypatch.setattr("nnj.registry.manager.in_use", manager)
    with pytest.raises(
        nnj.PluginError, match=rf"from nnj-squash 0\.1\) cannot be imported: {re.escape(fact)}"
    ) as caught:
        manager.load()
    assert caught.value.__cause__ is not None


def test_an_entry_point_that_names_nothing(fakes):
    fakes.install("nnj-squash", "", entries={"nnj-squash": "nnj_squash_fake:plugin"})
    assert (
        "(nnj_squash_fake:plugin, from nnj-squash 0.1) cannot be imported: AttributeError: "
        in refusal()
    )


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
            "torch.nn.Linear is claimed twice",
        ]
        assert manager.disabled == []
    monkeypatch.setenv(DISABLED, "nnj-a,nnj-c,nnj-d")
    assert manager.find("layer", nn.Linear).source.plugin == "nnj-e"
    assert manager.find("layer", nn.ReLU).source.plugin == "nnj-b"


def test_two_entries_of_one_name(fakes):
    fakes.claim("nnj-a", "torch.nn.ReLU", entries={"nnj-squash": "nnj_a_fake"})
    fakes.claim("nnj-b", "torch.nn.Linear", entries={"nnj-squash": "nnj_b_fake"})
    names = re.escape(
        "plugin 'nnj-squash' (nnj-x 0.1) has the same entry name as 'nnj-squash' (nnj-x 0.1). "
        "Entry names begin with the name of the distribution; rename one of them"
    ).replace(r"nnj\-x", "nnj-[ab]")
    assert re.fullmatch(names, refusal())


def test_a_misspelt_hook(fakes):
    fakes.install("nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_layer(register): pass")
    assert refusal() == (
        f"plugin 'nnj-squash' (nnj-squash 0.1) does not fit nnj {nnj.__version__}: it implements "
        "nnj_register_layer, which is no hook of this version. nnj.registry.hookspecs says what "
        "there is. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash"
    )


def test_a_hook_with_an_argument_that_nobody_gives(fakes):
    fakes.install(
        "nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_layers(register, model): pass"
    )
    assert refusal() == (
        f"plugin 'nnj-squash' (nnj-squash 0.1) does not fit nnj {nnj.__version__}: its "
        "nnj_register_layers takes (register, model), and this version gives (register). "
        "nnj.registry.hookspecs says what there is. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash"
    )


def test_a_hook_that_does_not_fit_otherwise(fakes):
    """What we have no words for is said in pluggy's."""
    fakes.install(
        "nnj-squash",
        "import nnj\n@nnj.hookimpl(wrapper=True)\ndef nnj_register_layers(register): pass",
    )
    assert "plugin 'nnj-squash' (nnj-squash 0.1) does not fit nnj " in refusal()
    assert "wrapper=True" in refusal()


def test_a_plugin_that_exits_while_it_is_imported(fakes):
    fakes.install("nnj-squash", "raise SystemExit(3)")
    assert (
        "(nnj_squash_fake, from nnj-squash 0.1) cannot be imported: SystemExit: 3. Disable it with "
        in refusal()
    )


def test_a_hook_that_fails(fakes):
    fakes.install(
        "nnj-squash", "import nnj\n@nnj.hookimpl\ndef nnj_register_losses(register): 1 / 0"
    )
    assert refusal() == (
        "plugin 'nnj-squash' (nnj-squash 0.1) failed in nnj_register_losses: ZeroDivisionError: "
        "division by zero. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash"
    )


@pytest.mark.parametrize(
    "code",
    ["", "def nnj_register_layers(register): register(int, print)"],
    ids=["empty", "unmarked"],
)
def test_a_plugin_that_registers_nothing(fakes, code):
    fakes.install("nnj-squash", code)
    message = (
        r"^plugin 'nnj-squash' \(nnj-squash 0\.1\) registers nothing: does it implement a hook of "
        r"nnj\.registry\.hookspecs with "
        r"@nnj\.hookimpl\? Disable it with NNJ_DISABLED_PLUGINS=nnj-squash$"
    )
    with pytest.warns(UserWarning, match=message):
        assert list(load().entries("layer")) == []


@pytest.mark.parametrize("error", ["SystemExit(3)", "Mine(3)", "GeneratorExit(3)"])
@pytest.mark.parametrize("where", ["import", "hook"])
def test_a_plugin_that_would_end_the_program(fakes, error, where):
    """Whatever it raises, it is named."""
    code = f"class Mine(BaseException): pass\ndef leave(): raise {error}\n"
    code += (
        "leave()"
        if where == "import"
        else "import nnj\n@nnj.hookimpl\ndef nnj_register_layers(register): leave()"
    )
    fakes.install("nnj-squash", code)
    assert (said := refusal()).startswith("plugin 'nnj-squash' (nnj")
    assert said.endswith(f"{error[:-3]}: 3. Disable it with NNJ_DISABLED_PLUGINS=nnj-squash")


def test_an_interrupt_by_the_keyboard_is_the_users(fakes):
    fakes.install("nnj-squash", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load()
