"""One matrix over all parameters, made of the matrices at the places of a quantity."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnj.collecting.contribution import asked
from nnj.collecting.quantity import Quantity, named
from nnj.errors import NNJError
from nnj.matrices.block import BlockDiagonal, Part, Seen
from nnj.matrices.diagonal import Diagonal
from nnj.matrices.matrix import Matrix
from nnj.recording.module_hook import extended_roots
from nnj.recording.placement import whole_of
from nnj.recording.wrappers import inside_wrapper


class Names:
    """What the parameters of a model, and of its modules, are called.

    Attributes:
        shapes: of each parameter, in the order of `named_parameters()`.
        own: of each module that owns some, what its own names for them stand for.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], own: Mapping[str, Mapping[str, str]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.own = {path: dict(names) for path, names in own.items()}

    @classmethod
    def of(cls, model: nn.Module, inside: Iterable[Tensor]) -> Names:
        """Those of some parameters of a model."""
        wanted = {id(p) for p in inside}
        full = {id(p): name for name, p in model.named_parameters() if id(p) in wanted}
        shapes = {full[id(p)]: p.shape for _, p in model.named_parameters() if id(p) in full}
        own = {
            path: {
                name: full[id(p)] for name, p in m.named_parameters(recurse=False) if id(p) in full
            }
            for path, m in model.named_modules()
        }
        return cls(shapes, {path: names for path, names in own.items() if names})


def model_and_names(
    took_part: Container[nn.Module], tops: Iterable[nn.Module] | None
) -> tuple[nn.Module, Names]:
    """The extended model of modules that took part in backward passes, and the names of its
    parameters that require grad, or of those below `tops`.

    Errors: `NNJError` if there is not one.
    """
    outer = models_of(took_part)
    if len(outer) != 1:
        raise NNJError(
            f"a matrix is over the parameters of one model, and {len(outer)} took part (and are "
            "alive). Collect for one at a time"
        )
    model = inside_wrapper(outer[0])
    inside = [p for top in tops or [model] for p in top.parameters() if p.requires_grad]
    return model, Names.of(model, inside)


def models_of(took_part: Container[nn.Module] | None = None) -> list[nn.Module]:
    """The extended models that are part of no other one, in the order in which they were extended:
    those of modules that took part, or all of them.
    """
    roots = [
        root
        for root in extended_roots()
        if took_part is None or any(m in took_part for m in root.modules())
    ]
    inner = {m for root in roots for m in root.modules() if m is not root}
    return [root for root in roots if root not in inner]


def holder_at(model: nn.Module, path: str) -> Any:
    """The parameter or module of a name."""
    return functools.reduce(getattr, path.split(".") if path else (), model)


class PlacedMatrix(NamedTuple):
    """The matrix of a place.

    Attributes:
        matrix: over names of its own.
        names: what each of them stands for.
    """

    matrix: Matrix
    names: Mapping[str, str]


def matrix_of_places(quantity: Quantity, values: Mapping[str, Any], names: Names) -> Matrix | None:
    """One matrix of the results at parameters or modules; None if they are none."""
    placed, like = [], None
    for path, value in values.items():
        own = names.own[path] if quantity.place is nn.Module else {path: path}
        shapes = {name: names.shapes[full] for name, full in own.items()}
        found = asked(named(quantity), quantity.matrix, whole_of(value), shapes)
        if found is None:
            return None
        placed.append(PlacedMatrix(found, own))
        like = torch.zeros(0, dtype=found.dtype, device=found.device)
    return joint_matrix(names, placed, like)


def checked_matrix(quantity: str, found: Matrix | None) -> Matrix:
    if found is None:
        raise NNJError(
            f"{quantity!r} is no matrix over the parameters. Diagonals, blocks and Kronecker "
            "factors are, such as ggn_diag, ggn_block and kfac"
        )
    return found


def joint_matrix(
    names: Names, placed: Sequence[PlacedMatrix], like: Tensor | None = None
) -> Matrix:
    """The matrix over all parameters, with zeros between places and for what is in none of them. A
    parameter of several modules is with the first of them.
    """
    whole = _whole_diagonal(names, placed, like)
    if whole is not None:
        return whole
    parts, taken = [], set[str]()
    for matrix, own in placed:
        left = [name for name, full in own.items() if full not in taken]
        taken.update(own.values())
        if left:
            part = matrix if len(left) == len(own) else matrix.restricted(left)
            parts.append(Part(part, {name: Seen(own[name]) for name in left}))
    return BlockDiagonal(names.shapes, parts, like)


def _whole_diagonal(
    names: Names, placed: Sequence[PlacedMatrix], like: Tensor | None
) -> Diagonal | None:
    """A diagonal of diagonals; None where they are none of whole parameters."""
    found: dict[str, Tensor] = {}
    for matrix, own in placed:
        if not isinstance(matrix, Diagonal) or len(own) != 1:
            return None
        (full,) = own.values()
        found[full] = matrix.d
    some = next(iter(found.values()), like)
    if some is None or not found:
        return None
    dtypes = [d.dtype for d in found.values()]
    if len(set(dtypes)) > 1:
        raise NNJError(
            f"a matrix over parameters of {', '.join(sorted(map(str, set(dtypes))))} has no dtype. "
            "Ask for its places one by one, or convert the model"
        )
    zeros = {full: some.new_zeros(torch.Size(s).numel()) for full, s in names.shapes.items()}
    return Diagonal(names.shapes, torch.cat([found.get(full, z) for full, z in zeros.items()]))
