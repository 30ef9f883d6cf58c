"""A stranger's factor, Jacobian and Hessian of a loss, of which only what must be defined is
defined: exact through a whole backward pass, and on our fast paths where they say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.jacobians.factor import merge_uses
from nnj.jacobians.square_sum import SquareSum
from nnj.registry.manager import use
from tests.support.distributions import Plugin
from tests.support.oracle import dense

pytestmark = pytest.mark.usefixtures("seeded")
N, D, C = 5, 4, 6


class Ours(nnj.Factor):
    """B as it stands, by `dense` and `columns` alone."""

    made = 0

    def __init__(self, b: Tensor):
        type(self).made += 1
        self.b, self.k, self.n, self.shape = b, b.shape[0], b.shape[1], tuple(b.shape[2:])
        self.device, self.dtype = b.device, b.dtype

    def dense(self) -> Tensor:
        return self.b

    def columns(self, which: slice) -> nnj.Factor:
        return type(self)(self.b[which])

    def __eq__(self, other: object) -> bool:  # and so without a hash, as a dataclass is
        return NotImplemented


class Fast(Ours):
    """Uses of one parameter are added when they meet, and squares are those that it says."""

    merged = 0

    def merge_key(self) -> Any:
        return Fast

    def merge(self, uses: Any) -> nnj.Factor:
        Fast.merged += 1
        return Fast(torch.stack([use.b for use in uses]).sum(0))

    def squares(self, total_columns: int | None = None) -> SquareSum:
        assert total_columns is not None and total_columns >= self.k
        return SquareSum(self.b.square().sum((0, 1)))


class Weight(nnj.Jacobian):
    """dy = dW x, by `jvp` and `vjp`, and a factor of its own."""

    kind: type[Ours] = Ours

    def __init__(self, x: Tensor, shape: tuple[int, ...]):
        super().__init__(shape, shape[:1], x)

    def jvp(self, v: Tensor) -> Tensor:
        return (v @ self.like[..., None])[..., 0]

    def vjp(self, u: Tensor) -> Tensor:
        return u[..., None] * self.like[:, None]

    def factor(self, u: Tensor, sample_index: Any) -> nnj.Factor | None:
        b = sample_index.sum(self.vjp(u))
        return None if b is None else self.kind(b)


class FastWeight(Weight):
    kind = Fast


class LastWeight(Weight):
    """It says that its factor is an outer product of the columns with x."""

    def outer_patches(self) -> nnj.Patches:
        return nnj.Patches.of(self.like[:, None, :, None])


class Layer(nn.Module):
    jacobian: type[Weight] = Weight

    def __init__(self, out: int = D):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


class FastLayer(Layer):
    jacobian = FastWeight


class LastLayer(Layer):
    jacobian = LastWeight


class Same(nnj.Jacobian):
    """dy = W dx, the same for all rows, which it says."""

    same_for_rows = True

    def __init__(self, w: Tensor, x: Tensor):
        super().__init__(w.shape[1:], w.shape[:1], x)
        self.w = w

    def jvp(self, v: Tensor) -> Tensor:
        return v @ self.w.mT

    def vjp(self, u: Tensor) -> Tensor:
        return u @ self.w


def rule(m: Layer, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    w = m.weight.detach()
    return {"input": Same(w, x), "weight": type(m).jacobian(x, tuple(w.shape))}


class Loss(nn.Module):
    """sum_n y_n^T A A^T y_n / 2, with A A^T of rank 2, or within each of several blocks."""

    def __init__(self, places: int = 1):
        super().__init__()
        self.places = places
        self.a = torch.randn(C // places, 2, dtype=torch.float64)

    def forward(self, y: Tensor) -> Tensor:
        blocks = y.unflatten(1, (-1, self.places)).mT  # an output's row is (B, *places)
        return (blocks @ self.a).square().sum() / 2


class FastLoss(Loss):
    """Its Hessian is taken together with the last layer."""


class Quadratic(nnj.LossHessian):
    """The same columns A for every row and place, by `columns` alone."""

    asked = 0

    def __init__(self, s: Tensor, y: Tensor, places: int):
        super().__init__([y.shape], y, s.shape[0], s.shape[1])
        self.s = s

    def columns(self, start: int, stop: int) -> Tensor:
        s = self.s.mT[start:stop, None, None]
        return s.expand(-1, self.rows, self.places, self.block)


class FastQuadratic(Quadratic):
    closed_form = True

    def columns_through(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        FastQuadratic.asked += 1
        return super().columns_through(rows, size)


def loss_rule(m: Loss, scale: Tensor, y: Tensor) -> nnj.LossHessian:
    cls = FastQuadratic if isinstance(m, FastLoss) else Quadratic
    return cls(scale.sqrt() * m.a, y, m.places)


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    def layers(register: Any) -> None:
        register(Layer, rule, uses="x")
        register(FastLayer, rule, uses="x")
        register(LastLayer, rule, uses="x")

    def losses(register: Any) -> None:
        register(Loss, loss_rule)
        register(FastLoss, loss_rule)

    new = nnj.PluginManager()
    new.register(Plugin(layers, losses=losses), "nnj-stranger")
    former = use(new)
    yield
    use(former)


class Twice(nn.Module):
    """A layer that is used twice, and one before and behind it."""

    def __init__(self, layer: Layer, head: nn.Module):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(3, D), layer, head

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(torch.tanh(self.first(x)))
        return self.head(self.layer(torch.sin(h)))


def exact(model: nn.Module, loss: Loss, x: Tensor, **options: Any) -> None:
    """ggn_diag, ggn_block and batch_grad are those of dense Jacobians and Hessians."""
    sample = torch.arange(N).repeat_interleave(C)
    truth = dense(model, lambda run: [run(x)], lambda outputs: 3 * loss(*outputs), sample)
    close: dict[str, Any] = dict(rtol=1e-10, atol=1e-10)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad", **options):
        (3 * nnj.extend(loss)(model(x))).backward()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in params.items():
        torch.testing.assert_close(p.ggn_diag, truth.diag(name), **close)
        torch.testing.assert_close(p.batch_grad, truth.batch_grad(name), **close)
    for path, m in model.named_modules():
        own = [f"{path}.{name}" for name in m._parameters if f"{path}.{name}" in params]
        if own:
            torch.testing.assert_close(m.ggn_block, truth.block(own), **close)


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("places", [1, 3])
@pytest.mark.parametrize("loss", [Loss, FastLoss])
@pytest.mark.parametrize("layer", [Layer, FastLayer])
def test_a_stranger_is_exact(
    layer: type[Layer], loss: type[Loss], places: int, memory: int
) -> None:
    Ours.made = Fast.made = Fast.merged = FastQuadratic.asked = 0
    model = Twice(layer(), nn.Linear(D, C)).double()
    exact(model, loss(places), torch.randn(N, 3, dtype=torch.float64), memory=memory)
    assert (Fast if layer is FastLayer else Ours).made
    assert bool(Fast.merged) == (layer is FastLayer)
    assert bool(FastQuadratic.asked) == (loss is FastLoss)


@pytest.mark.parametrize("loss", [Loss, FastLoss])
def test_a_stranger_is_the_last_layer(loss: type[Loss]) -> None:
    """Its map is the same for all rows; where its parameter gives no patches, it needs columns."""
    FastQuadratic.asked = 0
    x = torch.randn(N, 3, dtype=torch.float64)
    exact(nn.Sequential(nn.Linear(3, D), nn.Tanh(), Layer(C)).double(), loss(), x)
    assert not FastQuadratic.asked
    exact(nn.Sequential(nn.Linear(3, D), nn.Tanh(), LastLayer(C)).double(), loss(), x)
    assert bool(FastQuadratic.asked) == (loss is FastLoss)
    FastQuadratic.asked = 0
    frozen = nn.Sequential(nn.Linear(3, D), nn.Tanh(), Layer(C)).double()
    frozen[2].weight.requires_grad_(False)
    exact(frozen, loss(), x)
    assert bool(FastQuadratic.asked) == (loss is FastLoss)


def test_an_output_that_is_given_twice() -> None:
    """The loss has two outputs, and the graph one root: the last layer is walked, not taken."""
    model = nnj.extend(nn.Sequential(nn.Linear(3, D), nn.Tanh(), nn.Linear(D, 2)).double())
    loss = nnj.extend(lambda f, g: f.square().sum() + 2 * g.square().sum())
    x = torch.randn(N, 3, dtype=torch.float64)
    y = model(x)
    with nnj.collect("ggn_diag"):
        loss(y, y).backward()
    expected = torch.full((2,), 6.0 * N, dtype=torch.float64)
    torch.testing.assert_close(model[2].bias.ggn_diag, expected)


def test_squares_that_come_later_and_squares_that_are_there() -> None:
    """Terms of both forms add up in any order."""

    class Later:
        def __init__(self, value: float):
            self.sum = torch.tensor(value)

        def add_(self, other: Later) -> Later:
            self.sum.add_(other.sum)
            return self

        def value(self) -> Tensor:
            return 10 * self.sum

    there, later = (lambda: SquareSum(torch.tensor(1.0))), (lambda: SquareSum(later=Later(2.0)))
    for terms, expected in (
        ((there(), there()), 2.0),
        ((later(), later()), 40.0),
        ((there(), later(), there()), 22.0),
        ((later(), there(), later()), 41.0),
    ):
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        assert float(total.value()) == expected


def test_what_must_be_defined() -> None:
    for name in ("dense", "columns"):
        with pytest.raises(NotImplementedError, match=f"Factor must define {name}"):
            getattr(nnj.Factor(), name)(*([slice(0, 1)] if name == "columns" else []))
    h = nnj.LossHessian([(2, 3)], torch.zeros(()), 3, 1)
    with pytest.raises(NotImplementedError, match="LossHessian must define columns"):
        h.columns(0, 1)


def test_one_use_is_that_use() -> None:
    factor = Ours(torch.randn(2, 3, 4))
    assert merge_uses([factor]) is factor
