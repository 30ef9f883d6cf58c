"""Quantities of a stranger, which are given themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nnj


class Squares(nnj.Quantity):
    """The diagonal of the GGN, and its root."""

    degree = 1

    def __init__(self, root: bool = False):
        self.root = root

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        return factor.square_sum()

    def finish(self, state: Tensor, samples: int) -> Tensor:
        return state.sqrt() if self.root else state

    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Diagonal(shapes, result.flatten())


class JointBlock(nnj.Quantity):
    """The GGN of all parameters together."""

    degree = 1

    def joint(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor:
        return nnj.joint_gram(factors, [p.shape for p in params])

    def matrix(self, result: Tensor, shapes: Mapping[str, Sequence[int]]) -> nnj.matrices.Matrix:
        return nnj.matrices.Dense(shapes, result)


class LargestGradient(nnj.Quantity):
    """The largest entry of a sample's gradient: neither a sum nor rows. States have plain facts."""

    source = "gradient"
    degree = 1
    quadratic = True

    def start(self, place: Any, params: list[nn.Parameter]) -> dict[str, Any]:
        return {"entries": params[0].numel(), "largest": torch.zeros(()), "samples": 0}

    def add(
        self,
        state: dict[str, Any],
        factors: list[nnj.Factor | None],
        params: list[nn.Parameter],
        total_columns: int,
    ) -> dict[str, Any]:
        (factor,) = factors
        assert factor is not None
        largest = factor.dense().abs().max()
        return {**state, "largest": largest, "samples": state["samples"] + factor.n}

    def merge(self, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {
            "entries": one["entries"],
            "largest": torch.maximum(one["largest"], other["largest"]),
            "samples": one["samples"] + other["samples"],
        }

    def finish(self, state: dict[str, Any], samples: int) -> Tensor:
        assert state["samples"] == samples
        return state["largest"]

    def totals(self, states: Mapping[Any, Any], samples: int) -> dict[str, tuple[Tensor, int]]:
        every = torch.stack([state["largest"] for state in states.values()])
        return {"largest_of_all": (every.max(), 1), "entries": (torch.tensor(every.numel()), 0)}
