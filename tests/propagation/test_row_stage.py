"""Columns are per row until rows mix, and the sums are those of the dense Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.collecting import column_pass
from nnj.loss_hessian.column_selection import RaggedColumns
from nnj.propagation.row_stage import RowStage, row_stage
from nnj.registry.loss_rules import ask_loss_rule
from nnj.registry.manager import use

N, T, V, D = 3, 4, 5, 6
IDS = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(0))
Y = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))
Y[0, 1] = Y[2, 0] = -100


class Tokens(nn.Module):
    """A language model: attention, a residual MLP, and what the cases add."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind, self.table = kind, nn.Embedding(V, D)
        self.place, self.norm = nn.Parameter(torch.randn(T, D)), nn.LayerNorm(D)
        self.mix = nn.Linear(D, D)
        self.first, self.second = nn.Linear(D, 7), nn.Linear(7, D)
        self.head = nn.Linear(D, V, bias=kind != "tied")
        self.scale = nn.Parameter(torch.randn(D)) if kind == "bare behind the mixing" else None
        if kind == "tied":
            self.head.weight = self.table.weight

    def attend(self, z: Tensor) -> Tensor:
        return z + F.softmax(z @ z.mT / 3, -1) @ self.mix(z)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids.T if self.kind == "sequence first" else ids
        z = self.attend(self.table(ids) + self.place)
        if self.kind == "called on both sides":
            z = z + self.mix(z).tanh()
        if self.kind == "running sum":
            z = z + F.gelu(z).cumsum(1)
        z = z + self.second(F.gelu(self.first(self.norm(z))))
        if self.scale is not None:
            z = z * self.scale
        if self.kind == "sequence first":
            return self.head(z.transpose(0, 1))
        return self.head(z)


def flat(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, V), y.reshape(-1)


def classes_first(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.transpose(1, 2), y


def shifted(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)


def last_places(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z[:, 1::2].transpose(1, 2), y[:, 1::2]


def squares(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.zeros_like(z)


def sequence_first(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.reshape(-1, V), y.T.reshape(-1)


def ids_of(model: Tokens) -> Tensor:
    return IDS.T if model.kind == "sequence first" else IDS


def oracle(model: Tokens, given: Callable[..., Any], loss: nn.Module) -> dict[str, Tensor]:
    """diag(J^T H J), from the dense J of all parameters and the dense H."""
    ids = ids_of(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    out = model(ids).detach()
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (ids,)))(params)
    h = torch.func.hessian(lambda z: loss(*given(z, Y)))(out).reshape(out.numel(), -1)
    found = {}
    for name, j in jacobians.items():
        rows = j.reshape(out.numel(), -1)
        found[name] = (rows * (h @ rows)).sum(0).reshape(params[name].shape)
    return found


def seen(monkeypatch: Any) -> list[RowStage | None]:
    """The stages of each pass."""
    stages: list[RowStage | None] = []

    def noting(*args: Any) -> RowStage | None:
        stages.append(row_stage(*args))
        return stages[-1]

    monkeypatch.setattr(column_pass, "row_stage", noting)
    return stages


def layers(stage: RowStage | None) -> int:
    """How many layers are in the first stage."""
    return 0 if stage is None else sum(s.record is not None for s in stage.sweep.graph.steps)


@contextmanager
def plugin(registers: Callable[[Any], None], what: str) -> Iterator[None]:
    """The installed plugins, and one more."""
    made = type("Plugin", (), {f"nnj_register_{what}": staticmethod(nnj.hookimpl(registers))})
    manager = nnj.PluginManager()
    manager.register(made(), "nnj-odd")
    former = use(manager)
    try:
        yield
    finally:
        use(former)


def check(kind: str, given: Callable[..., Any], loss: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Tokens(kind).double()
    expected = oracle(model, given, loss)
    extended = nnj.extend(model, batch_axis=1 if kind == "sequence first" else 0)
    with nnj.collect("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad", **options):
        nnj.extend(loss)(*given(extended(ids_of(model)), Y)).backward()
    assert [p.grad.isfinite().all() for p in model.parameters()]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, expected[name], msg=name)
    for module in (model.first, model.norm, model.mix):
        whole = torch.cat([p.ggn_diag.flatten() for p in module.parameters()])
        torch.testing.assert_close(module.ggn_block.diagonal(), whole)
    return model


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize(
    ("kind", "given", "loss", "apart"),
    [
        ("", flat, nn.CrossEntropyLoss(), 4),
        ("", classes_first, nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), 4),
        ("", shifted, nn.CrossEntropyLoss(weight=torch.rand(V).double()), 4),
        ("", last_places, nn.CrossEntropyLoss(), 4),
        ("", squares, nn.MSELoss(), 4),
        ("sequence first", sequence_first, nn.CrossEntropyLoss(), 4),
        ("running sum", flat, nn.CrossEntropyLoss(), 4),
        ("bare behind the mixing", flat, nn.CrossEntropyLoss(), 1),
        ("called on both sides", flat, nn.CrossEntropyLoss(), 4),
        ("tied", flat, nn.CrossEntropyLoss(), 0),
    ],
)
def test_tokens(monkeypatch, kind, given, loss, apart, memory):
    stages = seen(monkeypatch)
    check(kind, given, loss, memory=memory)
    assert [layers(stage) for stage in stages] == [apart]


def test_tolerance(monkeypatch):
    """What is lost is at most tol of the trace of H, and no entry is above the exact one."""
    stages = seen(monkeypatch)
    torch.manual_seed(0)
    model = Tokens().double()
    with torch.no_grad():
        model.head.weight *= 8  # some tokens are sure of themselves
    expected, loss = oracle(model, flat, nn.CrossEntropyLoss()), nnj.extend(nn.CrossEntropyLoss())
    nnj.extend(model)
    with nnj.collect("ggn_diag", tol=0.05) as context:
        loss(*flat(model(IDS), Y)).backward()
    assert layers(stages[0]) and 0 < context.deficit <= 0.05
    for name, p in model.named_parameters():
        assert (p.ggn_diag <= expected[name] * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("tol", [0.2, 0.01, 1e-4])
def test_behind_the_mixing_a_sample_has_the_columns_of_its_tokens(tol: float, memory: int):
    """Against the dense Jacobian with exactly the columns that each token keeps."""
    torch.manual_seed(0)
    model = Tokens().double()
    with torch.no_grad():
        model.head.weight *= torch.tensor([30.0, 1, 8, 1, 20]).double()[:, None]
    own = {name: p.detach() for name, p in model.named_parameters()}
    y = model(IDS).detach()
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (IDS,)))(own)
    z, target = flat(y, Y)
    hessian = ask_loss_rule(nn.CrossEntropyLoss(), torch.tensor(1.0), [z], (z, target), {})
    assert hessian is not None
    selection = RaggedColumns(hessian, tol)
    s = selection.columns(0, selection.k).reshape(selection.k, N, T, V)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", tol=tol, memory=memory) as context:
        nnj.extend(nn.CrossEntropyLoss())(*flat(model(IDS), Y)).backward()
    assert context.columns == int(selection.counts.view(N, T).sum(1).max())
    assert context.deficit == pytest.approx(selection.dropped / selection.trace)
    for name, p in model.named_parameters():
        rows = torch.einsum("kntv,ntv...->knt...", s, jacobians[name]).flatten(0, 2)
        if "head" not in name:  # there H itself is
            torch.testing.assert_close(p.ggn_diag, rows.square().sum(0), rtol=1e-9, atol=1e-13)


def test_a_token_is_one_column_of_the_head():
    """A quantity sees C - 1 columns with N T rows in the first stage, T (C - 1) with N behind."""
    found: dict[str, set[tuple[int, int]]] = {}
    names: dict[Tensor, str] = {}

    class Sizes(nnj.Quantity):
        def parameter(self, factor: Any, total_columns: int) -> Tensor:
            shapes = [name for p, name in names.items() if tuple(p.shape) == tuple(factor.shape)]
            for name in shapes:
                found.setdefault(name, set()).add((factor.k, factor.n))
            return factor.square_sum()

    torch.manual_seed(0)
    model = nnj.extend(Tokens().double())
    names.update({p: n for n, p in model.named_parameters() if n in ("first.weight", "place")})

    with plugin(lambda register: register("sizes_of_factors", Sizes), "quantities"):
        with nnj.collect("sizes_of_factors"):
            nnj.extend(nn.CrossEntropyLoss())(*flat(model(IDS), Y)).backward()
    assert found["first.weight"] == {(V - 1, N * T)}
    assert found["place"] == {((V - 1) * T, N)}


class Rolled(nn.Linear):
    """A linear layer that also shifts the tokens, with a rule of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.roll(1, 1) if x.dim() > 2 else x, self.weight, self.bias)


def test_a_rule_that_says_something_else_of_rows():
    """Asked for rows it leaves out the shift; that is seen, and the layer is in the second
    stage.
    """

    def rule(m: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        turn = (lambda t, n: t.roll(n, 1)) if x.dim() > 2 else (lambda t, n: t)
        w = m.weight.detach()
        return {
            "input": nnj.LinearMap(
                lambda v: turn(v, 1) @ w.T, lambda u: turn(u @ w, -1), x.shape[1:], y.shape[1:], x
            ),
            "weight": nnj.PatchMatmul(
                lambda rows: (
                    turn(x[rows], 1).reshape(len(x[rows]), -1, 1, x.shape[-1]).movedim(1, -1)
                ),
                m.weight.shape,
                y.shape[1:],
                x,
            ),
            "bias": nnj.ScaleShift(m.bias.shape, y.shape[1:], y),
        }

    with plugin(lambda register: register(Rolled, rule), "layers"):
        torch.manual_seed(0)
        model = Tokens().double()
        model.first = Rolled(D, 7).double()
        expected = oracle(model, flat, nn.CrossEntropyLoss())
        nnj.extend(model)
        with nnj.collect("ggn_diag"):
            nnj.extend(nn.CrossEntropyLoss())(*flat(model(IDS), Y)).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.ggn_diag, expected[name], msg=name)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(T).eval(), nn.GroupNorm(2, T), nn.Conv1d(T, T, 1)]
)
def test_a_rule_that_fails_for_rows(layer):
    """One that takes the tokens for channels knows nothing of a call with rows for samples."""
    torch.manual_seed(0)
    model = Tokens().double()
    model.norm = layer.double()
    expected = oracle(model, flat, nn.CrossEntropyLoss())
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.CrossEntropyLoss())(*flat(model(IDS), Y)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, expected[name], msg=name)
