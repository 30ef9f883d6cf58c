"""Every model of the table: what a quantity is given at matrices is thin, but for what is listed
here with its reason. (At a vector nothing is thinner than B.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import nnj
from nnj.jacobians.factor import DenseFactor, ScaledFactor, SumFactor
from nnj.jacobians.views import ViewFactor
from tests.support.cases import CASES
from tests.support.collecting import extended
from tests.support.oracle import run
from tests.support.slow import few

# What is dense, and why: by the reason the cases and their parameters.
POSITIONS = "its rows stand at places that all samples share: B is no larger than the columns"
ROWS = "some input of it is the same for all samples: columns come there by sample"
COMPUTED = "the weight is computed from it, and columns come to that by sample"
SOME_ENTRIES = "the weight is some of its columns, or every second row: computed, too"
FIRST_OPERAND = "a product's first operand, with the samples in columns of the second"
BATCH = "a batch of matrices, each for a sample or a model of an ensemble"
TABLE = "rows of a table by autograd's nodes, which have no rule"
FALLBACK = "the fallback speaks for the module, and forms J"
NODE = "a node that no rule describes: of three axes, scaled, or trilinear"
PACKED = "packed rows are those of more or fewer samples at each step"
OPAQUE = "a scripted graph, whose nodes are not autograd's"

BY_REASON: dict[str, dict[str, str]] = {
    POSITIONS: {
        "class-token-and-places": "places",
        "distances": "centres",
        "learned-queries": "q",
        "learned-queries-through-a-layer": "queries",
        "lm-ignored": "wpe.weight",
        "lm-shifted": "wpe.weight",
        "lm-tied": "wpe.weight",
        "lm-transposed": "wpe.weight",
        "lm-untied": "wpe.weight",
        "masked-tokens-lm": "wpe.weight",
        "parameter-as-many-as-samples": "code",
        "positions-as-many-as-samples": "wpe.weight",
        "positions-of-arange": "wpe.weight",
        "transformer": "places",
    },
    ROWS: {
        "bare-on-a-constant": "w",
        "bare-on-bare": "w table",
        "bare-table-of-classes": "w table",
        "learned-queries-through-a-layer": "q.weight",
        "packed-gru": "cell.weight_hh_l0",
        "packed-lstm": "cell.weight_hh_l0",
        "packed-rnn": "cell.weight_hh_l0",
        "parameter-as-many-as-samples": "one.weight",
        "parameter-through-layers": "one.weight two.weight",
    },
    COMPUTED: {
        "bare-convolution-computed": "w1 w2",
        "bare-low-rank-merged": "w a b",
        "dropout-on-weights": "head.weight",
        "instance-forward": "two.weight",
        "orthogonal": "0.parametrizations.weight.original",
        "parametrization-of-ones-own": "0.parametrizations.weight.original",
        "spectral-norm": "0.parametrizations.weight.original",
        "subclass-of-conv": "0.weight",
        "subclass-with-property": "1.raw",
        "subclass-with-property-of-the-same-name": "1.weight",
        "weight-norm": "0.parametrizations.weight.original1",
        "weight-norm-conv": "0.parametrizations.weight.original1",
    },
    SOME_ENTRIES: {
        "bare-columns": "w",
        "bare-step": "w",
        "bare-used-twice-transposed": "w",
    },
    FIRST_OPERAND: {
        "batch-in-the-last-axis": "w1 w2",
        "transposed-batch": "w",
    },
    BATCH: {
        "bare-batched-product": "w",
        "einsum-ensemble": "w2",
    },
    TABLE: {
        "functional-embedding": "table",
        "indexed-parameter": "table",
    },
    FALLBACK: {
        "bare-computed": "w v",
        "bare-rows-of-tokens": "w1 w2 w3",
    },
    NODE: {
        "bare-convolution-in-three-axes": "w",
        "bare-scaled-product": "w",
        "bilinear": "both.weight",
    },
    PACKED: {
        "lstm-packed": "cell.weight_ih_l0 cell.weight_hh_l0",
    },
    OPAQUE: {
        "scripted-part": "0.one.weight 0.two.weight 0.three.weight",
    },
}
DENSE: dict[str, set[str]] = {}
for listed in BY_REASON.values():
    for of_case, parameters in listed.items():
        DENSE.setdefault(of_case, set()).update(parameters.split())


class Thick(nnj.Quantity):
    """Notes the parameters whose factor is dense, or made of a dense one."""

    place = Tensor

    def __init__(self) -> None:
        self.seen: set[Tensor] = set()
        self.found: set[Tensor] = set()

    def add(self, state: Any, factors: Any, params: Any, total_columns: int) -> Any:
        for factor, p in zip(factors, params, strict=True):
            self.seen.add(p)
            if any(isinstance(part, DenseFactor) for part in parts(factor)):
                self.found.add(p)
        return torch.zeros(())


def parts(factor: nnj.Factor) -> Iterator[nnj.Factor]:
    """A factor, and all those that it is made of."""
    yield factor
    inner: list[nnj.Factor] = []
    if isinstance(factor, SumFactor):
        inner = factor.parts
    elif isinstance(factor, ViewFactor):
        inner = [part for _, part in factor.parts]
    elif isinstance(factor, ScaledFactor):
        inner = [factor.factor]
    for part in inner:
        yield from parts(part)


def is_matrix(p: Tensor) -> bool:
    return sum(size > 1 for size in p.shape) > 1


@pytest.mark.parametrize("name", few(CASES))
def test_matrices_are_given_thin_factors(name: str) -> None:
    case, thick = CASES[name], Thick()
    model, losses = extended(case)
    with nnj.collect(thick):
        run(case, model, losses).backward()
    assert thick.seen
    found = {n for n, p in model.named_parameters() if p in thick.found and is_matrix(p)}
    assert found == DENSE.get(name, set())


def test_what_is_listed_is_there() -> None:
    assert DENSE.keys() <= CASES.keys()


def test_a_dense_factor_is_seen() -> None:
    """Wherever it stands in another one."""
    dense = DenseFactor(torch.ones(2, 2, 3, 4))
    for factor in (dense, dense.scale(torch.ones(3, 4)), SumFactor([dense, dense])):
        assert any(isinstance(part, DenseFactor) for part in parts(factor))
