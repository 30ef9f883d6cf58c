"""Parameters that are others at the backward pass than in the call: `torch.func.functional_call`
with some others, and `.data` of bare parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import nnj
from nnj.recording.records import MARK

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
T = torch.zeros(5, 3).double()


class Scale(nn.Module):
    """No rule knows it; w is read as it is, and b not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("c", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + self.c * x


class Net(nn.Module):
    """A layer with a rule, bare parameters of its own and of a part, a tied weight, attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.tied = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.two.weight
        self.scale, self.norm = Scale(), nn.BatchNorm1d(3).eval()
        for t in (self.norm.weight, self.norm.bias, self.norm.running_var):
            nn.init.uniform_(t, 1, 2)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.bare = nn.Parameter(torch.randn(3, 3))
        self.square = nn.Parameter(torch.randn(3))
        self.fast = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.double()

    def inside(self, x: Tensor) -> Tensor:
        return self.scale(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(self.two(self.one(x).tanh())) @ self.bare
        h = (h + self.fast * 0.1) * self.square * self.frozen
        h = self.attention(h[:, None], h[:, None], h[:, None], need_weights=False)[0][:, 0]
        return self.tied(self.norm(h))


def loss_of(model: nn.Module) -> nn.Module:
    nnj.extend(model)
    return nnj.extend(nn.MSELoss(reduction="sum"))


def jacobian(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """(N C, *p.shape) of each parameter that requires grad, by autograd row by row."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(entry, named.values(), retain_graph=True, allow_unused=True)
        for entry in run().flatten()
    ]
    columns = dict(zip(named, zip(*rows, strict=True), strict=True))
    return {n: torch.stack(parts) for n, parts in columns.items() if parts[0] is not None}


def others(model: nn.Module, *names: str) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    return {n: params[n].detach().clone().requires_grad_() for n in names}


# -- functional_call with some others --------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bare", "scale.w", "attention.in_proj_weight", "attention.out_proj.weight", "square"]
)
@pytest.mark.parametrize("kind", ["leaf", "constant", "computed", "parameter"])
def test_some_others_by_functional_call(name, kind):
    """Its result would be None in silence."""
    model = Net()
    loss, (leaf,) = loss_of(model), others(model, name).values()
    make = {
        "leaf": lambda: leaf,
        "constant": leaf.detach,
        "computed": lambda: 2 * leaf,
        "parameter": lambda: nn.Parameter(leaf.detach()),
    }[kind]
    module = model.get_submodule(name.rpartition(".")[0])
    message = (
        rf"^in the place of parameter '{name}' of {type(module).__name__} was another tensor when "
        r"the model was called \(by torch\.func\.functional_call"
    )
    if (name, kind) == ("scale.w", "parameter"):  # which is what the fallback takes
        message = r"^layer 'scale': a parameter in its call was another tensor than it has now"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag"):
        loss(functional_call(model, {name: make()}, (X,)), T).backward()
    assert model.one.weight.grad is not None  # as without nnj
    if not message.startswith("^layer"):
        model.get_parameter(name).requires_grad_(False)
        with nnj.collect("ggn_diag"):
            loss(functional_call(model, {name: make()}, (X,)), T).backward()
        assert model.one.weight.ggn_diag is not None


@pytest.mark.parametrize("tie_weights", [True, False])
def test_some_others_of_a_tied_weight(tie_weights):
    """Untied, the parameter is still reached by its other name, as `.grad` is."""
    model = Net()
    loss, given = loss_of(model), others(model, "two.weight")
    given = {n: t.detach() for n, t in given.items()}
    run = lambda: loss(functional_call(model, given, (X,), tie_weights=tie_weights), T).backward()
    if tie_weights:
        with pytest.raises(nnj.NNJError, match=r"^in the place of parameter '(two|tied)\.weight'"):
            with nnj.collect("ggn_diag"):
                run()
        return
    with nnj.collect("batch_grad"):
        run()
    assert torch.allclose(model.two.weight.batch_grad.sum(0), model.two.weight.grad)


def test_what_is_made_of_the_parameters_themselves():
    """Masks, and updates that are differentiated through: results are those of the parameter."""
    model = Net()
    loss = loss_of(model)
    given = {"bare": model.bare * 0.5, "two.weight": model.two.weight + 0}
    twin = Net()
    expected = jacobian(twin, lambda: functional_call(twin, {"bare": twin.bare * 0.5}, (X,)))
    with nnj.collect("ggn_diag"):
        loss(functional_call(model, given, (X,)), T).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.ggn_diag, 2 * expected[name].square().sum(0)), name


def test_other_buffers_and_the_parameters_themselves():
    model = Net()
    loss = loss_of(model)
    with nnj.collect("ggn_diag"):
        given = {"scale.c": torch.ones(3).double(), "bare": model.bare}
        loss(functional_call(model, given, (X,)), T).backward()
    assert all(p.ggn_diag is not None for p in model.parameters() if p.requires_grad)


class Nested(Net):
    """One of its own parameters stands in for that of a part."""

    given: Callable[[], Tensor]

    def inside(self, x: Tensor) -> Tensor:
        return functional_call(self.scale, {"w": self.given()}, (x,))


def test_others_for_a_part_inside_of_the_call():
    model = Nested()
    loss, other = loss_of(model), torch.randn(3).double().requires_grad_()
    for given in (lambda: other, lambda: model.fast):
        model.given = given
        with pytest.raises(nnj.NNJError, match=r"^in the place of parameter 'scale\.w' of Scale"):
            with nnj.collect("ggn_diag"):
                loss(model(X), T).backward()
    model.scale.w.requires_grad_(False)
    with nnj.collect("ggn_diag"):
        loss(model(X), T).backward()
    twin = Nested()
    twin.given = lambda: twin.fast
    j = jacobian(twin, lambda: twin(X))["fast"]
    assert torch.allclose(model.fast.ggn_diag, 2 * j.square().sum(0))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [Tensor.clone, nn.Parameter])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_others_for_a_layer(kind, requires_grad, all_of_it):
    """Inside of the call, its own are back at the end of it."""
    model, other = Net(), kind(torch.randn(3, 3).double()).requires_grad_(requires_grad)
    model.layer = nn.Linear(3, 3).double()
    if all_of_it:
        model.inside = lambda x: model.layer(x)
    else:
        model.inside = lambda x: functional_call(model.layer, {"weight": other}, (x,))
    loss, given = loss_of(model), {"layer.weight": other} if all_of_it else {}
    message = r"^in the place of parameter 'layer\.weight' of Linear"
    if kind is nn.Parameter and requires_grad:
        message = "^layer 'layer': a parameter in its call was another tensor"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag"):
        loss(functional_call(model, given, (X,)), T).backward()


def test_layers_with_records_are_not_noted_once_more():
    """Which a small network would feel in each forward pass."""
    model = nnj.extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3).eval()).double())
    y = model(X)
    (mark,) = [m for key, m in y.grad_fn.metadata.items() if key[0] == MARK]
    assert not mark.called_with._tables and not mark.called_with._data


def test_others_in_a_part_that_is_not_extended():
    """Nothing was asked of it."""
    body, head = Net(), nn.Linear(3, 3).double()
    model, loss = nn.Sequential(body, head), loss_of(head)
    with nnj.collect("ggn_diag"):
        loss(functional_call(model, others(model, "0.bare"), (X,)), T).backward()
    assert head.weight.ggn_diag is not None


def test_modules_without_the_other():
    model = Net()
    loss = loss_of(model)
    with nnj.collect("ggn_diag", modules=[model.one]):
        loss(functional_call(model, others(model, "bare"), (X,)), T).backward()
    assert model.one.weight.ggn_diag is not None


# -- other data ------------------------------------------------------------------------------------


def transposed(p: Tensor) -> None:
    p.data = p.data.mT if p.dim() > 1 else p.data.flip(0)


def twice(p: Tensor) -> None:
    """The second time perhaps to where the data were in the call."""
    p.data = 2 * p.data
    p.data = 2 * p.data


@pytest.mark.parametrize("change", [transposed, twice])
@pytest.mark.parametrize(
    "name",
    [
        *("bare", "square", "scale.w", "scale.c", "frozen", "attention.in_proj_weight"),
        *("one.weight", "norm.bias", "norm.running_var"),
    ],
)
def test_data_replaced_before_the_backward_pass(name, change):
    """No version moves; autograd computes with the new data, too."""
    model = Net()
    loss = loss_of(model)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    if name == "attention.in_proj_weight":
        change = twice  # it is not square
    message = (
        rf"^(the data of (parameter|buffer) '{name}' of \w+|"
        rf"layer '{name.partition('.')[0]}': the data of a (parameter|buffer))"
        r" was replaced \(by p\.data = \.\.\."
    )
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ggn_diag"):
        value = loss(model(X), T)
        change(tensor)
        value.backward()
    with nnj.collect("ggn_diag"):
        loss(model(X), T).backward()


def test_data_replaced_that_the_loss_does_not_see():
    """A copy of the same numbers; a teacher in the same model that moves between two calls."""
    model = Net()
    model.teacher = nn.Parameter(torch.randn(3).double(), requires_grad=False)
    loss = loss_of(model)
    with nnj.collect("ggn_diag"):
        value = loss(model(X), T)
        model.bare.data = model.bare.data.clone()
        model.teacher.data = 0.9 * model.teacher.data
        value = value + loss(model(X), T)
        value.backward()
    assert model.bare.ggn_diag is not None


def test_data_replaced_under_a_checkpoint():
    model = Net()
    loss, outer = loss_of(model), lambda x: checkpoint(model, x, use_reentrant=False)
    with pytest.raises(nnj.NNJError, match=r"^the data of parameter 'square'"):
        with nnj.collect("ggn_diag"):
            value = loss(outer(X), T)
            model.square.data = 2 * model.square.data
            value.backward()
