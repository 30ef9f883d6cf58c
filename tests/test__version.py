"""A torch that is too old is named on import, in one sentence, before anything of it is used."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nnj
from nnj._version import OLDEST_TORCH, check_torch

ROOT = Path(__file__).resolve().parents[1]
FOUND = "2.5.1+cpu"
SENTENCE = (
    f"nnj {nnj.__version__} needs torch {OLDEST_TORCH} or newer, and torch {FOUND} is installed. "
    "Upgrade it from the index that it came from"
)


def test_an_old_torch(tmp_path):
    (tmp_path / "torch.py").write_text(f"__version__ = {FOUND!r}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import nnj"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {SENTENCE}"


@pytest.mark.parametrize("found", ["1.13.1", "2.0.0", "2.5.1", "2.5.1+cu124"])
def test_too_old(found):
    with pytest.raises(ImportError, match=f"and torch {re.escape(found)} is installed"):
        check_torch(found)


@pytest.mark.parametrize("found", ["2.6.0", "2.6.0a0+git1ec1", "2.10.0", "2.13.0+cpu", "3.0.0"])
def test_new_enough(found):
    check_torch(found)


def test_all_say_the_same():
    """setup.cfg, README and .ci/versions, which tests with the oldest."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert f"torch>={OLDEST_TORCH}" in config["options"]["install_requires"].split()
    assert f"torch {OLDEST_TORCH}, pluggy" in (ROOT / "README.md").read_text()
    others = re.search(r"^others=\((.*)\)$", (ROOT / ".ci" / "versions").read_text(), re.MULTILINE)
    assert others is not None
    oldest, newest = others[1].split()
    assert oldest == f"{OLDEST_TORCH}.0"
    assert f"with {oldest} and {newest}" in (ROOT / "README.md").read_text()
