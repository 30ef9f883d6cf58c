"""Plugins for tests: made by hand, in fake distributions on sys.path, or installed by pip."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.registry.claim import DISABLED
from nnj.registry.manager import PluginManager

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
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

    def install(
        self,
        name: str,
        code: str | None,
        *,
        version: str = "0.1",
        entries: dict[str, str] | None = None,
    ) -> None:
        """A distribution of one module, none if `code` is None, and one entry point of its name."""
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
        """A distribution that claims a layer."""
        self.install(name, CLAIM.format(cls=cls, more=more), **options)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Only these distributions are found, not nnj's own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(DISABLED, raising=False)
    found = metadata.entry_points
    inside = lambda point: Path(point.dist.locate_file("")) == tmp_path
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [p for p in found(group=group) if inside(p)]
    )
    importlib.invalidate_caches()
    fakes = Fakes(tmp_path)
    yield fakes
    for name in fakes.modules:
        sys.modules.pop(name, None)


def load() -> PluginManager:
    """A new manager, with all plugins that are found."""
    importlib.invalidate_caches()
    manager = PluginManager()
    manager.load()
    return manager


def refusal() -> str:
    """How `load` fails."""
    with pytest.raises(nnj.PluginError) as caught:
        load()
    return str(caught.value)


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


def twice(m: nn.Linear, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """A right rule for nn.Linear without bias, on vectors."""
    eye = torch.eye(m.out_features, dtype=x.dtype)
    j = torch.einsum("op,ni->nopi", eye, x).flatten(2)
    return {
        "input": nnj.Dense(m.weight.detach().expand(len(x), -1, -1), x.shape[1:], y.shape[1:]),
        "weight": nnj.Dense(j, m.weight.shape, y.shape[1:]),
    }


class Squash(nn.Module):
    """(N, 4) -> (N, 4), not symmetric."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * x[:, :1]


def install(target: Path, *sources: Path) -> Run:
    """Install all in one go, beside this nnj.

    Returns `run(*args, disabled=[...])`, an interpreter that finds them, and nnj as here.
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
