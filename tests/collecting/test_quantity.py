"""What a stranger's quantity is asked, and told: every column once, how many there are, and to
finish.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.registry.manager import manager, use
from tests.support.collecting import X, Y, pair


class Counts(nnj.Quantity):
    """The numbers of columns that came, and that were announced."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, count_source: str = "exact"):
        self.source = count_source
        self.draws = 3

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        self.seen.append((factor.k, total_columns))
        return factor.square_sum()


class Trace(nnj.Quantity):
    """The square root of the trace of a module's block."""

    def module(self, factors: list[nnj.Factor | None], params: list[nn.Parameter]) -> Tensor:
        return sum(f.square_sum().sum() for f in factors if f is not None)

    def finish(self, state: Any, samples: int) -> Tensor:
        return state.sqrt()


class Leaves(nnj.Quantity):
    """Ends the program."""

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Tensor:
        raise SystemExit(3)


@pytest.fixture
def strange():
    former = manager()
    mine = copy.copy(former)

    class Plugin:
        @nnj.hookimpl
        def nnj_register_quantities(self, register):
            register("counts", Counts)
            register("trace", Trace)
            register("weight", Trace)
            register("in_features", Trace)
            register("leaves", Leaves)

    former.load()
    mine.register(Plugin(), "strange")
    use(mine)
    Counts.seen.clear()
    yield
    use(former)


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("source, columns", [("exact", 2), ("signs", 3), ("gradient", 1)])
def test_every_column_once_of_as_many_as_were_announced(strange, source, columns, memory):
    model, loss = pair()
    with nnj.collect("counts", "batch_grad", count_source=source, memory=memory):
        loss(model(X), Y).backward()
    parameters = len(list(model.parameters()))
    assert {total for _, total in Counts.seen} == {columns}
    assert sum(k for k, _ in Counts.seen) == columns * parameters


def test_results_of_modules_are_finished(strange):
    model, loss = pair()
    with nnj.collect("trace", "ggn_diag"):
        loss(model(X), Y).backward()
    for m in (model.one, model.two):
        total = sum(p.ggn_diag.sum() for p in m.parameters())
        torch.testing.assert_close(m.trace, total.sqrt())


@pytest.mark.parametrize("both", [False, True])
def test_one_of_two_must_be_defined(both):
    methods = {"parameter": Counts.parameter, "module": Trace.module} if both else {}
    with pytest.raises(TypeError, match=r"^Odd must define one of parameter, module, joint$"):
        type("Odd", (nnj.Quantity,), methods)


@pytest.mark.parametrize("name", ["weight", "in_features"])
def test_a_name_that_the_module_computes_with(strange, name):
    """The next forward pass would take the result for its weight."""
    model, loss = pair()
    message = (
        rf"^the quantity '{name}', of plugin 'strange', would overwrite the {name} of 'one'\. "
        "Register it under another name$"
    )
    with pytest.raises(nnj.PluginError, match=message), nnj.collect(name):
        loss(model(X), Y).backward()
    assert isinstance(model.one.weight, nn.Parameter) and model.one.in_features == 4


def test_a_quantity_that_would_end_the_program(strange):
    model, loss = pair()
    message = r"^the quantity 'leaves', of plugin 'strange', failed with SystemExit: 3$"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("leaves"):
        loss(model(X), Y).backward()
