"""Fits of parts of one data set as one: sums are added, rows put one behind the other, and other
states merged by their quantity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnj.collecting.contribution import asked
from nnj.collecting.quantity import WHOLE, Quantity, Whole, of_dtype, times
from nnj.errors import NNJError


def check_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Errors: `NNJError` for facts of which one differs."""
    for what, fact in one.items():
        if fact != other[what]:
            raise NNJError(
                f"fits with other {what} are not of parts of one data set. Merge those of one "
                "model, with the same loss, scale and options"
            )


class Both:
    """Two fits that become one.

    Args:
        rows: of how many samples each has rows.
        totals: what each was divided by.
        total: what the result is divided by.
        samples: how many there are in all.
    """

    def __init__(
        self, rows: tuple[int, int], totals: tuple[float, float], total: float, samples: int
    ):
        self.rows, self.totals, self.total, self.samples = rows, totals, total, samples

    def simple(
        self, quantity: Quantity, one: Mapping[str, Tensor], other: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Sums, or rows of samples, by the names of their places."""
        degree = quantity.degree or 0
        found = {}
        for name in dict.fromkeys([*one, *other]):
            parts = [
                None if name not in values else times(values[name], (mine / self.total) ** degree)
                for values, mine in zip((one, other), self.totals, strict=True)
            ]
            found[name] = self._joined(parts) if quantity.per_sample else _sum(parts)
        return found

    def _joined(self, parts: list[Tensor | None]) -> Tensor:
        """Rows, with zeros where no sample of one of both reached the place."""
        like = next(part for part in parts if part is not None)
        return torch.cat(
            [
                like.new_zeros(n, *like.shape[1:]) if part is None else part
                for part, n in zip(parts, self.rows, strict=True)
            ]
        )

    def states(
        self, name: str, quantity: Quantity, one: Mapping[str, Any], other: Mapping[str, Any]
    ) -> dict[str, Any]:
        """States by the names of their places."""
        if quantity.per_sample:
            places = dict.fromkeys([*one, *other])
            return {place: self._joined([one.get(place), other.get(place)]) for place in places}
        found = dict(one)
        for place, state in other.items():
            known = place in one
            found[place] = asked(name, quantity.merge, one[place], state) if known else state
        return found

    def results(
        self,
        name: str,
        quantity: Quantity,
        states: Mapping[str, Any],
        before: Mapping[str, Any] | None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What states are at their places, and on the context; in the dtypes of those before."""
        samples, factor = self.samples, 1 / self.total
        degree, before = quantity.degree or 0, before or {}
        values = {}
        for place, state in states.items() if quantity.place is not Whole else ():
            made = times(asked(name, quantity.finish, state, samples), factor**degree)
            known = before.get(place)
            values[place] = of_dtype(made, known.dtype if isinstance(known, Tensor) else None)
        places = {WHOLE: states[""]} if "" in states and quantity.place is Whole else states
        totals = asked(name, quantity.totals, places, samples)
        return values, {key: times(t, factor**power) for key, (t, power) in totals.items()}


def _sum(parts: list[Tensor | None]) -> Tensor:
    there = [part for part in parts if part is not None]
    return there[0] if len(there) == 1 else there[0] + there[1]
