"""Several backward passes, and passes of every kind, in one collect or in several."""

from __future__ import annotations

import contextlib
import copy
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.collecting import passes
from tests.support.cases import CASES, MLP, Case, vectors
from tests.support.collecting import QUANTITIES, X, Y, base, collected, extended, intact, pair, same
from tests.support.oracle import Truth, build, close, data_of


def test_passes_add_up_as_grad_does():
    model, loss = pair()
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        for part in parts:
            loss(model(X[part]), Y[part]).backward()
    each = [Truth(base(data=lambda part=part: (X[part], Y[part]))) for part in parts]
    same(model, {n: sum(t.diag(n) for t in each) for n, _ in model.named_parameters()})
    same(
        model,
        {n: torch.cat([t.batch_grad(n) for t in each]) for n, _ in model.named_parameters()},
        "batch_grad",
    )
    names = ["two.weight", "two.bias"]
    assert close(model.two.ggn_block, sum(t.block(names) for t in each)) == ""


def test_training_goes_on_inside():
    """Each pass is taken at the parameters that it had, and the optimiser sees the gradients that
    it sees without nnj.
    """
    model, loss = pair()
    alone = build(base())
    optimisers = [torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (model, alone)]
    total: dict[str, Tensor] = {}
    with nnj.collect("ggn_diag"):
        for part in (slice(0, 3), slice(3, 6), slice(0, 6)):
            case = base(data=lambda part=part: (X[part], Y[part]))
            before = copy.deepcopy(alone.state_dict())
            moved = Case("", lambda: MLP(), case.data, twin=lambda before=before: Loaded(before))
            expected = Truth(moved)
            for name, _ in alone.named_parameters():
                total[name] = total.get(name, 0) + expected.diag(name)
            for m, l, optimiser in (
                (model, loss, optimisers[0]),
                (alone, nn.CrossEntropyLoss(), optimisers[1]),
            ):
                optimiser.zero_grad()
                l(m(X[part]), Y[part]).backward()
                optimiser.step()
    same(model, total)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )


class Loaded(MLP):
    """An MLP that keeps its own parameters, whatever it is asked to load."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.double()
        super().load_state_dict(state)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return None


def test_batch_grad_of_what_only_one_pass_reached():
    case = CASES["two-inputs"]
    model, loss = pair(case)
    a, b, y = data_of(case)
    with nnj.collect("batch_grad"):
        loss(model.one(a), y).backward()
        loss(model(a, b), y).backward()
    assert model.two.weight.batch_grad.shape == (6, *model.two.weight.shape)
    assert not model.two.weight.batch_grad[:3].any() and model.two.weight.batch_grad[3:].any()
    torch.testing.assert_close(model.one.weight.batch_grad.sum(0), model.one.weight.grad)


def test_a_new_with_starts_from_nothing_and_leaves_others_alone():
    model, loss = pair()
    other, other_loss = pair()
    with nnj.collect("ggn_diag", "batch_grad"):
        (loss(model(X), Y) + other_loss(other(X), Y)).backward()
    same(other, Truth(base()))
    assert model.one.weight.batch_grad.shape == (12, 3, 4) or model.one.weight.batch_grad.shape == (
        6,
        3,
        4,
    )
    with nnj.collect("ggn_diag"):
        assert not hasattr(model.one.weight, "ggn_diag") and not hasattr(
            other.one.weight, "ggn_diag"
        )
        assert hasattr(model.one.weight, "batch_grad")
        loss(model(X), Y).backward()
    same(model, Truth(base()))
    assert getattr(other.one.weight, "ggn_diag", None) is None


def test_one_collect_may_be_entered_again():
    model, loss = pair()
    collect = nnj.collect("ggn_diag", "ggn_block", "batch_grad")
    for _ in range(3):
        with collect:
            loss(model(X), Y).backward()
        same(model, Truth(base()))
        same(model, Truth(base()), "batch_grad")


def test_nested():
    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        with nnj.collect("batch_grad", "ggn_block"):
            loss(model(X[:2]), Y[:2]).backward()
            with nnj.collect("ggn_diag_mc", samples=2):
                loss(model(X[2:]), Y[2:]).backward()
        loss(model(X), Y).backward()
    a, b, c = (
        Truth(base(data=lambda s=s: (X[s], Y[s]))) for s in (slice(0, 6), slice(0, 2), slice(2, 6))
    )
    same(model, {n: 2 * a.diag(n) + b.diag(n) + c.diag(n) for n, _ in model.named_parameters()})
    same(
        model,
        {n: torch.cat([b.batch_grad(n), c.batch_grad(n)]) for n, _ in model.named_parameters()},
        "batch_grad",
    )
    assert model.one.weight.ggn_diag_mc.shape == (3, 4)


def test_an_error_of_the_user_inside():
    model, loss = pair()
    with pytest.raises(ZeroDivisionError), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), nnj.collect("ggn_diag"):
        raise ZeroDivisionError
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_a_backward_pass_that_raises_adds_nothing():
    model, loss = pair()

    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    with nnj.collect("ggn_diag", "batch_grad"):
        handle = model.one.weight.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss(model(X), Y).backward()
        handle.remove()
        loss(model(X), Y).backward()
    same(model, Truth(base()))
    same(model, Truth(base()), "batch_grad")


def test_forward_or_loss_before_the_with():
    model, loss = pair()
    z = model(X)
    with nnj.collect("ggn_diag"):
        loss(z, Y).backward()
    same(model, Truth(base()))
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag"):
        value.backward()
    same(model, Truth(base()))


def test_extended_after_the_forward_pass():
    """No layer has a record: autograd's own nodes do, exactly, or the pass is refused."""
    model, loss = build(base()), nnj.extend(nn.CrossEntropyLoss())
    value = loss(model(X), Y)
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        value.backward()
    same(model, Truth(base()))


def test_the_graph_again():
    model, loss = pair()
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        value.backward(retain_graph=True)
        (0.5 * value).backward()
    same(model, Truth(base()), factor=1.5)
    assert model.one.weight.batch_grad.shape[0] == 12
    with nnj.collect("ggn_diag"):
        with pytest.raises(RuntimeError, match="second time|retain_graph"):
            value.backward()
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_partial_backward_passes():
    model, loss = pair()
    expected = Truth(base())
    with nnj.collect("ggn_diag", "ggn_block"):
        torch.autograd.grad(loss(model(X), Y), [model.two.weight, model.three.bias])
    assert close(model.two.weight.ggn_diag, expected.diag("two.weight")) == ""
    assert close(model.three.bias.ggn_diag, expected.diag("three.bias")) == ""
    assert (
        model.one.weight.ggn_diag is None
        and model.two.bias.ggn_diag is None
        and model.one.ggn_block is None
    )
    with nnj.collect("ggn_diag"):
        z = model(X)
        torch.autograd.grad(loss(z, Y), z)
    assert all(p.ggn_diag is None for p in model.parameters())
    x = X.clone().requires_grad_()
    with nnj.collect("ggn_diag"):
        torch.autograd.grad(loss(model(x), Y), x)
    assert all(p.ggn_diag is None for p in model.parameters())


def test_create_graph_and_a_gradient_penalty():
    model, loss = pair()
    alone = build(base())
    with nnj.collect("ggn_diag"):
        for m, l in ((model, loss), (alone, nn.CrossEntropyLoss())):
            value = l(m(X), Y)
            grads = torch.autograd.grad(value, list(m.parameters()), create_graph=True)
            sum(g.square().sum() for g in grads).backward()
    same(model, Truth(base()))
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "names, options, words",
    [
        (
            ("ggn_diagonal",),
            {},
            (
                r"unknown quantity 'ggn_diagonal'.*did you mean 'ggn_diag'.*Known: .*batch_grad, "
                r".*ggn_block, ggn_diag, "
            ),
        ),
        (("diag",), {}, "unknown quantity 'diag'.*Known"),
        ((), {}, "name of a quantity"),
        ((3,), {}, "unknown quantity 3"),
        (("ggn_diag",), {"samples": 2}, "unknown option 'samples'"),
        (("ggn_diag_mc",), {"sample": 2}, "unknown option 'sample'.*did you mean 'samples'"),
        (("ggn_diag_mc",), {"samples": 0}, "samples=0"),
        (("ggn_diag_mc",), {"samples": 1.5}, "samples=1.5"),
        (("ggn_diag",), {"modules": ["head"]}, "modules="),
    ],
)
def test_what_collect_does_not_know(names, options, words):
    with pytest.raises(nnj.NNJError, match=words):
        nnj.collect(*names, **options)


def test_nothing_collected_is_said_at_the_end_of_the_with():
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    with (
        pytest.raises(
            nnj.NNJError, match=r"nothing was collected for ggn_diag, ggn_block.*nnj\.extend"
        ),
        nnj.collect("ggn_diag", "ggn_block"),
    ):
        pass
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        loss(model(x), y)
    with (
        pytest.raises(nnj.NNJError, match="nothing was collected"),
        nnj.collect("ggn_diag"),
        torch.no_grad(),
    ):
        loss(model(x), y)
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []


def test_an_extended_loss_on_a_model_that_is_not():
    """It must not end silently with nothing collected."""
    model, loss = build(Case("", MLP, vectors)), nnj.extend(nn.CrossEntropyLoss())
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"extend"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()


def test_modules_that_the_pass_does_not_reach():
    """As with .grad: None. Of no extended model at all it is a slip."""
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    model.other = other = nn.Linear(2, 2)
    with nnj.collect("ggn_diag", modules=[other]):
        loss(model(x), y).backward()
    assert other.weight.ggn_diag is None and not hasattr(model.one.weight, "ggn_diag")
    message = r"^modules= names a module \(Linear\) that is part of no extended model\. Extend"
    with (
        pytest.raises(nnj.NNJError, match=message),
        nnj.collect("ggn_diag", modules=[nn.Linear(2, 2)]),
    ):
        loss(model(x), y).backward()
    with nnj.collect("ggn_diag", modules=[nn.ModuleList([model.one])]):
        loss(model(x), y).backward()
    assert model.one.weight.ggn_diag is not None


def test_a_model_none_of_whose_parameters_are_reached():
    """Results on the leaves that stood in their places would be None in silence."""
    model, loss = pair()
    others = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    message = r"^the loss reaches no parameter of MLP, which was called .*functional_call"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag"):
        loss(torch.func.functional_call(model, others, (X,)), Y).backward()
    assert all(p.grad is not None for p in others.values())
    with nnj.collect("ggn_diag"):  # a backward pass to some of them alone is meant so
        loss(model(X), Y).backward(inputs=[model.two.weight])
    assert model.one.weight.ggn_diag is None and model.two.weight.ggn_diag is not None


def replaced_data(model: nn.Module) -> None:
    model.two.weight.data = 2 * model.two.weight.data


def replaced(model: nn.Module) -> None:
    model.two.weight = nn.Parameter(2 * model.two.weight.detach())


@pytest.mark.parametrize("change", [replaced_data, replaced])
def test_parameters_that_became_others_before_the_backward_pass(change):
    """No version moves. Autograd computes with the new data, too."""
    model, loss = pair()
    message = r"^layer 'two': (the data of )?a parameter .* (replaced|than it has now)"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag"):
        value = loss(model(X), Y)
        change(model)
        value.backward()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    assert model.two.weight.ggn_diag is not None


def test_everything_frozen():
    """A loss without a graph raises torch's own error; nnj adds no other."""
    model, (loss,) = extended(Case("", MLP, vectors))
    model.requires_grad_(False)
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(RuntimeError, match="does not require grad"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    with nnj.collect("ggn_diag"):
        loss(model(x.requires_grad_()), y).backward()
    intact(model)


# -- entered, left, interrupted --------------------------------------------------------------------


def test_the_same_collect_twice_at_once():
    model, loss = pair()
    twice = nnj.collect("ggn_diag")
    with twice:
        loss(model(X), Y).backward()
        with pytest.raises(nnj.NNJError, match=r"^this collect of ggn_diag is open already\."):
            twice.__enter__()
        loss(model(X), Y).backward()
    assert twice.passes == 2
    same(model, {n: 2 * Truth(base()).diag(n) for n, _ in model.named_parameters()})


def test_left_in_another_order_than_nested():
    model, loss = pair()
    one, two = nnj.collect("ggn_diag"), nnj.collect("ggn_block")
    one.__enter__()
    two.__enter__()
    loss(model(X), Y).backward()
    one.__exit__(None, None, None)
    assert not torch._C._is_multithreading_enabled()
    loss(model(X), Y).backward()
    two.__exit__(None, None, None)
    assert torch._C._is_multithreading_enabled() and (one.passes, two.passes) == (1, 2)
    with torch.autograd.set_multithreading_enabled(False):
        with nnj.collect("ggn_diag"):
            loss(model(X), Y).backward()
        assert not torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_while_it_is_entered(late, monkeypatch):
    model, loss = pair()
    begin = passes._Thread.begin

    def interrupted(thread: Any, collection: Any) -> None:
        if late:
            begin(thread, collection)
        raise KeyboardInterrupt

    again = nnj.collect("ggn_diag")
    with monkeypatch.context() as patch:
        patch.setattr(passes._Thread, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.__enter__()
    assert not passes.is_collecting() and torch._C._is_multithreading_enabled()
    with again:
        loss(model(X), Y).backward()
    assert again.passes == 1


def test_parameters_may_be_swapped_afterwards(monkeypatch):
    """Nobody refers to them weakly, which torch.utils.swap_tensors would refuse."""
    model, loss = pair()
    kept = nnj.collect(*QUANTITIES)
    with kept:
        loss(model(X), Y).backward()
    old, new = model.one.weight, nn.Parameter(torch.zeros_like(model.one.weight))
    expected, values = old.ggn_diag, old.detach().clone()
    torch.utils.swap_tensors(old, new)
    assert new.ggn_diag is expected and torch.equal(new, values) and not hasattr(old, "ggn_diag")
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model.float()
    with nnj.collect("ggn_diag"):
        loss(model(X.float()), Y).backward()
    assert old.ggn_diag.dtype == torch.float32 and kept.passes == 1


def test_a_new_with_finds_a_parameter_that_has_moved():
    """Into a parametrization, whose part did not exist in the first pass."""
    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    nn.utils.parametrizations.weight_norm(model.one)
    with nnj.collect("batch_grad"):
        loss(model(X), Y).backward()
    assert hasattr(model.two.weight, "ggn_diag")
    with nnj.collect("ggn_diag", modules=[model.two]):
        loss(model(X), Y).backward()
    assert [n for n, p in model.named_parameters() if hasattr(p, "ggn_diag")] == [
        "two.weight",
        "two.bias",
    ]


# -- what a refusal leaves behind ------------------------------------------------------------------


class Coupled(nn.Module):
    """Samples influence one another, which every reading of the rows finds out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x)
        return z - z.mean(0)


@pytest.mark.parametrize(
    "make", [Coupled, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))]
)
@pytest.mark.parametrize("how", ["collect", "fit", "jacobian"])
def test_a_refusal_leaves_no_circle_of_references(make, how):
    """Each would keep the graph and its tensors until Python looks for circles."""
    model, loss = nnj.extend(make().double()), nnj.extend(nn.CrossEntropyLoss())
    refused = how != "fit" or make is Coupled

    def go() -> None:
        if how == "jacobian":
            nnj.jacobian(model, X, "weight")
        elif how == "fit":
            nnj.fit(model, loss, [(X, Y)], "ggn_diag")
        else:
            with nnj.collect("ggn_diag"):
                loss(model(X), Y).backward()

    def tensors() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(o, Tensor) for o in gc.get_objects())

    found = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(nnj.NNJError) if refused else contextlib.nullcontext():
                go()
            model.zero_grad()
            found.append(tensors())
    finally:
        gc.enable()
    assert found[1] == found[2]


def test_a_loss_that_the_model_computes_itself():
    """As those of transformers do, given labels=."""

    class Computes(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x, labels):
            logits = self.head(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = nnj.extend(Computes())
    with (
        pytest.raises(nnj.NNJError, match=r"transformers.*\.logits.*loss of your own"),
        nnj.collect("ggn_diag"),
    ):
        model(torch.randn(5, 3), torch.randint(4, (5,)))["loss"].backward()
    assert model.head.weight.grad is not None


def test_the_context_says_where_results_stand():
    model, loss = nnj.extend(nn.Linear(4, 3)), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "kfac") as context:
        loss(model(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    for name, holder in (("ggn_diag", "parameter"), ("kfac", "module")):
        with pytest.raises(AttributeError, match=rf"stand on each {holder}, as {holder}\.{name}$"):
            getattr(context, name)
