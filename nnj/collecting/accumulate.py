"""Values of one collection from one loss, or from all losses of one backward pass, and how they add
up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnj.collecting.quantity import Quantity, asked
from nnj.loss_hessian.column_selection import ColumnSelection


class Contribution:
    """Values of one collection from one loss, or from all losses of one backward pass."""

    def __init__(self, calls: frozenset[int], n: int):
        self.calls, self.n = calls, n  # the forward calls that made the samples, and their number
        self.values: dict[str, dict[int, Any]] = {}
        self.known: dict[int, Any] = {}  # every parameter and module that may hold a result
        self.trace = self.dropped = 0.0  # of the Hessians in the outputs, under a tolerance
        self.columns = 0  # how many exact ones

    def add(self, name: str, holder: Any, value: Any) -> None:
        mine = self.values.setdefault(name, {})
        mine[id(holder)] = mine[id(holder)] + value if id(holder) in mine else value

    def selected(self, selection: ColumnSelection) -> None:
        """Write down what walks of the exact columns."""
        self.trace, self.dropped, self.columns = selection.trace, selection.dropped, selection.k

    def finish(self, quantities: dict[str, Quantity]) -> None:
        """Turn sums of contributions into results."""
        for name, quantity in quantities.items():
            mine = self.values.get(name, {})
            for key in mine:
                mine[key] = asked(name, quantity.finish, mine[key])

    def value(self, name: str, holder: Any) -> Tensor | None:
        return self.values.get(name, {}).get(id(holder))

    def holders(self, modules: bool) -> list[Any]:
        return [h for h in self.known.values() if isinstance(h, nn.Module) == modules]

    @staticmethod
    def merge(parts: list[Contribution], per_sample: set[str]) -> Contribution:
        """The sum over the losses of one pass; per-sample values of different forward calls are put
        one behind the other.
        """
        groups: list[Contribution] = []
        for part in sorted(parts, key=lambda c: max(c.calls, default=0)):
            same = next(
                (
                    g
                    for g in groups
                    if g.n == part.n and (g.calls & part.calls or g.calls == part.calls)
                ),
                None,
            )
            if same is None:
                groups.append(part)
                continue
            same.calls |= part.calls
            same.known |= part.known
            for name, values in part.values.items():
                for key, value in values.items():
                    same.add(name, part.known[key], value)
        whole = Contribution(
            frozenset().union(*[g.calls for g in groups]), sum(g.n for g in groups)
        )
        for group in groups:
            whole.known |= group.known
        whole.trace, whole.dropped = sum(p.trace for p in parts), sum(p.dropped for p in parts)
        whole.columns = max((p.columns for p in parts), default=0)
        for name in {name for g in groups for name in g.values}:
            for key in {key for g in groups for key in g.values.get(name, {})}:
                found = [(g, g.values.get(name, {}).get(key)) for g in groups]
                if name in per_sample:
                    like = next(v for _, v in found if v is not None)
                    value = torch.cat(
                        [like.new_zeros(g.n, *like.shape[1:]) if v is None else v for g, v in found]
                    )
                    whole.add(name, whole.known[key], value)
                    continue
                for _, v in found:
                    if v is not None:
                        whole.add(name, whole.known[key], v)
        return whole
