"""What nnj.fit gives: quantities of a whole data set by the names of parameters and modules, to be
kept, saved, merged, flattened and made matrices of.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnj.collecting import quantity_file
from nnj.collecting.fit_merge import Both, check_alike
from nnj.collecting.joint_matrix import Names, checked_matrix, matrix_of_places
from nnj.collecting.quantity import Quantity, Whole, is_simple
from nnj.collecting.whole_fit import has_parts, of_all_ranks, of_mesh
from nnj.distributed.ranks import Ranks
from nnj.errors import NNJError
from nnj.matrices.load import read_packed, unpacked
from nnj.matrices.matrix import Matrix, packed
from nnj.recording.placement import whole_of
from nnj.recording.tensor_parallel import is_distributed

_FORMAT = 4
_FACTS: dict[str, Any] = {  # what is saved beside the values, and of which type it is
    "samples": int,
    "rows": int,
    "runs": list,
    "scale": str,
    "total": (int, float),
    "loss": str,
    "likelihood": str,
    "terms": (int, float),
    "loss_value": (int, float),
    "trace": (int, float),
    "deficit": (int, float),
}


class Origin(NamedTuple):
    """What a fit was made of, and no file holds.

    Attributes:
        model: that was fitted.
        forward, target: how a batch is read, as `nnj.fit` takes them.
        versions: of the parameters, as `versions_of` gives them.
    """

    model: nn.Module
    forward: Callable[[nn.Module, Any], Any] | None
    target: str | Callable[[Any], Any] | None
    versions: list[tuple[Tensor, int]]


def versions_of(parameters: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Parameters, with how often each was written to."""
    return [(p, p._version) for p in parameters]


class Fit(Mapping[str, Any]):
    """`fit["ggn_diag"]["0.weight"]`: quantities by name, each a dict from names of parameters, or
    of modules, to tensors or matrices. `fit["ggn"]`, which belongs to all parameters together, is a
    tensor.

    Parameters stand in the order of `model.named_parameters()`, and are those that require grad;
    modules stand in that of `model.named_modules()`.

    Args:
        values: of each quantity, results by the names of their places.
        quantities: by name.
        names: those of the parameters.
        states: of the quantities that are more than sums or rows, what results are made of, by the
            names of their places; "" is the place of all parameters together.
        context: see below.
        facts: see below.

    Attributes:
        samples: the number of samples.
        rows: of how many of them rows of per-sample quantities are here: over ranks those of this
            one.
        runs: over ranks, which runs it is of, by names that are the same on all ranks.
        scale: "sum" or "mean".
        total: what the sum over samples was divided by: 1 for a sum.
        loss: the name of the loss.
        likelihood: of which torch's loss is the negative logarithm: "categorical", "bernoulli" or
            "gaussian"; "" for any other loss.
        loss_value: the loss of the data set itself, summed or as its mean.
        terms: what the mean of the whole data set divides by: its rows or entries, or the sum of
            the weights of their classes; of other losses than torch's its samples.
        origin: the model and how batches were read; None of a fit that was read from a file, or
            merged of such.
        spread: over which group each rank has a part of it, as of a model that `fully_shard`
            shards; None where none has.
        context: by name, what belongs to all parameters together: tensors.
        trace: under tol=, that of the Hessians in the outputs, of the sum over samples.
        deficit: what was left out under tol=, as a part of that trace.
    """

    samples: int
    rows: int
    runs: list[str]
    scale: str
    total: float
    loss: str
    likelihood: str
    loss_value: float
    terms: float
    trace: float
    deficit: float

    def __init__(
        self,
        values: Mapping[str, dict[str, Any]],
        quantities: Mapping[str, Quantity | dict[str, Any]],
        names: Names,
        states: Mapping[str, dict[str, Any]],
        context: Mapping[str, Tensor],
        **facts: Any,
    ):
        self.values_of, self.context = dict(values), dict(context)
        self._quantities, self._names = dict(quantities), names
        self._states = dict(states)
        self.origin: Origin | None = None
        self.spread: Any = None
        for name in _FACTS:
            setattr(self, name, facts[name])

    def __getitem__(self, quantity: str) -> Any:
        for table in (self.values_of, self.context):
            if quantity in table:
                return table[quantity]
        raise KeyError(self._not_fitted(quantity))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.values_of, *self.context]))

    def __len__(self) -> int:
        return len({*self.values_of, *self.context})

    # -- what it is of -----------------------------------------------------------------------------

    @property
    def per_sample(self) -> tuple[str, ...]:
        """The quantities that have the samples in axis 0, in the order of the loader."""
        return tuple(name for name in self._quantities if self._kept(name)["per_sample"])

    def _kept(self, name: str) -> dict[str, Any]:
        quantity = self._quantities[name]
        return quantity if isinstance(quantity, dict) else quantity_file.written(quantity)

    def _quantity(self, name: str) -> Quantity:
        """Errors: `NNJError` for one that was not fitted, or whose class is not there."""
        if name not in self._quantities:
            raise NNJError(self._not_fitted(name))
        quantity = self._quantities[name]
        if isinstance(quantity, dict):
            quantity = self._quantities[name] = quantity_file.read(name, quantity)
        return quantity

    def _not_fitted(self, name: str) -> str:
        return f"{name!r} was not fitted. Fitted: {', '.join(self)}"

    # -- what is made of it ------------------------------------------------------------------------

    def vector(self, quantity: str) -> Tensor:
        """A quantity of parameters as one vector (P,), in the order of `model.parameters()`; (N, P)
        for one of each sample.

        Errors: `NNJError` for a quantity that is not in it, or does not belong to parameters.
        """
        if quantity not in self.values_of:
            raise NNJError(self._not_fitted(quantity))
        self._check_whole()
        kept = self._kept(quantity)
        if kept["place"] != "parameters":
            raise NNJError(
                f"{quantity!r} belongs to {kept['place']}, and has no vector of parameters. Use "
                f"fit[{quantity!r}][name]"
            )
        axis = 1 if kept["per_sample"] else 0
        flat = [  # also of parameters without axes, or without entries
            t.reshape(*t.shape[:axis], math.prod(t.shape[axis:]))
            for t in map(whole_of, self[quantity].values())
        ]
        return torch.cat(flat, axis)

    def matrix(self, quantity: str) -> Matrix:
        """A quantity as one matrix over all parameters in the order of `model.parameters()`: see
        `nnj.matrices`. Those that no sample reached are zero.

        Errors: `NNJError` for a quantity that is no matrix, or not in it.
        """
        asked_for = self._quantity(quantity)
        self._check_whole()
        if asked_for.place not in (Tensor, nn.Module):
            found = asked_for.matrix(self.context[quantity], self._names.shapes)
            return checked_matrix(quantity, found)
        return checked_matrix(
            quantity, matrix_of_places(asked_for, self.values_of[quantity], self._names)
        )

    def _check_whole(self) -> None:
        """Errors: `NNJError` where this rank has a part of it."""
        if self.spread is not None:
            raise NNJError(
                "this is the fit of a model that fully_shard shards, of which each rank has a part "
                "(DTensors, and the factors of some modules). Gather it (fit.whole(), on all "
                "ranks), or take what you need of it (fit[quantity][name].full_tensor())"
            )

    def whole(self) -> Fit:
        """All of it on each rank, of a model that `fully_shard` or tensor parallelism distributes:
        plain tensors and matrices, to be saved, merged, and made a posterior of, with `model=` one
        that is not distributed. Rows of per-sample quantities stay those of this rank where ranks
        split the data. A collective of all ranks of the model; what is whole comes back as it is.

        It takes the memory of the model on one process. Errors: `NNJError` where a rank has left.
        """
        values, states, context = self.values_of, self._states, {"": self.context}
        tables: list[Any] = [values, states, context]
        if self.spread is not None:
            ranks = Ranks(self.spread, "nnj.Fit.whole")
            local = lambda name: bool(name) and name in self.per_sample
            tables = [of_all_ranks(table, ranks, local) for table in tables]
        elif any(map(has_parts, (values, states, context))):
            assert self.origin is not None
            quantities = {name: self._quantity(name) for name in self._quantities}
            named = dict(self.origin.model.named_parameters())
            tables = [of_mesh(table, quantities, named) for table in (values, states)]
            tables.append({"": {key: whole_of(t) for key, t in self.context.items()}})
        else:
            return self
        order = {place: i for i, place in enumerate([*self._names.shapes, *self._names.own])}
        for table in tables[:2]:
            for name, kept in table.items():
                table[name] = {k: kept[k] for k in sorted(kept, key=lambda k: order.get(k, -1))}
        values, states, context = tables
        found = Fit(values, self._quantities, self._names, states, context[""], **self._facts())
        found.origin = self.origin
        return found

    @classmethod
    def merge(cls, fits: Sequence[Fit]) -> Fit:
        """That of all data that were fitted in parts, with one model and one loss: sums are added,
        rows are put one behind the other, and Kronecker factors add their factors and counts.

        It needs no process group: a job may read a part and save its fit, another one merge files.

        Errors: `NNJError` for fits of other models, losses, scales or quantities, for ekfac, of
        which each has a basis of its own, and for what two ranks give of one run, which is the
        whole on each.
        """
        fits = list(fits)
        for fit in fits:
            if not isinstance(fit, Fit):
                raise NNJError(f"Fit.merge takes nnj.Fits, not {type(fit).__name__}")
            fit._check_whole()
        if not fits:
            raise NNJError("Fit.merge takes a list of at least one nnj.Fit")
        return functools.reduce(Fit._merged, fits)

    def _merged(self, other: Fit) -> Fit:
        check_alike(self._facts_of_data(), other._facts_of_data())
        if {*self.runs} & {*other.runs}:
            raise NNJError(
                "these are fits of one run over ranks, each of which has all of its data. Save and "
                "merge that of one rank"
            )
        samples = self.samples + other.samples
        total = self.total + other.total if self.scale == "mean" else 1.0
        both = Both((self.rows, other.rows), (self.total, other.total), total, samples)
        values, states, context = {}, {}, dict[str, Tensor]()
        for name in self._quantities:
            quantity = self._quantity(name)
            if is_simple(quantity):
                values[name] = both.simple(quantity, self.values_of[name], other.values_of[name])
                continue
            states[name] = both.states(name, quantity, self._states[name], other._states[name])
            made, more = both.results(name, quantity, states[name], self.values_of.get(name))
            if quantity.place is not Whole:
                values[name] = made
            context |= more
        trace = self.trace + other.trace
        lost = self.deficit * self.trace + other.deficit * other.trace
        facts = self._facts() | {"samples": samples, "total": total, "trace": trace}
        facts["deficit"] = lost / trace if trace else 0.0
        facts["rows"], facts["runs"] = self.rows + other.rows, [*self.runs, *other.runs]
        values_of_loss = self.loss_value * self.total + other.loss_value * other.total
        facts["loss_value"] = values_of_loss / total
        facts["terms"] = self.terms + other.terms
        merged = Fit(values, self._quantities, self._names, states, context, **facts)
        merged.origin = self.origin or other.origin
        return merged

    def _facts_of_data(self) -> dict[str, Any]:
        """What fits of parts of one data set have in common."""
        quantities = {name: self._kept(name) for name in self._quantities}
        return {
            "parameters": self._names.shapes,
            "losses": (self.loss, self.likelihood),
            "scales": self.scale,
            "quantities": quantities,
        }

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to a file, which holds tensors and plain values alone.

        Errors: `NNJError` for what ranks have parts of, of which a file would have one.
        """
        self._check_whole()
        if any(is_distributed(t) for kept in self.values_of.values() for t in kept.values()):
            raise NNJError(
                "results under tensor parallelism are DTensors, of which this rank has a part. "
                "Save fit.whole(), which all ranks call"
            )
        kept = {
            "nnj.Fit": _FORMAT,
            "values": packed(self.values_of),
            "context": self.context,
            "states": self._states,
            "quantities": {name: self._kept(name) for name in self._quantities},
            "names": {"shapes": self._names.shapes, "own": self._names.own},
        }
        torch.save({**kept, **self._facts()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], map_location: Any = None) -> Fit:
        """Read what `save` wrote; no code in the file is run. Errors: `NNJError` for a file of
        another kind.
        """
        found = read_packed(path, map_location, _is_fit, "nnj.Fit", "Fit.save")
        facts = {name: found[name] for name in _FACTS}
        names = Names(found["names"]["shapes"], found["names"]["own"])
        values = unpacked(found["values"])
        return cls(values, found["quantities"], names, found["states"], found["context"], **facts)

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    def __repr__(self) -> str:
        lines = [f"Fit({self.samples} samples, scale={self.scale!r}, loss={self.loss})"]
        width = max(map(len, self), default=0)
        for name, found in self.values_of.items():
            what = self._kept(name)["place"]
            matrices = [m for m in found.values() if isinstance(m, Matrix)]
            numbers = sum(t.numel() for t in found.values() if isinstance(t, Tensor))
            of = f"{len(matrices)} matrices" if matrices else f"{numbers} numbers"
            lines.append(f"  {name:{width}}  {of} of {len(found)} {what}")
        for name, t in self.context.items():
            if name not in self.values_of:
                lines.append(f"  {name:{width}}  {t.numel()} numbers")
        return "\n".join(lines)


def _is_fit(found: Any) -> bool:
    """Whether what was read from a file is what `Fit.save` writes."""
    if not isinstance(found, dict) or found.get("nnj.Fit") != _FORMAT:
        return False
    tables = [found.get(part) for part in ("values", "context", "states", "quantities", "names")]
    if not all(isinstance(table, dict) for table in tables):
        return False
    values, _, _, quantities, names = (dict[str, Any](table or {}) for table in tables)
    return (
        all(isinstance(kept, dict) for kept in values.values())
        and all(isinstance(t, (Tensor, dict)) for kept in values.values() for t in kept.values())
        and all(map(quantity_file.is_written, quantities.values()))
        and names.keys() == {"shapes", "own"}
        and all(isinstance(found.get(name), kind) for name, kind in _FACTS.items())
    )
