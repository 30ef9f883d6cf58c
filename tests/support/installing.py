"""Distributions that pip really builds and installs, beside this nnj."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from nnj.registry.claim import DISABLED
from tests.support.distributions import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def install(target: Path, *sources: Path) -> Run:
    """Install all in one go; `run(*args, disabled=[...])` is an interpreter that finds them, and
    nnj as here.
    """
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building a package without a network needs pip and setuptools (extra 'test')")
    if not any(
        point.value == "nnj_plugins.quantities.ggn_diag"
        for point in metadata.entry_points(group="nnj")
    ):
        pytest.skip(
            "nnj is not installed, so its own plugins have no entry points: pip install -e ."
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "--target", str(target), *map(str, sources)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join(filter(None, [str(target), str(ROOT), os.environ.get("PYTHONPATH")]))

    def run(
        *args: str, disabled: list[str] | None = None, cwd: Path = target.parent
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path, DISABLED: ",".join(disabled or [])}
        return subprocess.run(
            [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True
        )

    return run
