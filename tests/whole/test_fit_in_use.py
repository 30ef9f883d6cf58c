"""nnj.fit as a user meets it: what it leaves behind, the batches it reads, and at what it
collects.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nnj
from tests.support.fitting import CLASSES, LOADER, C, N, X, agree, batches, dense, expected, mlp


def state(model: nn.Module) -> list[Any]:
    """All that a call might change: hooks, modes, gradients and their identity, attributes."""
    found: list[Any] = []
    for m in model.modules():
        found += [m.training, *m._forward_hooks.values(), *m._forward_pre_hooks.values(), *vars(m)]
    for p in model.parameters():
        found += [p.grad, p.requires_grad, p._version, *vars(p)]
    return found


def in_every_mode(extended: bool) -> nn.Module:
    model = mlp().train()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return nnj.extend(model) if extended else model


def breaks(how: type[BaseException] | None, model: nn.Module, grad: bool = False) -> Any:
    yield LOADER[0]
    assert not any(m.training for m in model.modules())
    if how is not None:
        raise how
    yield from LOADER[1:]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("how", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(how, extended):
    model, loss = in_every_mode(extended), nn.CrossEntropyLoss()
    before, grad = state(model), model[0].weight.grad.clone()
    if how is None:
        agree(nnj.fit(model, loss, breaks(how, model), "ggn_diag")["ggn_diag"], expected())
    else:
        with pytest.raises(how):
            nnj.fit(model, loss, breaks(how, model), "ggn_diag", "ggn_block", "batch_grad")
    after = state(model)
    assert len(after) == len(before) and all(
        a is b or a == b for a, b in zip(after, before, strict=True)
    )
    assert (
        torch.equal(model[0].weight.grad, grad)
        and vars(loss).keys() == vars(nn.CrossEntropyLoss()).keys()
    )
    assert not loss._forward_hooks


class Interrupted(nn.Module):
    """A layer in whose backward pass somebody presses Ctrl-C."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        return self.Node.apply(x)


def test_an_interrupt_of_the_backward_pass():
    model = nn.Sequential(nn.Linear(4, 4).double(), Interrupted(), mlp())
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "batch_grad")
    assert all(a is b or a == b for a, b in zip(state(model), before, strict=True))
    agree(nnj.fit(model[2], nn.CrossEntropyLoss(), LOADER, "ggn_diag")["ggn_diag"], expected())
    with nnj.collect("ggn_diag"):  # nothing is open any more
        nnj.extend(nn.CrossEntropyLoss())(nnj.extend(mlp())(X), CLASSES).backward()


def test_a_part_that_the_user_extended_stays_so():
    model = mlp()
    nnj.extend(model[3])
    before = state(model)
    agree(nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag")["ggn_diag"], expected())
    assert all(a is b or a == b for a, b in zip(state(model), before, strict=True))


def test_a_collect_afterwards_knows_no_model_of_a_fit():
    """A model that was extended for a fit alone is no extended model later on."""
    model = mlp().eval()
    nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag")
    with pytest.raises(nnj.NNJError, match="Extend the model, too"):
        with nnj.collect("ggn_diag"):
            nnj.extend(nn.CrossEntropyLoss())(model(X), CLASSES).backward()


def test_what_an_earlier_collect_has_left_stays():
    model, loss = nnj.extend(mlp().eval()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X), CLASSES).backward()
    before = [model[0].weight.ggn_diag, model[0].ggn_block]
    nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag", "ggn_block", scale="mean")
    assert model[0].weight.ggn_diag is before[0] and model[0].ggn_block is before[1]


def test_a_loader_that_trains_is_not_collected():
    """Its backward passes are of the very loss and model, and it may collect by itself."""
    model, loss = nnj.extend(mlp().eval()), nnj.extend(lambda z, y: F.cross_entropy(z, y))

    def trains() -> Any:
        for x, y in LOADER:
            loss(model(x), y).backward()
            with nnj.collect("batch_grad"):
                loss(model(x), y).backward()
            assert len(model[0].weight.batch_grad) == len(x)
            yield x, y

    options = dict(reduction="mean", scale="mean")
    fit = nnj.fit(model, loss, trains(), "ggn_diag", "batch_grad", **options)
    agree(fit["ggn_diag"], expected("mean"))
    assert fit.samples == N and len(fit["batch_grad"]["0.weight"]) == N
    assert model[0].weight.grad.any()


def test_one_accumulator_serves_all_batches(monkeypatch):
    """Rows are joined once, at the end, whatever the number of batches."""
    joined: list[int] = []
    cat = torch.cat

    def noting(parts: Any, *rest: Any, **options: Any) -> Tensor:
        joined.append(len(parts))
        return cat(parts, *rest, **options)

    monkeypatch.setattr(torch, "cat", noting)
    nnj.fit(mlp(), nn.CrossEntropyLoss(), batches(X, CLASSES, 1), "batch_grad")
    assert joined.count(N) == 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    model = mlp()
    with context():
        fit = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag")
    agree(fit["ggn_diag"], expected())


# -- batches ---------------------------------------------------------------------------------------


class Named(nn.Module):
    """Takes its inputs by name, and gives its output in a field, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(
        self, inputs: Tensor, shift: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        assert labels is None
        return self.net(inputs if shift is None else inputs + shift)


Field = collections.namedtuple("Field", "logits")
HALVES = [(X - 1, torch.ones(N, 1).double(), CLASSES)]


@pytest.mark.parametrize(
    "loader, options",
    [
        (DataLoader(TensorDataset(X, CLASSES), batch_size=4), {}),
        ([[x, y] for x, y in LOADER], {}),
        (iter(LOADER), {}),
        ([*LOADER, (X[:0], CLASSES[:0])], {}),
        (HALVES, {}),
        ([{"inputs": x, "labels": y} for x, y in LOADER], {}),
        ([collections.UserDict(shift=s, inputs=x, labels=y) for x, s, y in HALVES], {}),
        ([{"inputs": x, "y": y} for x, y in LOADER], {"target": "y"}),
        (
            [{"inputs": x, "labels": y} for x, y in LOADER],
            {"forward": lambda m, b: Field(m(b["inputs"])).logits},
        ),
        (
            [{"a": {"b": x}, "y": y} for x, y in LOADER],
            {"forward": lambda m, b: m(b["a"]["b"]), "target": lambda b: b["y"]},
        ),
        ([(y, x) for x, y in LOADER], {"forward": lambda m, b: m(b[1]), "target": lambda b: b[0]}),
    ],
    ids=[
        "DataLoader",
        "lists",
        "iterator",
        "an empty batch",
        "two inputs",
        "dict",
        "UserDict",
        "key",
        "forward",
        "nested",
        "swapped",
    ],
)
def test_batches(loader, options):
    fit = nnj.fit(Named(), nn.CrossEntropyLoss(), loader, "ggn_diag", scale="mean", **options)
    agree({name.removeprefix("net."): t for name, t in fit["ggn_diag"].items()}, expected("mean"))
    assert fit.samples == N


def test_batches_move_to_the_device_of_the_model(monkeypatch):
    seen: list[tuple[Any, Any]] = []
    to = Tensor.to
    monkeypatch.setattr(
        Tensor,
        "to",
        lambda t, *args, **kwargs: (seen.append((t, args[0])), to(t, *args, **kwargs))[1],
    )
    nnj.fit(mlp(), nn.CrossEntropyLoss(), [{"input": X, "labels": CLASSES}], "ggn_diag")
    assert all(
        any(t is mine and where == torch.device("cpu") for t, where in seen)
        for mine in (X, CLASSES)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_another_device():
    fit = nnj.fit(
        mlp().cuda(), nn.CrossEntropyLoss(weight=torch.ones(C).double()), LOADER, "ggn_diag"
    )
    assert all(t.is_cuda for t in fit["ggn_diag"].values())
    agree({name: t.cpu() for name, t in fit["ggn_diag"].items()}, expected())


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum(0)


def test_sequence_first_models_are_extended_by_the_user():
    model, x = nnj.extend(TimeFirst(), batch_axis=1), X[:6].reshape(2, 3, 4)
    loss = lambda z, y: F.cross_entropy(z, y)
    diag, _, _ = dense(TimeFirst(), loss, x, CLASSES[:3])
    fit = nnj.fit(
        model,
        loss,
        [(x[:, :2], CLASSES[:2]), (x[:, 2:], CLASSES[2:3])],
        "ggn_diag",
        reduction="mean",
        scale="mean",
    )
    agree(fit["ggn_diag"], diag)
    assert fit.samples == 3


# -- parameters ------------------------------------------------------------------------------------


def test_frozen_unreached_and_chosen_parameters():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.net = nn.Linear(2, 2).double(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Two()
    model.net[0].bias.requires_grad_(False)
    fit = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag", "batch_grad", "ggn_block")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(fit["ggn_diag"]) == list(fit["batch_grad"]) == names and "net.0.bias" not in names
    assert not fit["ggn_diag"]["unused.weight"].any() and fit["batch_grad"][
        "unused.weight"
    ].shape == (N, 2, 2)
    assert list(fit["ggn_block"]) == ["net.0", "net.3"] and fit["ggn_block"]["net.0"].shape == (
        20,
        20,
    )
    assert torch.equal(
        fit.vector("ggn_diag"), torch.cat([fit["ggn_diag"][name].flatten() for name in names])
    )
    head = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "ggn_diag", modules=[model.net[3]])[
        "ggn_diag"
    ]
    agree(head, {name: fit["ggn_diag"][name] for name in ("net.3.weight", "net.3.bias")})


class Routed(nn.Module):
    """Samples whose first entry is positive go through one layer, the others through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, C).double(), nn.Linear(4, C).double()

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] > 0).all()):
            return self.a(x)
        if bool((x[:, 0] <= 0).all()):
            return self.b(x)
        return torch.where(x[:, :1] > 0, self.a(x), self.b(x))


def test_what_only_some_batches_reach():
    fit = nnj.fit(Routed(), nn.CrossEntropyLoss(), batches(X, CLASSES, 1), "ggn_diag", "batch_grad")
    one = nnj.fit(Routed(), nn.CrossEntropyLoss(), [(X, CLASSES)], "ggn_diag", "batch_grad")
    agree(fit["ggn_diag"], dense(Routed(), nn.CrossEntropyLoss(reduction="sum"), X, CLASSES)[0])
    agree(fit["batch_grad"], one["batch_grad"])


def test_shared_parameters_have_one_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    fit = nnj.fit(model, nn.MSELoss(), [(X[:, :4], X)], "ggn_diag")
    assert list(fit["ggn_diag"]) == [name for name, _ in model.named_parameters()]
    assert (
        fit.vector("ggn_diag").shape == torch.cat([p.flatten() for p in model.parameters()]).shape
    )
