"""Models that take and give several tensors, traced and exported ones: all three quantities against
dense derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj

r = torch.randn
N = 3


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Join(nn.Module):
    """Two tensors in, two out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 3), nn.Linear(2, 3), nn.Parameter(r(3))

    def forward(self, x, y=None):
        x, y = x if y is None else (x, y)
        h = torch.tanh(self.a(x)) * self.scale + self.b(y)
        return h, torch.sigmoid(h) * self.b(y)


class Model(nn.Module):
    """One part takes a tuple or several tensors, and gives several; `give` says what the model
    makes of its two results.
    """

    def __init__(self, give=lambda a, b: a + b, take="tuple"):
        super().__init__()
        self.stem, self.join, self.head, self.give, self.take = (
            nn.Linear(4, 4),
            Join(),
            nn.Linear(3, 3),
            give,
            take,
        )

    def forward(self, x, y):
        z = F.gelu(self.stem(x))
        a, b = (
            self.join((z, y))
            if self.take == "tuple"
            else self.join(z, y=y)
            if self.take == "named"
            else self.join(z, y)
        )
        return self.give(self.head(a), self.head(b))


class Cell(nn.Module):
    """A state that is a tuple goes from step to step."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 3), nn.Linear(3, 3)

    def forward(self, x, y):
        state = None
        for step in (y, x[:, :2], x[:, 2:]):
            state = self.cell(step, state)
        return self.head(state[0]) + state[1]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Model(lambda a, b: {"a": a, "rest": [b, (a * b,)]}), nn.Linear(3, 3)

    def forward(self, batch):
        out = self.one(*batch["inputs"])
        return self.two(out["a"]) + out["rest"][0] + out["rest"][1][0]


def first(out):
    return out[0]


MODELS: dict[str, tuple[Any, Any, Any]] = {  # how it is made, called, and its logits taken
    "tuple-argument": (Model, lambda m, x, y: m(x, y), lambda out: out),
    "several-arguments": (lambda: Model(take="several"), lambda m, x, y: m(x, y), lambda out: out),
    "named-argument": (lambda: Model(take="named"), lambda m, x, y: m(x, y=y), lambda out: out),
    "tuple-output": (lambda: Model(lambda a, b: (a, b)), lambda m, x, y: m(x, y), first),
    "list-output": (lambda: Model(lambda a, b: [b, a]), lambda m, x, y: m(x, y), first),
    "named-tuple-output": (lambda: Model(Pair), lambda m, x, y: m(x, y), lambda out: out.logits),
    "dict-output": (
        lambda: Model(lambda a, b: {"logits": a, "aux": {"b": b}}),
        lambda m, x, y: m(x, y),
        lambda out: out["logits"] * out["aux"]["b"],
    ),
    "dataclass-output": (
        lambda: Model(lambda a, b: Output(a, (b,))),
        lambda m, x, y: m(x, y),
        lambda out: out.logits - out.hidden[0],
    ),
    "none-in-the-output": (
        lambda: Model(lambda a, b: (a, None, "text", 3)),
        lambda m, x, y: m(x, y),
        first,
    ),
    "state-tuple": (Cell, lambda m, x, y: m(x, y), lambda out: out),
    "dict-argument": (Nested, lambda m, x, y: m({"inputs": [x, y]}), lambda out: out),
    "tuple-of-a-module-alone": (Join, lambda m, x, y: m((x, y)), lambda out: out[1]),
}


def data() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return r(N, 4, dtype=torch.float64), r(N, 2, dtype=torch.float64), torch.randint(3, (N,))


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def check(model: nn.Module, twin: nn.Module, call: Any, logits: Any) -> None:
    """ggn_diag, ggn_block and batch_grad of `model` against dense derivatives of its twin, which
    has the same parameters.
    """
    x, y, t = data()
    params = {name: p.detach().clone() for name, p in twin.named_parameters()}
    forward = lambda p: logits(
        torch.func.functional_call(
            _Called(twin, call), {f"model.{k}": v for k, v in p.items()}, (x, y)
        )
    )
    j = {name: d.detach() for name, d in torch.func.jacrev(forward)(params).items()}
    z = forward(params).detach()
    h = torch.func.hessian(lambda z: F.cross_entropy(z, t))(z)
    g = torch.func.grad(lambda z: F.cross_entropy(z, t))(z)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        nnj.extend(nn.CrossEntropyLoss())(logits(call(model, x, y)), t).backward()
    reached = 0
    for name, p in model.named_parameters():
        if p.grad is None:
            assert not j[name].any() and p.ggn_diag is None
            continue
        reached += 1
        close = lambda found, expected: torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-12
        )
        close(p.ggn_diag, torch.einsum("abcd,ab...,cd...->...", h, j[name], j[name]))
        close(p.batch_grad, torch.einsum("na,na...->n...", g, j[name]))
    assert reached
    for path, m in model.named_modules():
        own = [
            f"{path}.{name}".strip(".")
            for name, p in m.named_parameters(recurse=False)
            if p.grad is not None
        ]
        if own:
            d = torch.cat([j[name].flatten(2) for name in own], 2)
            close(m.ggn_block, torch.einsum("abcd,abp,cdq->pq", h, d, d))


class _Called(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x, y):
        return self.call(self.model, x, y)


@pytest.mark.parametrize("name", MODELS)
def test_tuples(name):
    make, call, logits = MODELS[name]
    check(made(make), made(make), call, logits)


@pytest.mark.parametrize(
    "name",
    [
        "tuple-argument",
        "several-arguments",
        "named-argument",
        "tuple-output",
        "dict-output",
        "state-tuple",
    ],
)
def test_traced_by_fx(name):
    """A GraphModule calls the layers of the model, and takes bare parameters as attributes."""
    make, call, logits = MODELS[name]
    traced = torch.fx.symbolic_trace(made(make))
    check(traced, made(make), call, logits)


def test_traced_after_extending():
    """Copies of extended layers keep their hooks; the traced whole has a call of its own to say
    what a sample is.
    """
    make, call, logits = MODELS["tuple-argument"]
    traced = torch.fx.symbolic_trace(nnj.extend(made(make)))
    check(traced, made(make), call, logits)


@pytest.mark.parametrize("name", ["tuple-argument", "tuple-output", "state-tuple"])
def test_exported(name):
    """An exported program has no layers at all: its parameters are bare."""
    make, call, logits = MODELS[name]
    x, y, _ = data()
    exported = torch.export.export(made(make), (x, y)).module()
    check(exported, made(make), call, logits)


def test_two_outputs_in_two_losses():
    model, (x, y, t) = made(MODELS["tuple-output"][0]), data()
    twin = made(MODELS["tuple-output"][0])
    params = {name: p.detach().clone() for name, p in twin.named_parameters()}
    j = [
        torch.func.jacrev(lambda p, i=i: torch.func.functional_call(twin, p, (x, y))[i])(params)
        for i in (0, 1)
    ]
    a, b = (z.detach() for z in twin(x, y))
    h = [
        torch.func.hessian(lambda z: F.cross_entropy(z, t))(a),
        torch.func.hessian(lambda z: z.square().mean())(b),
    ]
    nnj.extend(model)
    ce, mse = nnj.extend(nn.CrossEntropyLoss()), nnj.extend(nn.MSELoss())
    with nnj.collect("ggn_diag"):
        a, b = model(x, y)
        (ce(a, t) + mse(b, torch.zeros_like(b))).backward()
    for name, p in model.named_parameters():
        expected = sum(
            torch.einsum("abcd,ab...,cd...->...", h[i], j[i][name], j[i][name]) for i in (0, 1)
        )
        torch.testing.assert_close(p.ggn_diag, expected.detach(), rtol=1e-9, atol=1e-12)
