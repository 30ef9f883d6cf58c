"""A model as a linear map of its parameters: every product against a dense Jacobian, under every
kind of metric.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.live import LiveBytes

N = 4


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Tokens(nn.Module):
    """A shared table, attention, tied weights, and outputs at each token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.table.weight

    def forward(self, t):
        h = self.table(t)
        return self.out(h + self.attend(h, h, h)[0])


class Named(nn.Module):
    """Called with named arguments; one parameter is frozen and one is not used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(2, 2)
        self.c = nn.Linear(5, 3)
        self.b.bias.requires_grad_(False)

    def forward(self, x, *, z):
        return {"logits": self.c(torch.tanh(self.a(x) * self.b(z)))}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 3))


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


CASES: dict[str, Any] = {
    "mlp": (mlp, some(N, 3)),
    "one linear layer": (lambda: nn.Linear(3, 5), some(N, 3)),
    "one sample": (mlp, some(1, 3)),
    "places behind places": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        some(N, 2, 3),
    ),
    "convolution": (Conv, some(N, 2, 4, 4)),
    "tokens": (Tokens, torch.arange(N * 3).reshape(N, 3) % 7),
    "named": (Named, {"x": some(N, 3), "z": some(N, 2)}),
}


def made(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    make, x = CASES[name]
    model = make().double()
    forward = (lambda model, x: model(**x)["logits"]) if name == "named" else None
    return model, x, forward


def dense(model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """y and J, (N, C, P)."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def f(params: dict[str, Tensor]) -> Tensor:
        given = ((), x) if isinstance(x, dict) else ((x,), {})
        y = torch.func.functional_call(model, params, *given)
        return y["logits"] if isinstance(y, dict) else y

    y = f(params).detach()
    j = torch.func.jacrev(f)(params)
    n = len(y)
    rows = [t.reshape(n, -1, params[name].numel()) for name, t in j.items()]
    return y, torch.cat(rows, 2)


def psd(p: int) -> Tensor:
    root = some(p, p)
    return root @ root.mT / p


@pytest.mark.parametrize("memory", [1, 1 << 28])
@pytest.mark.parametrize("name", CASES)
def test_all_products(name, memory):
    model, x, forward = made(name)
    at = nnj.linearize(model, x, forward=forward, memory=memory)
    y, j = dense(model, x)
    n, c, p = j.shape
    close = torch.testing.assert_close
    close(at.y, y)
    close(at.jacobian(), j)
    assert at.jacobian().is_contiguous()
    v, u = some(p), some(n, c)
    close(at.jvp(v), (j @ v).reshape(y.shape))
    each = some(n, p)
    close(at.jvp(each), torch.einsum("ncp,np->nc", j, each).reshape(y.shape))
    close(at.vjp(u), torch.einsum("ncp,nc->np", j, u))
    close(at.vjp(u.reshape(y.shape)), torch.einsum("ncp,nc->np", j, u))
    metrics = {
        "identity": (None, torch.eye(p).double()),
        "diagonal": (some(p).abs(), None),
        "joint": (psd(p), psd(p)),
    }
    for m, full in metrics.values():
        full = torch.diag(m) if full is None else full
        expected = j @ full @ j.mT
        close(at.covariance(m), expected)
        close(at.variance(m), expected.diagonal(dim1=1, dim2=2))
        close(at.kernel(M=m), torch.einsum("ncp,pq,mdq->ncmd", j, full, j))
    expected = torch.einsum("ncp,np,ndp->ncd", j, each.abs(), j)
    close(at.covariance(diag=each.abs()), expected)
    close(at.variance(diag=each.abs()), expected.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("memory", [1, 1 << 28])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantity", ["ggn_diag", "ggn_block", "kfac", "ekfac"])
def test_matrices_of_curvature(name, quantity, memory):
    model, x, forward = made(name)
    _, j = dense(model, x)
    nnj.extend(model)
    with nnj.collect(quantity) as context:
        out = model(**x)["logits"] if isinstance(x, dict) else model(x)
        nnj.extend(nn.MSELoss())(out, torch.zeros_like(out)).backward()
    m = context.matrix(quantity).inverse(0.5)
    at = nnj.linearize(model, x, forward=forward, memory=memory)
    assert at.names == list(m.layout.shapes)
    expected = j @ m.dense() @ j.mT
    torch.testing.assert_close(at.covariance(m), expected)
    torch.testing.assert_close(at.variance(m), expected.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(at.kernel(M=m), torch.einsum("ncp,pq,mdq->ncmd", j, m.dense(), j))


def test_some_modules():
    model, x, _ = made("mlp")
    _, j = dense(model, x)
    at = nnj.linearize(model, x, modules=[model[3], model[0]])
    where = torch.cat([torch.arange(20), torch.arange(20 + 36, 20 + 36 + 21)])
    assert at.names == ["0.weight", "0.bias", "3.weight", "3.bias"]
    torch.testing.assert_close(at.jacobian(), j[..., where])
    whole = nnj.fit(model, nn.MSELoss(), [(x, torch.zeros(N, 3).double())], "kfac").matrix("kfac")
    m = whole.dense()[where[:, None], where]
    torch.testing.assert_close(at.covariance(whole), j[..., where] @ m @ j[..., where].mT)
    one = nnj.linearize(model, x, modules=model[3])
    torch.testing.assert_close(one.jacobian(), j[..., 56:])
    torch.testing.assert_close(one.variance(), j[..., 56:].square().sum(-1))


def test_a_kernel_between_other_inputs():
    model, x, _ = made("convolution")
    other = some(3, 2, 4, 4)
    (_, j), (_, i) = dense(model, x), dense(model, other)
    found = nnj.linearize(model, x).kernel(nnj.linearize(model, other))
    torch.testing.assert_close(found, torch.einsum("ncp,mdp->ncmd", j, i))
    with pytest.raises(nnj.NNJError, match=r"^a kernel is between a model at two inputs, in the"):
        nnj.linearize(model, x).kernel(nnj.linearize(Conv().double(), other))


def test_what_it_says_it_is():
    at = nnj.linearize(nn.Linear(3, 5), some(N, 2, 3).float())
    assert repr(at) == "Linearized(4 samples, 10 outputs of each, 20 parameters)"


def test_a_tuple_and_logits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x, z):
            return type("Output", (), {"logits": self.a(x * z)})()

    model = Two().double()
    x, z = some(N, 3), some(N, 3) + 1
    at = nnj.linearize(model, (x, z))
    torch.testing.assert_close(at.y, model.a(x * z).detach())
    torch.testing.assert_close(
        at.jvp(torch.ones(8).double()), ((x * z).sum(1) + 1)[:, None].expand(-1, 2)
    )


def test_the_model_is_left_as_it_was():
    model, x, _ = made("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    at = nnj.linearize(model, x)
    at.covariance()
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        model[0].weight.add_(1)
    fresh = nnj.linearize(model, x)
    assert not torch.equal(fresh.y, at.y)


WRONG: dict[str, Any] = {
    "M": (lambda at: at.covariance(torch.ones(3).double()), r"^M has shape \(3,\), expected \("),
    "dtype": (lambda at: at.variance(torch.ones(77)), r"^M is torch.float32 on cpu, expected"),
    "both": (lambda at: at.variance(torch.ones(77), diag=torch.ones(77)), r"^diag= takes the"),
    "no tensor": (lambda at: at.covariance("kfac"), r"^M is str, expected a tensor$"),
    "v": (lambda at: at.jvp(torch.ones(4).double()), r"^v has shape \(4,\), expected \(77,\) or"),
    "other names": (
        lambda at: at.covariance(nnj.matrices.Diagonal({"w": (77,)}, torch.ones(77).double())),
        r"^M says nothing of 0.weight, 0.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ask, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit(ask, message):
    model, x, _ = made("mlp")
    with pytest.raises(nnj.NNJError, match=message):
        ask(nnj.linearize(model, x))


def test_what_cannot_be_linearised():
    model, x, _ = made("mlp")
    with pytest.raises(
        nnj.NNJError, match=r"^modules= names Linear, which is no module of the Seq"
    ):
        nnj.linearize(model, x, modules=[nn.Linear(2, 2)])
    with pytest.raises(nnj.NNJError, match=r"^modules=\[\] names no module"):
        nnj.linearize(model, x, modules=[])
    with pytest.raises(nnj.NNJError, match=r"^x is str, expected a tensor"):
        nnj.linearize(model, "x")
    with pytest.raises(TypeError, match=r"^products are those of a torch.nn.Module"):
        nnj.linearize(lambda x: x, x)
    named, inputs, _ = made("named")
    with pytest.raises(nnj.NNJError, match=r"^Named gave dict; products need one tensor"):
        nnj.linearize(named, inputs)


class Wide(nn.Sequential):
    """Columns are large beside the parameters and beside what is asked for."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(8),
            nn.Flatten(),
            nn.Linear(24, 12),
        )


PRODUCTS: dict[str, Any] = {
    "covariance": lambda model, x, v, at: at.covariance(v),
    "covariance, a matrix": lambda model, x, v, at: at.covariance(
        nnj.matrices.Diagonal({name: p.shape for name, p in model.named_parameters()}, v)
    ),
    "variance": lambda model, x, v, at: at.variance(v),
    "variance, for each sample": lambda model, x, v, at: at.variance(diag=v.expand(N, -1)),
    "kernel": lambda model, x, v, at: at.kernel(M=v),
    "jmjTp": lambda model, x, v, at: nnj.jmjTp(
        model, x, v, "weight", from_diag=True, memory=at._at.memory
    ),
    "jTmjp, to_diag": lambda model, x, v, at: nnj.jTmjp(
        model, x, None, "weight", to_diag=True, memory=at._at.memory
    ),
    "ntk": lambda model, x, v, at: nnj.ntk(model, x, memory=at._at.memory),
    "ntk, per_class": lambda model, x, v, at: nnj.ntk(
        model, x, per_class=True, memory=at._at.memory
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_less_memory_is_less_at_once(name):
    """The same numbers, and a lower peak the less is allowed, within the budget."""
    torch.manual_seed(0)
    model, x = Wide().double(), some(N, 1, 16, 16)
    v = some(sum(p.numel() for p in model.parameters())).abs()
    results, peaks = [], []
    for memory in (1 << 28, 1 << 22, 1):
        at = nnj.linearize(model, x, memory=memory)
        PRODUCTS[name](model, x, v, at)  # its graph is verified once
        with LiveBytes() as live:
            results.append(PRODUCTS[name](model, x, v, at))
        peaks.append(live.peak)
        torch.testing.assert_close(results[-1], results[0])
    assert peaks[0] > 1.25 * peaks[1] > 1.25 * 1.25 * peaks[2] and peaks[1] <= 1 << 22, peaks


@pytest.mark.parametrize("memory", ["x", None, -5, True])
def test_what_is_no_memory(memory):
    message = f"^memory={memory!r}: the bytes that columns may take are a number, at least 0"
    model, x, _ = made("mlp")
    for ask in (
        lambda: nnj.linearize(model, x, memory=memory),
        lambda: nnj.ntk(model, x, memory=memory),
        lambda: nnj.jmjTp(model, x, None, "weight", memory=memory),
        lambda: nnj.jTmjp(model, x, memory=memory),
        lambda: nnj.jTmjp_pair(model, x, x, memory=memory),
    ):
        with pytest.raises(nnj.NNJError, match=message):
            ask()
