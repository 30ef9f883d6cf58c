"""Matrices from files, by the names of their classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnj.errors import NNJError
from nnj.matrices.matrix import FORMAT, Matrix, name_of_kind


def load(path: str | os.PathLike[str], map_location: Any = None) -> Matrix:
    """Read a matrix that `matrix.save` wrote; no code in the file is run.

    Args:
        map_location: as of `torch.load`.

    Errors: `NNJError` for a file of another kind, or of a class that is not imported.
    """
    is_matrix = lambda found: isinstance(found, dict) and found.get("nnj.matrices") == FORMAT
    found = read_packed(path, map_location, is_matrix, "matrix", "matrix.save")
    made: Matrix = unpacked(found["matrix"])
    return made


def read_packed(
    path: str | os.PathLike[str],
    map_location: Any,
    is_one: Callable[[Any], bool],
    what: str,
    writer: str,
) -> Any:
    """What a file holds, of which no code is run.

    Args:
        is_one: whether something is what `writer` writes, a `what`.

    Errors: `NNJError` for a file of another kind.
    """
    cause: Exception | None = None
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise  # no file, or one that may not be read
    except Exception as error:  # a file of another kind: torch has many names for that
        found, cause = None, error
    if not is_one(found):
        raise NNJError(
            f"{os.fspath(path)} holds no {what} that this version can read. Write it with {writer}"
        ) from cause
    return found


def unpacked(value: Any) -> Any:
    """The same with a matrix for each table that stands for one."""
    if isinstance(value, list):
        return [unpacked(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"kind", "block_limit", "state"}:
        return {key: unpacked(part) for key, part in value.items()}
    made = _class(value["kind"]).from_state(unpacked(value["state"]))
    made.block_limit = value["block_limit"]
    return made


def _class(kind: str) -> type[Matrix]:
    for found in _below(Matrix):
        if name_of_kind(found) == kind:
            return found
    raise NNJError(
        f"the file holds a matrix of the class {kind}, which is not imported. Import its module, "
        "and load again"
    )


def _below(cls: type[Matrix]) -> Iterator[type[Matrix]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)
