"""The floors of the house: each package imports only those below it, no files go in a circle, and
plugins see `nnj` alone.

Every import is read, also under TYPE_CHECKING and inside functions; a package's `__init__` is a
file like any other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnj

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; packages of one floor do not know one another.
FLOORS = (
    {"_version", "errors", "checks", "generators", "extras"},
    {"jacobians", "compiling", "distributed"},
    {"loss_hessian", "matrices"},
    {"registry"},
    {"recording"},
    {"graph"},
    {"propagation"},
    {"products", "collecting"},
    {"operators"},
    {"posterior"},
    {"utils", "original"},  # the interface of the original nnj, beside the house
    {"__init__"},
    {"testing", "integrations"},
    {"__main__"},
)
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
CORE = sorted((ROOT / "nnj").rglob("*.py"))
PLUGINS = sorted((ROOT / "nnj_plugins").rglob("*.py"))
STRANGERS = sorted((ROOT / "examples" / "third_party").glob("nnj_*/*.py"))
ALLOWED = {"torch", "pluggy", "typing_extensions"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in CORE}


def imports(path: Path) -> Iterator[str]:
    """The full names that a file imports; of `from a.b import c` the module a.b.c if there is one,
    else a.b.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def package_of(module: str) -> str:
    """The room of a module of nnj: its package, or its own name where it stands in the hall."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "nnj"}


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_package_has_a_floor():
    assert {package_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", CORE, ids=where)
def test_a_package_imports_only_those_below(path):
    mine = package_of(module_of(path))
    for name in own_imports(path):
        other = package_of(name)
        assert other == mine or LEVEL[other] < LEVEL[mine], f"{mine} imports {name}"


def test_no_circle_of_files():
    """Also where only a type hint closes it: then none of the files can be read first."""
    needs = {
        module: {name for name in own_imports(path) if name != module}
        for module, path in MODULES.items()
    }
    while True:
        free = {module for module, others in needs.items() if not others & needs.keys()}
        if not free:
            break
        needs = {module: others for module, others in needs.items() if module not in free}
    assert not needs, f"a circle is among {sorted(needs)}"


@pytest.mark.parametrize("path", CORE, ids=where)
def test_the_core_imports_its_own_packages_alone(path):
    import sys

    allowed = ALLOWED | ({"laplace"} if path.stem == "laplace_torch" else set())
    if path.parent.name == "extras":  # read only where it is used
        allowed = allowed | {path.stem.split("_")[0]}
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "nnj" or top in allowed or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", CORE, ids=where)
def test_the_core_names_no_plugin(path):
    assert "nnj_plugins" not in path.read_text()


@pytest.mark.parametrize("path", PLUGINS + STRANGERS, ids=where)
def test_a_plugin_uses_public_names_alone(path):
    """It imports the name `nnj` and nothing inside it, of nnj only what is in `__all__`, and files
    of its own family, as those of one package may.
    """
    mine = {name for name in imports(path) if name.split(".")[0] in ("nnj", "nnj_plugins")}
    family = f"nnj_plugins.{path.parent.name}."
    assert {name for name in mine if not name.startswith(family)} <= {"nnj"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "nnj"
    }
    assert used <= set(nnj.__all__)


def test_extend_loads_no_testing():
    """What only checks and the command need is not imported with the library, nor by the plugins
    that it loads.
    """
    import subprocess
    import sys

    code = (
        "import sys, torch, nnj; nnj.extend(torch.nn.Linear(2, 2)); "
        "print([m for m in sys.modules if m.startswith('nnj.testing')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
