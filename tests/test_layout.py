"""The test of nnj/P/f.py is tests/P/test_f.py, that of nnj_plugins/P/f.py is the same below
tests/nnj_plugins/.

What crosses packages is in tests/whole/, what crosses the files of the plugins in tests/nnj_plugins
itself; oracles, tables of cases and helpers are in tests/support/, so that no test imports another.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
# These read the sources of all packages; a conformance suite runs over all classes of its package.
OF_ALL = {"test_layout.py", "test_layering.py"}
OF_A_PACKAGE = {"test_conformance.py"}


def subject(path: Path) -> Path:
    """The file that a test is about, by its name."""
    parts = path.parts if path.parts[0] == "nnj_plugins" else ("nnj", *path.parts)
    return ROOT.joinpath(*parts[:-1], path.name.removeprefix("test_"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_test_is_named_after_the_file_that_it_tests(path):
    crosses = path.parts[0] == "whole" or path.parent == Path("nnj_plugins")
    if crosses or str(path) in OF_ALL or path.name in OF_A_PACKAGE:
        assert not subject(path).exists()
    else:
        assert subject(path).is_file(), "name it after a file of nnj, or move it to tests/whole"


def test_folders_are_those_of_the_packages():
    folders = {path.parts[0] for path in FILES if len(path.parts) > 1}
    packages = {path.parent.name for path in (ROOT / "nnj").glob("*/__init__.py")}
    assert folders <= packages | {"whole", "nnj_plugins"}


def test_what_is_no_test_is_in_support():
    others = {path.relative_to(TESTS) for path in TESTS.rglob("*.py")} - set(FILES)
    beside = {path for path in others if path.parts[0] != "support" and path.name != "__init__.py"}
    assert beside == {Path("conftest.py")}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_test_imports_another(path):
    for node in ast.walk(ast.parse((TESTS / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert not name.startswith("tests.") or name.startswith("tests.support."), name
