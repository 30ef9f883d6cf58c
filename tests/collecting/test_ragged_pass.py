"""With a tolerance each sample walks its own number of columns, and the sums are those of the dense
Jacobian with exactly these columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import nnj
from nnj.collecting import ragged_pass
from nnj.loss_hessian.column_selection import PackedColumns, RaggedColumns
from nnj.propagation.some_samples import SweepOfSome
from nnj.registry.loss_rules import ask_loss_rule
from nnj.registry.manager import use

N, C = 10, 6


class Residual(nn.Module):
    """Convolutions with functions between, an addition in place, and what the cases add."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 5, padding=2)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.shift = nn.Parameter(torch.randn(4, 1, 1)) if kind == "bare" else None
        self.head = nn.Linear(16, C)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        z = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        more = self.second(z)
        if self.kind == "twice":
            more = self.second(more.tanh())
        if self.shift is not None:
            more = more * self.shift
        z = F.max_pool2d(F.relu_(z + more), 2)
        z = F.silu(z) if self.kind == "another function" else z
        return self.head(z.flatten(1))


class Plain(nn.Module):
    """A layer that no plugin knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 5), nn.ReLU())


IMAGES, VECTORS = (N, 3, 8, 8), (N, 4)
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "a chain": (lambda: nn.Sequential(chain(), nn.Linear(5, C)), VECTORS),
    "a nonlinear end": (lambda: nn.Sequential(chain(), nn.Linear(5, C), nn.Softplus()), VECTORS),
    "convolutions and a sum": (Residual, IMAGES),
    "a layer called twice": (lambda: Residual("twice"), IMAGES),
    "a bare parameter": (lambda: Residual("bare"), IMAGES),
    "a function without a formula": (lambda: Residual("another function"), IMAGES),
    "a layer without a rule": (
        lambda: nn.Sequential(chain(), Plain(), nn.SiLU(), nn.Linear(5, C)),
        VECTORS,
    ),
}


def made(case: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    # of most samples the model is sure
    x = torch.randn(shape, dtype=torch.float64)
    x = x * torch.tensor([0.1, 40, 50, 1, 60, 70, 30, 45, 0.5, 80]).view(-1, *[1] * (x.dim() - 1))
    return model, 20 * x if x.dim() == 2 else x, torch.randint(C, (N,))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many samples each sweep of some of them had; parts cost nothing."""
    found: list[int] = []
    monkeypatch.setattr(ragged_pass, "PART", 0.0)
    run = SweepOfSome.run

    def noted(self: SweepOfSome, *given: Any) -> Any:
        found.append(len(self.of))
        return run(self, *given)

    monkeypatch.setattr(SweepOfSome, "run", noted)
    yield found


def ragged(y: Tensor, target: Tensor, tol: float) -> RaggedColumns:
    hessian = ask_loss_rule(nn.CrossEntropyLoss(), torch.tensor(1.0), [y], (y, target), {})
    assert hessian is not None
    return RaggedColumns(hessian, tol)


def truth(model: nn.Module, x: Tensor, target: Tensor, tol: float) -> dict[str, Tensor]:
    """S_kept^T J, (K N, P), at each parameter."""
    own = {key: p.detach() for key, p in model.named_parameters()}
    y = model(x).detach()
    selection = ragged(y, target, tol)
    s = selection.columns(0, selection.k)[:, :, 0]  # (K, N, C)
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(own)
    return {
        key: torch.einsum("knc,nc...->kn...", s, j).flatten(0, 1) for key, j in jacobians.items()
    }


@pytest.mark.parametrize("tol", [0.3, 0.02, 1e-5])
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_the_columns_that_are_kept(case: str, tol: float, walked: list[int]):
    model, x, target = made(case)
    expected = truth(model, x, target, tol)
    exact = truth(model, x, target, 1e-300)
    selection = ragged(model(x).detach(), target, tol)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", tol=tol) as context:
        nnj.extend(nn.CrossEntropyLoss())(model(x), target).backward()
    assert min(walked[-3:]) < N
    assert (context.columns, context.deficit) == (
        selection.k,
        pytest.approx(selection.dropped / selection.trace),
    )
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    own = {id(p) for p in head.parameters()} if case != "a nonlinear end" else set()
    for key, p in model.named_parameters():
        rows = (exact if id(p) in own else expected)[key]  # H itself is at the last layer
        torch.testing.assert_close(p.ggn_diag, rows.square().sum(0), rtol=1e-9, atol=1e-13)
    for name, m in model.named_modules():
        keys = [f"{name}.{k}".lstrip(".") for k, _ in m.named_parameters(recurse=False)]
        if keys:
            given = exact if m is head and own else expected
            flat = torch.cat([given[key].flatten(1) for key in keys], 1)
            torch.testing.assert_close(m.ggn_block, flat.mT @ flat, rtol=1e-9, atol=1e-13)


def test_memory_makes_more_parts(walked: list[int]):
    model, x, target = made("convolutions and a sum")
    nnj.extend(model)
    found = []
    for memory in (2**28, 1):
        walked.clear()
        with nnj.collect("ggn_diag", tol=1e-5, memory=memory) as context:
            nnj.extend(nn.CrossEntropyLoss())(model(x), target).backward()
        found.append((len(walked), [p.ggn_diag.clone() for p in model.parameters()]))
    assert found[1][0] >= context.columns > found[0][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-15)


def test_what_counts_samples_walks_packed_columns(walked: list[int]):
    """Kronecker factors are of all samples, whatever their columns."""
    model, x, target = made("a chain")
    y = model(x).detach()
    packed = PackedColumns(ragged(y, target, 0.02).hessian, torch.arange(N), 0.02)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "kfac", tol=0.02) as context:
        nnj.extend(nn.CrossEntropyLoss())(model(x), target).backward()
    assert context.columns == packed.k and not walked


def test_samples_that_are_all_alike_walk_packed_columns(walked: list[int]):
    model, x, target = made("a chain")
    nnj.extend(model)
    with nnj.collect("ggn_diag", tol=1e-4):
        nnj.extend(nn.CrossEntropyLoss())(model(x[:1].expand(N, -1)), target).backward()
    assert not walked


class Odd(nn.Linear):
    """A linear layer with a rule of its own."""


def test_a_rule_that_is_wrong_for_some_samples_is_not_asked_for_them(walked: list[int]):
    """It takes the inputs of other samples where there are fewer than in the batch."""

    def rule(m: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        w, seen = m.weight.detach(), x if len(x) == N else x.roll(1, 0)
        return {
            "input": nnj.LinearMap(lambda v: v @ w.T, lambda u: u @ w, x.shape[1:], y.shape[1:], x),
            "weight": nnj.PatchMatmul(
                lambda rows: seen[rows].reshape(-1, 1, x.shape[-1], 1), w.shape, y.shape[1:], x
            ),
            "bias": nnj.ScaleShift(m.bias.shape, y.shape[1:], y),
        }

    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register: nnj.RegisterLayer) -> None:
            register(Odd, rule)

    manager = nnj.PluginManager()
    manager.register(Plugin(), "nnj-odd")
    former = use(manager)
    try:
        _, x, target = made("a chain")
        model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), Odd(5, 5), nn.SiLU(), nn.Linear(5, C))
        model = model.double()
        y = model(x).detach()
        packed = PackedColumns(ragged(y, target, 1e-3).hessian, torch.arange(N), 1e-3)
        nnj.extend(model)
        with nnj.collect("ggn_diag", tol=1e-3) as context:
            nnj.extend(nn.CrossEntropyLoss())(model(x), target).backward()
    finally:
        use(former)
    assert walked == [N // 2] and context.columns == packed.k  # tried, and left


def test_counts_are_the_largest_columns_of_all():
    y = torch.randn(N, C, dtype=torch.float64) * torch.arange(N)[:, None]
    target = torch.randint(C, (N,))
    selection = ragged(y, target, 0.05)
    sizes = selection.hessian.norms()[:, :, 0]
    kept = selection.columns(0, selection.k).square().sum((2, 3))
    assert int(selection.counts.sum()) == int((kept > 0).sum())
    # one column less would be too few
    smallest = kept[kept > 0].min()
    lost = selection.dropped
    assert lost <= 0.05 * selection.trace < lost + smallest
    torch.testing.assert_close(selection.trace, float(sizes.sum()))
    assert lost + float(kept.sum()) == pytest.approx(selection.trace)


def test_parts_cover_each_column_once_for_the_samples_that_have_it():
    y = torch.randn(N, C, dtype=torch.float64) * torch.arange(N)[:, None]
    selection = ragged(y, torch.randint(C, (N,)), 1e-3)
    for fixed in (0.0, 3.0, 1e9):
        parts = selection.parts(fixed)
        assert [a for a, _, _ in parts] == [0, *[b for _, b, _ in parts[:-1]]]
        assert parts[-1][1] == selection.k
        assert all(m == int((selection.counts > a).sum()) for a, _, m in parts)
    assert len(selection.parts(1e9)) == 1 < len(selection.parts(0.0))
