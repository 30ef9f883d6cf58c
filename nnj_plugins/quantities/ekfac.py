"""Kronecker-factored eigenvectors with the exact second moments in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import nnj
from nnj_plugins.quantities.kfac import KFAC, Rest, exact_part, form_of


class EKFAC(nnj.Quantity):
    """`module.ekfac`, a matrix of `nnj.matrices` like `module.kfac`, with the eigenvectors of its
    Kronecker factors and, in the place of products of their eigenvalues, the diagonal of G in these
    eigenvectors (George et al. 2018).

    Its trace is that of G, and no other eigenvalues in the same eigenvectors are nearer to G: its
    error is at most that of KFAC. What is no matrix product has its exact block, as in `kfac`.

    The eigenvectors are known only after the last column. So `nnj.fit` reads all data twice, for
    the factors and for the moments; in one backward pass the columns walk twice. A second backward
    pass inside one `nnj.collect`, or a second loss, would have other eigenvectors, and is refused
    unless `basis` gives them.

    Args:
        basis: an earlier kfac: a `nnj.Fit` of it, its `fit["kfac"]`, or a dict of the same form, of
            matrices by the names of modules.
        approx, fisher, samples, generator, bias, places, block_limit: as in `kfac`; fisher other
            than "forward", of which `kfac` has the exact moments.

    Errors: `NNJError` for a basis that says nothing of a module, or was made for other shapes.
    """

    place = nn.Module

    def __init__(
        self,
        approx: str = "expand",
        fisher: str = "exact",
        samples: int = 1,
        generator: torch.Generator | None = None,
        bias: str = "joint",
        places: str = "all",
        block_limit: int = 10_000,
        basis: Any = None,
    ):
        if fisher == "forward":
            raise nnj.NNJError(
                "ekfac of fisher='forward' is kfac of it, whose factors are exact. Collect kfac"
            )
        self.options = (approx, fisher, samples, generator, bias, places, block_limit)
        kfac = KFAC(*self.options)  # which checks them
        self.source, self.degree, self.quadratic = kfac.source, kfac.degree, kfac.quadratic
        self.draws, self.generator, self.block_limit = samples, generator, block_limit
        self.basis: Mapping[str, nnj.matrices.Matrix] | None = _by_name(basis)
        self._given: Mapping[Any, nnj.matrices.Matrix] | None = None
        self._paths: dict[nn.Module, str] = {}

    @override
    def first(self) -> nnj.Quantity | None:
        return KFAC(*self.options) if self.basis is None and self._given is None else None

    @override
    def given(self, results: Mapping[Any, Any] | None) -> None:
        self._given = results

    @override
    def check(self, module: nn.Module | None, params: list[nn.Parameter], path: str) -> None:
        if self.basis is not None and module is not None:
            if path not in self.basis:
                raise nnj.NNJError(
                    f"ekfac: basis= says nothing of the module '{path}'. Give a kfac of all "
                    "modules at which is collected"
                )
            self._paths[module] = path

    # -- chunks of columns -------------------------------------------------------------------------

    @override
    def start(self, place: Any, params: list[nn.Parameter]) -> Any:
        if self.basis is not None:
            matrix = self.basis[self._paths.pop(place)]
        else:
            assert self._given is not None  # by whoever asked for `first`
            matrix = self._given[place]
        names = {id(p): name for name, p in reversed(list(place.named_parameters(recurse=False)))}
        shapes = {names[id(p)]: tuple(p.shape) for p in params}
        if matrix.layout.shapes != shapes:
            raise nnj.NNJError(
                f"ekfac: the basis is over {matrix.layout.shapes} and the module over {shapes}. "
                "Give a kfac of this model, with the same parameters frozen"
            )
        return {"shapes": shapes, "blocks": [_block(part) for part in _parts(matrix)]}

    @override
    def add(
        self,
        state: Any,
        factors: list[nnj.Factor | None],
        params: list[nn.Parameter],
        total_columns: int,
    ) -> Any:
        given = zip(state["shapes"], factors, strict=True)
        known = {name: factor for name, factor in given if factor is not None}
        state["blocks"] = [block.plus(known, self.block_limit) for block in state["blocks"]]
        return state

    @override
    def end_pass(self, state: Any) -> Any:
        scale = 1 / self.draws if self.source == "signs" else 1.0
        return {"shapes": state["shapes"], "parts": [b.kept(scale) for b in state["blocks"]]}

    # -- passes ------------------------------------------------------------------------------------

    @override
    def merge(self, one: Any, other: Any) -> Any:
        facts = [
            (kept["shapes"], [form_of(part) for part in kept["parts"]]) for kept in (one, other)
        ]
        pairs = list(zip(one["parts"], other["parts"], strict=False))
        if facts[0] != facts[1] or not all(_same_basis(a, b) for a, b in pairs):
            raise nnj.NNJError(
                "ekfac: two backward passes, losses or fits have eigenvectors of their own, in "
                "which moments do not add up. Use nnj.fit over all data, or basis= an earlier kfac"
            )
        return {
            "shapes": one["shapes"],
            "parts": [{**a, "values": a["values"] + b["values"]} for a, b in pairs],
        }

    @override
    def merge_losses(self, one: Any, other: Any) -> Any:
        return super().merge_losses(one, other) if self.quadratic else self.merge(one, other)

    @override
    def finish(self, state: Any, samples: int) -> nnj.matrices.Matrix:
        parts = [_part(kept, state["shapes"]) for kept in state["parts"]]
        return nnj.matrices.joined(state["shapes"], parts)

    @override
    def matrix(
        self, result: nnj.matrices.Matrix, shapes: Mapping[str, Sequence[int]]
    ) -> nnj.matrices.Matrix:
        return result


class _Moments:
    """The second moments of a product in the eigenvectors of its Kronecker factors.

    Args:
        matrix: the product in its eigenvectors.
        seen: which parameters it is over, and how it sees them.
    """

    def __init__(self, matrix: nnj.matrices.EigenKronecker, seen: dict[str, nnj.matrices.Seen]):
        self.part, self.matrix = nnj.matrices.Part(matrix, seen), matrix
        self.values = torch.zeros_like(matrix.values)

    def plus(self, factors: dict[str, nnj.Factor], limit: float) -> _Moments:
        mine = self.part.factors(factors)
        if mine:
            m = self.matrix
            rotated = m.rotated(mine, _as(m.left, mine), _as(m.right, mine))
            self.values = self.values + rotated.square_sum().reshape(m.form).to(self.values.dtype)
        return self

    def kept(self, scale: float) -> dict[str, Any]:
        return {
            "own": self.matrix.layout.shapes,
            "seen": [
                (own, s.name, None if s.view is None else vars(s.view))
                for own, s in self.part.seen.items()
            ],
            "left": self.matrix.left,
            "right": self.matrix.right,
            "values": self.values * scale,
        }


class _Block:
    """The exact block of what is in no product, or its diagonal.

    Args:
        names: of the parameters.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.rest: Rest | None = None

    def plus(self, factors: dict[str, nnj.Factor], limit: float) -> _Block:
        mine = {name: factors[name] for name in self.names if name in factors}
        new = Rest(mine, limit)
        self.rest = new if self.rest is None else self.rest.plus(new)
        return self

    def kept(self, scale: float) -> dict[str, Any]:
        assert self.rest is not None  # some column came to the module
        kept = self.rest.kept(scale, False)
        form = "block" if "block" in kept else "diagonal"
        return {"names": kept["names"], "form": form, "values": kept[form]}


def _parts(matrix: nnj.matrices.Matrix) -> list[nnj.matrices.Part]:
    if isinstance(matrix, nnj.matrices.BlockDiagonal):
        return matrix.blocks
    return [nnj.matrices.Part(matrix, {n: nnj.matrices.Seen(n) for n in matrix.layout.shapes})]


def _block(part: nnj.matrices.Part) -> _Moments | _Block:
    matrix = part.matrix
    if isinstance(matrix, nnj.matrices.Kronecker):
        return _Moments(matrix.decomposed, part.seen)
    if isinstance(matrix, nnj.matrices.EigenKronecker):
        return _Moments(matrix, part.seen)
    return _Block([seen.name for seen in part.seen.values()])


def _part(kept: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> nnj.matrices.Part:
    if "names" in kept:
        own = {name: shapes[name] for name in kept["names"]}
        return exact_part(own, kept["form"], kept["values"])
    seen = {
        own: nnj.matrices.Seen(name, None if view is None else nnj.View(**view))
        for own, name, view in kept["seen"]
    }
    sides = kept["left"], kept["right"]
    matrix = nnj.matrices.EigenKronecker(kept["own"], *sides, kept["values"])
    return nnj.matrices.Part(matrix, seen)


def _same_basis(a: dict[str, Any], b: dict[str, Any]) -> bool:
    sides = [(a.get(side), b.get(side)) for side in ("left", "right")]
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in sides
    )


def _as(side: Tensor | None, factors: Mapping[str, nnj.Factor]) -> Tensor | None:
    """Eigenvectors in the dtype of factors."""
    return None if side is None else side.to(next(iter(factors.values())).dtype)


def _by_name(basis: Any) -> Mapping[str, nnj.matrices.Matrix] | None:
    """The matrices of an earlier kfac by the names of modules. Errors: `NNJError` for anything
    else.
    """
    if basis is None:
        return None
    found = basis["kfac"] if isinstance(basis, nnj.Fit) and "kfac" in basis else basis
    if not isinstance(found, Mapping) or not all(
        isinstance(matrix, nnj.matrices.Matrix) for matrix in found.values()
    ):
        raise nnj.NNJError(
            "ekfac: basis= takes an earlier kfac: a nnj.Fit of 'kfac', or a dict from names of "
            f"modules to matrices, not {type(basis).__name__}"
        )
    return found


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("ekfac", EKFAC)
