"""EKFAC: the trace of G always, no larger an error than KFAC's, and bases of its own or given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj

N, CLASSES = 9, 5


class Mixed(nn.Module):
    """A table, a convolution, a norm, a layer used twice and a bare matrix."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.low = nn.Parameter(torch.randn(6, 2))
        self.head = nn.Linear(2, CLASSES)

    def forward(self, t: Tensor) -> Tensor:
        h = self.norm(self.conv(self.table(t).mT).mT)
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.head((h @ self.low).mean(1))


def mixed() -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nnj.extend(Mixed().double())
    t, y = torch.randint(7, (N, 5)), torch.randint(CLASSES, (N,))
    return model, nnj.extend(nn.CrossEntropyLoss()), t, y


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_traces_and_errors(approx, memory):
    model, loss, t, y = mixed()
    with nnj.collect("kfac", "ekfac", "ggn_block", approx=approx, memory=memory):
        loss(model(t), y).backward()
    found = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert len(found) == 6
    for m in found:
        g, kfac, ekfac = m.ggn_block, m.kfac.dense(), m.ekfac.dense()
        torch.testing.assert_close(m.ekfac.trace(), g.trace(), rtol=1e-12, atol=0)
        assert (ekfac - g).norm() <= (kfac - g).norm() * (1 + 1e-12)


def test_values_are_the_moments_in_the_eigenvectors():
    model, loss, t, y = mixed()
    with nnj.collect("kfac", "ekfac", "ggn_block"):
        loss(model(t), y).backward()
    m = model.twice
    (_, left), (_, right) = (torch.linalg.eigh(side[0]) for side in (m.kfac.left, m.kfac.right))
    q = torch.kron(left, right)
    order = [*range(36), *range(36, 42)]  # of the block: weight, then bias
    grid = [o * 7 + i for o in range(6) for i in range(6)] + [o * 7 + 6 for o in range(6)]
    g = torch.zeros(42, 42).double()
    g[torch.tensor(grid)[:, None], torch.tensor(grid)] = m.ggn_block[order][:, order]
    moments = (q.mT @ g @ q).diagonal()
    torch.testing.assert_close(m.ekfac.eigenvalues(), moments.sort().values)


def test_where_kfac_is_exact_so_is_ekfac():
    torch.manual_seed(1)
    model = nnj.extend(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double())
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect("ekfac", "ggn_block"):
        loss(model(torch.randn(N, 4).double()), torch.randn(N, 3).double()).backward()
    for m in model:
        torch.testing.assert_close(m.ekfac.dense(), m.ggn_block, rtol=1e-11, atol=1e-13)


def test_a_data_set_is_read_twice():
    model, loss, t, y = mixed()
    with nnj.collect("ekfac", "kfac") as context:
        loss(model(t), y).backward()
    whole = {name: context.matrix(name).dense() for name in ("ekfac", "kfac")}
    batches = [(t[:4], y[:4]), (t[4:], y[4:])]
    fit = nnj.fit(model, nn.CrossEntropyLoss(), batches, "kfac", "ekfac", scale="mean")
    for name, expected in whole.items():
        torch.testing.assert_close(fit.matrix(name).dense(), expected)
    with pytest.raises(nnj.NNJError, match=r"^ekfac: the data are read twice, and an iterator"):
        nnj.fit(model, nn.CrossEntropyLoss(), iter(batches), "ekfac")


def test_a_basis_of_an_earlier_kfac():
    model, _, t, y = mixed()
    batches = [(t[:4], y[:4]), (t[4:], y[4:])]
    summed = nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    kfac = nnj.fit(model, nn.CrossEntropyLoss(), batches, "kfac")
    expected = nnj.fit(model, nn.CrossEntropyLoss(), batches, "ekfac").matrix("ekfac").dense()
    for basis in (kfac, kfac["kfac"]):
        with nnj.collect("ekfac", basis=basis) as context:
            for part in batches:
                summed(model(part[0]), part[1]).backward()
        torch.testing.assert_close(context.matrix("ekfac").dense(), expected)
    once = nnj.fit(model, nn.CrossEntropyLoss(), iter(batches), "ekfac", basis=kfac)
    torch.testing.assert_close(once.matrix("ekfac").dense(), expected)
    parts = [nnj.fit(model, nn.CrossEntropyLoss(), [part], "ekfac", basis=kfac) for part in batches]
    torch.testing.assert_close(nnj.Fit.merge(parts).matrix("ekfac").dense(), expected)


def test_a_second_pass_has_other_eigenvectors():
    model, loss, t, y = mixed()
    message = r"^ekfac: two backward passes, losses or fits have eigenvectors of their own"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ekfac"):
        for part in (slice(0, 4), slice(4, 9)):
            loss(model(t[part]), y[part]).backward()
    fits = [
        nnj.fit(model, nn.CrossEntropyLoss(), [(t[part], y[part])], "ekfac")
        for part in (slice(0, 4), slice(4, 9))
    ]
    with pytest.raises(nnj.NNJError, match=message):
        nnj.Fit.merge(fits)


def test_what_is_no_basis():
    model, loss, t, y = mixed()
    with pytest.raises(nnj.NNJError, match=r"^ekfac: basis= takes an earlier kfac: .* not int$"):
        nnj.collect("ekfac", basis=3)
    some = nnj.fit(model, nn.CrossEntropyLoss(), [(t, y)], "kfac", modules=[model.head])
    message = r"^ekfac: basis= says nothing of the module '\w*'"
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("ekfac", basis=some):
        loss(model(t), y).backward()
    model.head.bias.requires_grad_(False)
    message = r"^ekfac: the basis is over .* Give a kfac of this model, with the same parameters"
    with (
        pytest.raises(nnj.NNJError, match=message),
        nnj.collect("ekfac", basis=some, modules=[model.head]),
    ):
        loss(model(t), y).backward()
    with pytest.raises(nnj.NNJError, match=r"^ekfac of fisher='forward' is kfac of it"):
        nnj.collect("ekfac", fisher="forward")


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_other_columns(fisher):
    model, loss, t, y = mixed()
    options: dict[str, Any] = {"fisher": fisher}
    if fisher == "mc":
        options |= {"samples": 2000, "generator": torch.Generator().manual_seed(0)}
    with nnj.collect("ekfac", "batch_grad", "ggn_block", **options):
        loss(model(t), y).backward()
    m = model.head
    rows = torch.cat([p.batch_grad.flatten(1) for p in m.parameters()], 1)
    g = m.ggn_block if fisher == "mc" else rows.mT @ rows
    tolerance = 0.1 if fisher == "mc" else 1e-12
    assert abs(m.ekfac.trace() / g.trace() - 1) < tolerance
    assert (m.ekfac.dense() - g).norm() < 0.6 * g.norm()


def test_compiled_as_eager():
    """On other data than it was traced with, whose eigenvectors are others."""
    model, loss, t, y = mixed()
    step = nnj.compile(model, loss, "ekfac", backend="aot")
    for _ in range(5):
        t, y = torch.randint(7, t.shape), torch.randint(CLASSES, y.shape)
        _, results = step(t, y)
        assert len(results["ekfac"]) == 6
        with nnj.collect("ekfac"):
            loss(model(t), y).backward()
        for name, matrix in results["ekfac"].items():
            torch.testing.assert_close(matrix.dense(), model.get_submodule(name).ekfac.dense())
    assert step.replays >= 2 and step.reasons == []
