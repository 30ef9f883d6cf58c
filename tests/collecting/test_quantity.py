"""What a stranger's quantity is asked, and told: every column once, how many there are, and to
finish; and its states over chunks, passes, batches and compiled passes.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.registry.manager import PluginManager, manager, use
from tests.support import fitting
from tests.support.collecting import X, Y, pair
from tests.support.quantities import JointBlock, LargestGradient, Squares


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


@pytest.mark.parametrize("form, shown", [("sums", r"\(3, 4\)"), ("number", "float")])
def test_rows_that_are_none(form, shown):
    """Fewer rows than samples would be taken for those of the first ones."""

    class Rows(nnj.Quantity):
        per_sample = True

        def parameter(self, factor, total_columns):
            found = factor.square_sum()
            return found if form == "sums" else float(found.sum())

    model, loss = nnj.extend(nn.Linear(4, 3)), nnj.extend(nn.CrossEntropyLoss())
    message = (
        r"^the quantity 'rows' failed with ValueError: results that are per_sample have a row for "
        rf"each sample, \(5, \.\.\.\), and here is {shown}$"
    )
    with pytest.raises(nnj.NNJError, match=message), nnj.collect(Rows()):
        loss(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    assert model.weight.grad is not None


def test_an_option_without_a_default():
    former = use(mine := PluginManager())

    class Needs(nnj.Quantity):
        def __init__(self, k: int):
            self.k = k

        def parameter(self, factor, total_columns):
            return self.k * factor.square_sum()

    class Plugin:
        @nnj.hookimpl
        def nnj_register_quantities(self, register):
            register("needs", Needs)

    mine.register(Plugin(), "needing")
    try:
        with pytest.raises(nnj.NNJError, match=r"be given: nnj\.collect\('needs', k=\.\.\.\)$"):
            nnj.collect("needs")
        assert nnj.collect("needs", k=2).request.quantities["needs"].k == 2
    finally:
        use(former)


# -- quantities that are given themselves ----------------------------------------------------------


def given() -> tuple[nn.Module, nn.Module]:
    return nnj.extend(fitting.mlp().eval()), nnj.extend(nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.parametrize("memory", [1, 2**28])
def test_a_joint_block(memory):
    model, loss = given()
    with nnj.collect(JointBlock(), "ggn_block", "ggn_diag", memory=memory) as context:
        for part in (slice(0, 3), slice(3, fitting.N)):
            loss(model(fitting.X[part]), fitting.CLASSES[part]).backward()
            inside = context.joint_block
    assert torch.equal(context.joint_block, inside)
    p = sum(q.numel() for q in model.parameters())
    assert context.joint_block.shape == (p, p)
    diagonal = torch.cat([q.ggn_diag.flatten() for q in model.parameters()])
    torch.testing.assert_close(context.joint_block.diagonal(), diagonal)
    first = model[0].ggn_block
    torch.testing.assert_close(context.joint_block[: len(first), : len(first)], first)
    torch.testing.assert_close(context.joint_block, _dense_ggn(model))
    assert torch.equal(context.matrix("joint_block").dense(), context.joint_block)


def _dense_ggn(model: nn.Module) -> Tensor:
    params = dict(model.named_parameters())
    f = lambda params, x: torch.func.functional_call(model, params, (x[None],))[0]
    plain = {name: p.detach() for name, p in params.items()}
    j = torch.func.vmap(torch.func.jacrev(f), (None, 0))(plain, fitting.X)
    j = torch.cat([t.flatten(2) for t in j.values()], 2)
    prob = torch.softmax(model(fitting.X).detach(), 1)
    h = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", j, h, j)


def test_results_are_finished_once_all_passes_are_added():
    model, loss = given()
    with nnj.collect(Squares(root=True), "ggn_diag"):
        for part in (slice(0, 3), slice(3, fitting.N)):
            loss(model(fitting.X[part]), fitting.CLASSES[part]).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.squares, p.ggn_diag.sqrt())


def test_a_merge_of_its_own():
    model, loss = given()
    with nnj.collect(LargestGradient(), "batch_grad") as context:
        for part in (slice(0, 3), slice(3, fitting.N)):
            loss(model(fitting.X[part]), fitting.CLASSES[part]).backward()
    largest = [p.batch_grad.abs().max() for p in model.parameters()]
    assert [p.largest_gradient for p in model.parameters()] == largest
    assert context.largest_of_all == max(largest) and context.entries == 4
    with pytest.raises(AttributeError, match=r"has no 'x'\. It has largest_of_all, entries$"):
        _ = context.x


def test_compiled_as_eager():
    model, loss = given()
    asked = (JointBlock(), LargestGradient(), Squares(root=True))
    with nnj.collect(*asked) as context:
        loss(model(fitting.X), fitting.CLASSES).backward()
    eager = [(p.largest_gradient, p.squares) for p in model.parameters()]
    step = nnj.compile(model, loss, *asked, backend="aot")
    for _ in range(4):
        _, results = step(fitting.X, fitting.CLASSES)
    assert step.reasons == [] and step.replays >= 1
    torch.testing.assert_close(results["joint_block"], context.joint_block)
    assert results.context["largest_of_all"] == context.largest_of_all
    for p, (largest, squares) in zip(model.parameters(), eager, strict=True):
        torch.testing.assert_close(p.largest_gradient, largest)
        torch.testing.assert_close(p.squares, squares)


def test_two_losses_of_what_is_quadratic():
    model, loss = given()
    message = r"^largest_gradient: two losses of the same samples are in one backward pass"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect(LargestGradient()):
        z = model(fitting.X)
        (loss(z, fitting.CLASSES) + loss(2 * z, fitting.CLASSES)).backward()
    with nnj.collect(JointBlock()) as context:
        z = model(fitting.X)
        (loss(z, fitting.CLASSES) + loss(2 * z, fitting.CLASSES)).backward()
    both = context.joint_block
    with nnj.collect(JointBlock()) as context:
        loss(model(fitting.X), fitting.CLASSES).backward()
        loss(2 * model(fitting.X), fitting.CLASSES).backward()
    torch.testing.assert_close(both, context.joint_block)


class Counted(nnj.Quantity):
    """A state with a fact that must be the same in all passes."""

    source = "gradient"

    def parameter(self, factor: nnj.Factor, total_columns: int) -> Any:
        return {"n": factor.n, "sum": factor.dense()[0].sum(0)}


def test_passes_of_other_forms():
    model, loss = given()
    message = r"^states of two passes have other facts .* Collect over models and losses that do"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect(Counted()):
        for n in (5, 2):
            loss(model(fitting.X[:n]), fitting.CLASSES[:n]).backward()


@pytest.mark.parametrize("inner_first", [True, False])
def test_all_parameters_are_in_the_order_of_the_model(inner_first):
    """Also where a part of it, or another model before it, was extended on its own."""
    before = nnj.extend(fitting.mlp().eval())
    model, loss = fitting.mlp().eval(), nnj.extend(nn.CrossEntropyLoss())
    for part in (model[3], model) if inner_first else (model, model[3]):
        nnj.extend(part)
    with nnj.collect(JointBlock(), "ggn_diag") as context:
        loss(model(fitting.X), fitting.CLASSES).backward()
    diagonal = torch.cat([p.ggn_diag.flatten() for p in model.parameters()])
    torch.testing.assert_close(context.joint_block.diagonal(), diagonal)
    message = r"^what is joint over all parameters is asked of two losses or passes that reach oth"
    for passes in (1, 2):
        with pytest.raises(nnj.NNJError, match=message), nnj.collect(JointBlock()):
            losses = [loss(m(fitting.X), fitting.CLASSES) for m in (before, model)]
            for one in [sum(losses)] if passes == 1 else losses:
                one.backward()
