"""examples/coming_from.md: every snippet runs, and both tools say the same, where the other one is
installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.documents import ROOT, fenced

PAGE = (ROOT / "examples" / "coming_from.md").read_text()
SETUP, *_ = fenced(PAGE, "python")
PEERS = {
    "BackPACK": "backpack",
    "laplace-torch": "laplace",
    "curvlinops": "curvlinops",
    "kfac-jax": "kfac_jax",
    "Opacus": "opacus",
    "nngeometry": "nngeometry",
    "ASDL": "asdl",
    "torch.func": "torch",
    "Trainer of transformers": "accelerate",  # which its Trainer needs
    "Lightning": "lightning",
    "The original nnj": "torch",  # its interface, which nnj has itself
}
SECTIONS = [part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]]
SNIPPETS = [
    pytest.param(PEERS[re.sub(r" [\d.]+(a\d+)?$", "", title)], code, id=f"{title} {number}")
    for title, text in SECTIONS
    for number, code in enumerate(fenced(text, "python"), 1)
]


def test_every_tool_has_a_snippet():
    assert {re.sub(r" [\d.]+(a\d+)?$", "", title) for title, _ in SECTIONS} == PEERS.keys()
    assert all(fenced(text, "python") for _, text in SECTIONS)


@pytest.mark.parametrize("peer, code", SNIPPETS)
def test_snippet(peer, code, tmp_path):
    """In a process of its own: other tools leave hooks and settings behind."""
    if find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    assert "assert" in code
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", f"{SETUP}\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
