"""The guides: README is a door, links lead somewhere, and what nnj/README.md names is there."""

from __future__ import annotations

import ast
import re

import pytest

import nnj
from tests.support.documents import ROOT, anchors, fenced, guides, links


def test_readme_is_a_door():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_the_guides_are_beside_what_they_describe():
    found = {str(path.relative_to(ROOT)) for path in guides()}
    assert found >= {
        "README.md",
        "examples/README.md",
        "examples/benchmarks/README.md",
        "examples/coming_from.md",
        "examples/third_party/README.md",
        "nnj/CHANGELOG.md",
        "nnj/README.md",
        "nnj_plugins/README.md",
    }


@pytest.mark.parametrize("path", guides(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for link in links(path.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{link} leads nowhere"
        assert ROOT in there.parents, f"{link} leads out of the repository"
        if heading:
            assert heading in anchors(there.read_text()), f"{link} names no heading"


def defined(file: str) -> set[str]:
    """The functions, classes and methods of a file, the latter as `Class.method`."""
    found = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else "")
            else:
                visit(child, prefix)

    visit(ast.parse((ROOT / "nnj" / file).read_text()), "")
    return found


def test_the_path_of_a_backward_pass_names_what_is_there():
    """If this fails: a function has moved, and the list in nnj/README.md must follow it."""
    text = (ROOT / "nnj" / "README.md").read_text()
    section = text[text.index("## The path of one backward pass") :]
    (listed,) = fenced(section[: section.index("\n## ", 1)], "text")
    steps = re.findall(r"^ *(\w+/\w+\.py): ([\w.]+)", listed, re.MULTILINE)
    assert 15 <= len(steps) <= 30
    for file, name in steps:
        assert name in defined(file), f"{file} has no {name}"


def test_the_packages_of_the_guide_are_those_of_nnj():
    text = (ROOT / "nnj" / "README.md").read_text()
    section = text[text.index("## The packages") :]
    named = re.findall(r"^\| `(\w+)/` \|", section[: section.index("\n## ", 1)], re.MULTILINE)
    assert sorted(named) == sorted(p.parent.name for p in (ROOT / "nnj").glob("*/__init__.py"))


def test_the_changelog_names_what_is_there():
    """Every new name in the table of public names is public, and no old one is left."""
    text = (ROOT / "nnj" / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `nnj\.(\w+)` \| `nnj\.(\w+)` \|", text, re.MULTILINE)
    assert len(rows) == 9
    for old, new in rows:
        assert new in nnj.__all__ and not hasattr(nnj, old), (old, new)
