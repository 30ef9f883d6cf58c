"""Kronecker-factored curvature: G ~ S (x) A at each matrix product, for each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from typing_extensions import override

import nnj
from nnj_plugins.quantities.ggn_block import checked_limit

# The parameters of nn.MultiheadAttention in which three projections stand one below the other.
PACKED = ("in_proj_weight", "in_proj_bias")

# Where the columns come from, and how a result grows with the loss.
FISHERS = {
    "exact": ("exact", 1),
    "mc": ("signs", 1),
    "empirical": ("gradient", 2),
    "forward": ("gradient", 0),
}


class KFAC(nnj.Quantity):
    """`module.kfac`, a matrix of `nnj.matrices` over the module's own parameters that require grad,
    flattened in the order of `ggn_block`, which it approximates.

    At a weight that enters a matrix product with inputs u, and to whose outputs columns v come, it
    is S (x) A for each group, of

        expand   S = sum_{k,n,l} v v^T,  A = sum_{n,l} u u^T / (N L)
        reduce   S = sum_{k,n} v v^T with v = sum_l v,  A = sum_n u u^T / N with u = mean_l u

    over columns k, samples n and places l (Martens and Grosse 2015; Grosse and Martens 2016;
    Eschenhagen et al. 2023). A bias of the same places is one more input that is 1. Two uses of one
    weight are more places; attention's query, key and value have factors each; a table of
    embeddings has a diagonal A. Scaled as `ggn_block`: by the scalar on which `.backward()` was
    called. Several backward passes add up in S, and A is the mean over all of them.

    It is G itself for one sample with one place, for deep linear nets with a square loss (expand
    with a loss at each place; reduce with sum or mean pooling), and within one last layer of one
    place whose H is the same for all samples.

    What is no matrix product (norms, biases without their weight, layers without a rule) has its
    exact block, or beyond `block_limit` its diagonal.

    Args:
        approx: "expand" or "reduce".
        fisher: "exact" has the columns of `ggn_block` (KFLR); "mc" `samples` random combinations of
            them; "empirical" the gradient of each sample, of degree 2 in the loss: under a mean
            over the batch it is N times smaller than "exact" where both estimate one matrix;
            "forward" no columns: S = N L I, the GGN of half the summed squares of this layer's
            output, whatever the loss, which is exact at norms and biases, too (layers without a
            rule are left out).
        samples, generator: of "mc", as in `ggn_diag_mc`.
        bias: "joint", or "separate": then biases have their exact block.
        places: "all", as published; or "alive": places at which every column is zero, such as
            padding, are left out of the sum and of the count.
        block_limit: the largest exact block.

    Errors: `NNJError` for another option; for two losses of the same samples in one backward pass,
        if "empirical", or if "forward" and they reach a module by other calls.
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
    ):
        _check("approx", approx, "expand", "reduce")
        _check("fisher", fisher, *FISHERS)
        _check("bias", bias, "joint", "separate")
        _check("places", places, "all", "alive")
        self.approx, self.fisher, self.bias, self.places = approx, fisher, bias, places
        self.draws, self.generator = samples, generator
        self.block_limit = checked_limit(block_limit)
        self.source, self.degree = FISHERS[fisher]
        self.sees_samples, self.quadratic = approx == "reduce", fisher == "empirical"

    # -- chunks of columns -------------------------------------------------------------------------

    @override
    def start(self, place: Any, params: list[nn.Parameter]) -> Any:
        names = {id(p): name for name, p in reversed(list(place.named_parameters(recurse=False)))}
        shapes = {names[id(p)]: tuple(p.shape) for p in params}
        packed = PACKED if isinstance(place, nn.MultiheadAttention) else ()
        return {"shapes": shapes, "packed": packed, "parts": None}

    @override
    def add(
        self,
        state: Any,
        factors: list[nnj.Factor | None],
        params: list[nn.Parameter],
        total_columns: int,
    ) -> Any:
        given = zip(state["shapes"], factors, strict=True)
        packed = state["packed"]
        parts = self._parts(
            {
                name: _projections(factor) if name in packed else factor
                for name, factor in given
                if factor is not None
            }
        )
        known = state["parts"]
        state["parts"] = (
            parts if known is None else [a.plus(b) for a, b in zip(known, parts, strict=True)]
        )
        return state

    def _parts(self, factors: dict[str, nnj.Factor]) -> list[_Product | Rest]:
        """What the factors of a chunk are: products, and the rest."""
        products = {name: f.kron(self.approx) for name, f in factors.items()}  # type: ignore[arg-type]
        krons = [(name, kron) for name, found in products.items() for kron in found or ()]
        biases = {name: f.biases() for name, f in factors.items()} if self.bias == "joint" else {}
        joint = _joint(krons, {name: parts for name, parts in biases.items() if parts})
        only_alive = self.places == "alive"
        parts: list[_Product | Rest] = [
            _Product(name, kron, joint.get(i), only_alive) for i, (name, kron) in enumerate(krons)
        ]
        taken = {bias for bias, _ in joint.values()}
        rest = {n: f for n, f in factors.items() if products[n] is None and n not in taken}
        if self.fisher == "forward":
            rest = {n: f for n, f in rest.items() if f.output_squares(f) is not None}
        if rest:
            made = OfOutput if self.fisher == "forward" else Rest
            parts.append(made(rest, self.block_limit))
        return parts

    @override
    def end_pass(self, state: Any) -> Any:
        scale = 1 / self.draws if self.fisher == "mc" else 1.0
        parts = [part.kept(scale, self.fisher == "forward") for part in state["parts"]]
        return {"shapes": state["shapes"], "parts": parts}

    # -- passes ------------------------------------------------------------------------------------

    @override
    def merge(self, one: Any, other: Any) -> Any:
        return _merged(one, other, same_places=False)

    @override
    def merge_losses(self, one: Any, other: Any) -> Any:
        if self.quadratic:
            return super().merge_losses(one, other)  # which refuses it
        return _same(one, other) if self.fisher == "forward" else _merged(one, other, True)

    @override
    def finish(self, state: Any, samples: int) -> nnj.matrices.Matrix | None:
        parts = [_matrix(part, state["shapes"]) for part in state["parts"]]
        if not parts:
            return None
        return nnj.matrices.joined(state["shapes"], parts)

    @override
    def matrix(
        self, result: nnj.matrices.Matrix, shapes: Mapping[str, Sequence[int]]
    ) -> nnj.matrices.Matrix:
        return result


def _projections(factor: nnj.Factor) -> nnj.Factor:
    """Query, key and value apart, of which a third of the rows is each."""
    third = factor.shape[0] // 3
    views = [nnj.View.rows(factor.shape, i * third, (i + 1) * third) for i in range(3)]
    return nnj.ViewFactor([(view, factor.rows(view.start, view.stop)) for view in views])


class _Product:
    """S (x) A at a weight, or at a view of it, over some chunks of columns.

    Args:
        name: of the weight.
        kron: of the first chunk.
        bias: the name of the bias that is one more input, and which rows of it, if any.
        only_alive: whether places at which all columns are zero do not count.
    """

    def __init__(
        self,
        name: str,
        kron: Any,
        bias: tuple[str, tuple[int, int] | None] | None,
        only_alive: bool,
    ):
        self.name, self.kron, self.bias = name, kron, bias
        self.left = kron.outer_v()
        self.alive: Tensor | None = kron.alive() if only_alive else None
        kron.forget_columns()  # or those of all layers would be there at once

    def plus(self, other: _Product) -> _Product:
        self.left = self.left + other.left
        if self.alive is not None and other.alive is not None:
            self.alive = self.alive | other.alive
        return self

    def kept(self, scale: float, forward: bool) -> dict[str, Any]:
        count = self.kron.count(self.alive)
        right = self.kron.mean_u(self.alive, ones=self.bias is not None)
        left = self.left if scale == 1 else self.left * scale
        if forward:
            left = torch.eye(left.shape[1], dtype=left.dtype, device=left.device) * count
            left = left.expand_as(self.left).clone()
        view = self.kron.view
        return {
            "weight": self.name,
            "bias": self.bias,
            "view": None if view is None else vars(view),
            "inputs_first": self.kron.inputs_first,
            "left": left,
            "right": right,
            "count": count,
        }


class Rest:
    """The exact block of parameters that are in no matrix product, or its diagonal."""

    def __init__(self, factors: dict[str, nnj.Factor], limit: float):
        self.names, every = list(factors), list(factors.values())
        size = sum(math.prod(f.shape) for f in every)
        self.form = "block" if size <= limit else "diagonal"
        if self.form == "block":
            self.value = nnj.joint_gram(every)
        else:
            self.value = torch.cat([f.square_sum().flatten() for f in every])

    def plus(self, other: Rest) -> Rest:
        self.value = self.value + other.value
        return self

    def kept(self, scale: float, forward: bool) -> dict[str, Any]:
        return {"names": self.names, self.form: self.value if scale == 1 else self.value * scale}


class OfOutput(Rest):
    """The GGN of half the summed squares of a layer's output, in its scale and shift: a diagonal
    in each, and one between them.
    """

    def __init__(self, factors: dict[str, nnj.Factor], limit: float):
        self.names, every = list(factors), list(factors.values())
        sizes = [math.prod(f.shape) for f in every]
        self.form = "block" if sum(sizes) <= limit else "diagonal"
        if self.form == "diagonal":
            self.value = torch.cat([_squares(f, f) for f in every])
            return
        some = every[0]
        self.value = torch.zeros(sum(sizes), sum(sizes), dtype=some.dtype, device=some.device)
        rows = self.value.split(sizes)
        for f, strip in zip(every, rows, strict=True):
            for g, block in zip(every, strip.split(sizes, 1), strict=True):
                block.diagonal().copy_(_squares(f, g))


def _squares(one: nnj.Factor, other: nnj.Factor) -> Tensor:
    """Errors: `NNJError` where it is not known."""
    found = one.output_squares(other) if one.shape == other.shape else None
    if found is None:
        raise nnj.NNJError(
            "kfac: two parameters of a module scale its output along other axes, so that "
            "fisher='forward' has no diagonal between them. Collect with fisher='exact', or name "
            "other modules"
        )
    return found


def _joint(
    krons: Sequence[tuple[str, Any]], biases: Mapping[str, Sequence[Any]]
) -> dict[int, tuple[str, tuple[int, int] | None]]:
    """Of which products, by number, a bias, or some of its rows, is one more input. A bias is so
    altogether or not at all.
    """
    found: dict[int, tuple[str, tuple[int, int] | None]] = {}
    for name, parts in biases.items():
        mine: dict[int, tuple[str, tuple[int, int] | None]] = {}
        for part in parts:
            for i, (_, kron) in enumerate(krons):
                # a weight of its own may serve some rows of a bias, as of attention's projections
                same = _rows(kron.view) in (None, _rows(part.view))
                if i not in found and i not in mine and same and kron.takes(part):
                    mine[i] = name, _rows(part.view)
                    break
        if len(mine) == len(parts):
            found |= mine
    return found


def _rows(view: Any) -> tuple[int, int] | None:
    """The outputs that a view has, of a weight or of a bias; None for all of them."""
    return None if view is None or view.whole else (view.start, view.stop)


def _merged(one: Any, other: Any, same_places: bool) -> Any:
    """S of both added, and the mean of A over both, or that of either if places are the same."""
    facts = [(kept["shapes"], [form_of(part) for part in kept["parts"]]) for kept in (one, other)]
    if facts[0] != facts[1]:
        raise nnj.NNJError(
            "kfac: a module was used as other matrix products in another pass, so that their "
            "factors cannot be added. Collect for each in a `with` of its own"
        )
    parts = zip(one["parts"], other["parts"], strict=True)
    return {"shapes": one["shapes"], "parts": [_plus(a, b, same_places) for a, b in parts]}


def _same(one: Any, other: Any) -> Any:
    """Of two losses that see the same inputs, which count once. Errors: `NNJError` for others."""
    (mine, form), (theirs, other_form) = (tree_flatten(kept["parts"]) for kept in (one, other))
    pairs = zip(mine, theirs, strict=False)
    if form != other_form or any(bool((torch.as_tensor(a != b)).any()) for a, b in pairs):
        raise nnj.NNJError(
            "kfac: two losses of the same samples see other inputs of a module, so that with "
            "fisher='forward' some would count once and some twice. Collect it in the pass of one "
            "loss"
        )
    return one


def form_of(part: dict[str, Any]) -> dict[str, Any]:
    """A part without its numbers."""
    return {
        key: tuple(value.shape) if isinstance(value, Tensor) else value
        for key, value in part.items()
    }


def _plus(a: dict[str, Any], b: dict[str, Any], same_places: bool) -> dict[str, Any]:
    for form in ("block", "diagonal"):
        if form in a:
            return {**a, form: a[form] + b[form]}
    both = a["count"] + b["count"]
    right = (a["right"] * a["count"] + b["right"] * b["count"]) / both.clamp(min=1)
    count = torch.maximum(a["count"], b["count"]) if same_places else both
    return {**a, "left": a["left"] + b["left"], "right": right, "count": count}


def _matrix(part: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> nnj.matrices.Part:
    """The block of a part, over a module's own parameters of some shapes."""
    if "names" in part:
        own = {name: shapes[name] for name in part["names"]}
        form = "block" if "block" in part else "diagonal"
        return exact_part(own, form, part[form])
    seen = seen_at(part, shapes)
    own = {name: shapes[name] if s.view is None else s.view.inner for name, s in seen.items()}
    sides = part["left"], part["right"]
    left, right = reversed(sides) if part["inputs_first"] else sides
    return nnj.matrices.Part(nnj.matrices.Kronecker(own, left, right), seen)


def exact_part(own: Mapping[str, tuple[int, ...]], form: str, value: Tensor) -> nnj.matrices.Part:
    """The exact block of some parameters, or its diagonal."""
    matrix: nnj.matrices.Matrix
    if form == "block":
        matrix = nnj.matrices.Dense(own, value, check=False)
    else:
        matrix = nnj.matrices.Diagonal(own, value)
    return nnj.matrices.Part(matrix, {name: nnj.matrices.Seen(name) for name in own})


def seen_at(
    part: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, nnj.matrices.Seen]:
    """Which entries of the weight, and of the bias, a product is at."""
    view = None if part["view"] is None else nnj.View(**part["view"])
    seen = {part["weight"]: nnj.matrices.Seen(part["weight"], view)}
    if part["bias"] is not None:
        bias, rows = part["bias"]
        some = None if rows is None else nnj.View.rows(shapes[bias], *rows)
        seen[bias] = nnj.matrices.Seen(bias, some)
    return seen


def _check(option: str, value: Any, *known: str) -> None:
    """Errors: `NNJError` for a value that is none of those known."""
    if value not in known:
        raise nnj.NNJError(f"{option}={value!r}, expected one of {', '.join(map(repr, known))}")


@nnj.hookimpl
def nnj_register_quantities(register: nnj.RegisterQuantity) -> None:
    register("kfac", KFAC)
