"""Names and leaves of autograd's nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.graph.nodes import is_alive, leaf_of, node_name
from nnj.recording.records import edge_of
from nnj.testing import check_model


class Keeping(torch.autograd.Function):
    """A function whose node has an attribute of the name that those of leaves have."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.variable = x.detach()
        return x * 2

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(Keeping.apply(self.one(x)).tanh())


def test_names():
    x = torch.randn(2, 2, requires_grad=True)
    assert node_name((x + 1).grad_fn) == "Add"
    assert node_name((x @ x).grad_fn) == "Mm"
    assert node_name(Keeping.apply(x).grad_fn) == "KeepingBackward"
    assert node_name(edge_of(x)[0]) == "AccumulateGrad"


class Sum(torch.autograd.Function):
    """A square, under the name of an operation that is linear."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Mul(torch.autograd.Function):
    """A sum of neighbouring rows, under the name of an operation that keeps rows apart."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x + x.roll(1, 0)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g + g.roll(-1, 0)


class Mixed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(Mul.apply(self.one(x)))


def test_a_function_is_not_taken_for_the_operation_whose_name_it_has():
    x, y, loss = torch.randn(5, 4), torch.randint(3, (5,)), nnj.extend(nn.CrossEntropyLoss())
    model = nnj.extend(nn.Linear(4, 3))
    with nnj.collect("ggn_diag"), pytest.raises(nnj.NNJError, match="not linear in this loss"):
        Sum.apply(loss(model(x), y)).backward()
    model = nnj.extend(Mixed())
    with nnj.collect("ggn_diag"), pytest.raises(nnj.NNJError, match="samples influence"):
        loss(model(x), y).backward()


def test_a_leaf_is_known_by_its_node():
    x = torch.randn(3, requires_grad=True)
    assert leaf_of(edge_of(x)[0]) is x
    assert leaf_of((2 * x).grad_fn) is None and leaf_of(Keeping.apply(x).grad_fn) is None


def test_a_function_with_a_variable_of_its_own():
    torch.manual_seed(0)
    check_model(Net(), nn.CrossEntropyLoss(), torch.randn(5, 4), torch.randint(3, (5,)))


class Ignoring(nn.Module):
    """A layer whose output does not depend on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * self.w


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Keeping.apply(self.one(x))


def test_a_function_in_python_whose_output_is_gone():
    """In older torch its node dies with the output, and to ask it for shapes ends the process."""
    x = torch.randn(5, 4)
    y = Keeping.apply(nn.Linear(4, 4)(x))
    assert is_alive(y.grad_fn) and is_alive((y + 1).grad_fn) and is_alive(edge_of(x + 0 * y)[0])
    check_model(
        nn.Sequential(Function(), Ignoring(), nn.Linear(4, 3)),
        nn.CrossEntropyLoss(),
        x,
        torch.randint(3, (5,)),
    )
    model = nnj.extend(Function())
    loss = nnj.extend(lambda a, b: (a * b.detach()).square().sum())
    found = []
    for given in (model(x).detach(), None):  # first as it must be, then the output itself
        with nnj.collect("ggn_diag"):
            loss(model(x), model(x) if given is None else given).backward()
        found.append(model.one.weight.ggn_diag)
    assert torch.allclose(*found) and found[0].all()
    v = torch.randn(5, 4)
    assert torch.allclose(nnj.jvp(model, x, v), 2 * v @ model.one.weight.T)
