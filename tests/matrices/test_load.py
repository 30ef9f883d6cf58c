"""Files that hold no matrix, or one of a class that nobody knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnj import NNJError
from nnj.matrices import Diagonal, load
from nnj.matrices.matrix import FORMAT


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    for found in (torch.ones(2), {"nnj.matrices": FORMAT + 1}, torch.nn.Linear(1, 1)):
        torch.save(found, path)
        with pytest.raises(NNJError, match="holds no matrix that this version can read"):
            load(path)
    path.write_text("nothing")
    with pytest.raises(NNJError, match="holds no matrix"):
        load(path)
    with pytest.raises(OSError):
        load(tmp_path / "none.pt")


def test_a_class_that_is_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    Diagonal({"a": (2,)}, torch.ones(2)).save(path)
    found = torch.load(path, weights_only=True)
    found["matrix"]["kind"] = "elsewhere.Theirs"
    torch.save(found, path)
    with pytest.raises(NNJError, match=r"of the class elsewhere.Theirs, which is not imported"):
        load(path)
