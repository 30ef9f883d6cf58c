"""Names and leaves of autograd's nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnj.graph.nodes import leaf_of, node_name
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
    assert node_name(Keeping.apply(x).grad_fn) == "Keeping"
    assert node_name(edge_of(x)[0]) == "AccumulateGrad"


def test_a_leaf_is_known_by_its_node():
    x = torch.randn(3, requires_grad=True)
    assert leaf_of(edge_of(x)[0]) is x
    assert leaf_of((2 * x).grad_fn) is None and leaf_of(Keeping.apply(x).grad_fn) is None


def test_a_function_with_a_variable_of_its_own():
    torch.manual_seed(0)
    check_model(Net(), nn.CrossEntropyLoss(), torch.randn(5, 4), torch.randint(3, (5,)))
