"""collect(tol=…): a lower bound with a known deficit, of fewer columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj

C = 12


class Offset(nn.Module):
    """x + b: the trace of its block is the trace of the Hessians that have arrived."""

    def __init__(self, *shape: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b


def soft(y: Tensor) -> Tensor:
    """A loss without a rule, with blocks that are full."""
    return (
        (y @ torch.linspace(-1, 1, C * C).reshape(C, C).sin().to(y)).cosh().sum(-1) / 1000
    ).mean() + (y**4).mean()


def logits(*shape: int, sharp: float = 4.0) -> Tensor:
    return sharp * torch.randn(
        *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def labels(*shape: int) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


def masked(n: int, t: int) -> Tensor:
    y = labels(n, t)
    y[:, 3:], y[0, 1:] = -100, -100
    return y


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Tensor, tuple[Tensor, ...]]]] = {
    "a row for each sample": lambda: (
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, C), Offset(C)),
        nn.CrossEntropyLoss(),
        logits(8, 9),
        (labels(8),),
    ),
    "a linear head": lambda: (
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, C)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        logits(8, 9, sharp=9.0),
        (labels(8),),
    ),
    "places": lambda: (
        nn.Sequential(nn.Conv1d(3, C, 2), Offset(C, 5)),
        nn.CrossEntropyLoss(reduction="sum"),
        logits(4, 3, 6),
        (masked(4, 5),),
    ),
    "rows of a sample": lambda: (
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, C), Offset(C), nn.Flatten(0, 1)),
        nn.CrossEntropyLoss(),
        logits(4, 5, 5),
        (masked(4, 5).flatten(),),
    ),
    "entries": lambda: (
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, C)),
        nn.BCEWithLogitsLoss(),
        logits(8, 9, sharp=20.0),
        (torch.rand(8, C, dtype=torch.float64),),
    ),
    "no rule": lambda: (
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, C), Offset(C)),
        soft,
        logits(8, 9),
        (),
    ),
    "one sample": lambda: (
        nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, C), Offset(C)),
        nn.CrossEntropyLoss(),
        logits(1, 9),
        (labels(1),),
    ),
}


def collected(name: str, **options: Any) -> tuple[dict[str, Tensor], nnj.collect]:
    """Blocks of the modules, whose diagonals agree with ggn_diag."""
    torch.manual_seed(0)
    model, loss, x, targets = CASES[name]()
    model, loss = nnj.extend(model.double()), nnj.extend(loss)
    with nnj.collect("ggn_diag", "ggn_block", **options) as context:
        loss(model(x), *targets).backward()
    blocks = {path: m.ggn_block for path, m in model.named_modules() if hasattr(m, "ggn_block")}
    for path, block in blocks.items():
        diag = torch.cat(
            [p.ggn_diag.flatten() for p in model.get_submodule(path).parameters(recurse=False)]
        )
        torch.testing.assert_close(diag, block.diagonal(), rtol=1e-9, atol=1e-12)
    return blocks, context


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("tol", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_a_lower_bound_with_a_known_deficit(name: str, tol: float, memory: int) -> None:
    exact, whole = collected(name)
    found, context = collected(name, tol=tol, memory=memory)
    assert (
        whole.deficit == 0 and 0 <= context.deficit <= tol and 1 <= context.columns <= whole.columns
    )
    assert found.keys() == exact.keys() and found
    offsets = [path for path, m in CASES[name]()[0].named_modules() if isinstance(m, Offset)]
    for path, block in found.items():
        assert (
            torch.linalg.eigvalsh(exact[path] - block).min() > -1e-12 * exact[path].abs().max()
        ), path
    for path in offsets:
        torch.testing.assert_close(found[path].trace(), (1 - context.deficit) * exact[path].trace())


@pytest.mark.parametrize("name", CASES)
def test_fewer_columns_cannot_do(name: str) -> None:
    """One column less, and more would be lost than is allowed."""
    _, whole = collected(name)
    previous = None
    for tol in (0.5, 0.2, 0.05, 1e-2, 1e-3, 1e-6):
        _, context = collected(name, tol=tol)
        if previous is not None and context.columns > previous.columns:
            assert previous.deficit > tol
        previous = context
    assert previous.columns <= whole.columns


@pytest.mark.parametrize(("classes", "columns"), [(50, 3), (200, 3)])
def test_the_cost_follows_the_uncertainty(classes: int, columns: int) -> None:
    """Four classes in doubt need three columns, whatever the number of classes; a sure sample needs
    none of its own.
    """
    torch.manual_seed(0)
    model = nnj.extend(nn.Sequential(Offset(classes))).double()
    z = torch.full((6, classes), -30.0, dtype=torch.float64)
    z[:, :4], z[5, 0] = torch.randn(6, 4, dtype=torch.float64), 1000.0
    with nnj.collect("ggn_diag", tol=1e-6) as context:
        nnj.extend(nn.CrossEntropyLoss())(model(z), torch.zeros(6, dtype=torch.long)).backward()
    p = z.softmax(1)
    torch.testing.assert_close(model[0].b.ggn_diag, (p * (1 - p)).mean(0), rtol=1e-6, atol=1e-9)
    assert context.columns == columns


def test_blocks_that_are_zero_do_not_walk() -> None:
    """What is masked costs nothing, and nothing is lost: 3 of 5 places count at most."""
    _, context = collected("places")
    assert context.columns == 3 * (C - 1)
    _, context = collected("rows of a sample")
    assert context.columns == 3 * (C - 1)


def test_over_several_passes() -> None:
    torch.manual_seed(0)
    model, loss, x, (y,) = CASES["a row for each sample"]()
    model, loss = nnj.extend(model.double()), nnj.extend(loss)
    parts, deficits = [], []
    for half in (slice(0, 3), slice(3, 8)):
        with nnj.collect("ggn_diag", tol=0.05) as context:
            (loss(model(x[half]), y[half])).backward()
        parts.append(model[3].b.ggn_diag.sum())
        deficits.append(context.deficit)
    with nnj.collect("ggn_diag", tol=0.05) as context:
        for half in (slice(0, 3), slice(3, 8)):
            loss(model(x[half]), y[half]).backward()
    wholes = [part / (1 - deficit) for part, deficit in zip(parts, deficits, strict=True)]
    torch.testing.assert_close(model[3].b.ggn_diag.sum(), sum(parts))
    assert context.deficit == pytest.approx(1 - float(sum(parts) / sum(wholes)))
    with context:
        loss(model(x), y).backward()
    assert context.deficit != pytest.approx(1 - float(sum(parts) / sum(wholes)))  # counted anew


def test_in_fit() -> None:
    torch.manual_seed(0)
    model, loss, x, (y,) = CASES["a row for each sample"]()
    model, batches = model.double(), list(zip(x.split(3), y.split(3), strict=True))
    exact = nnj.fit(model, loss, batches, "ggn_diag")
    found = nnj.fit(model, loss, batches, "ggn_diag", tol=0.05)
    assert 0 < found.deficit <= 0.05 and exact.deficit == 0
    torch.testing.assert_close(
        found["ggn_diag"]["3.b"].sum(), (1 - found.deficit) * exact["ggn_diag"]["3.b"].sum()
    )


def test_nested_collections_get_the_stricter_tolerance() -> None:
    exact, _ = collected("a linear head")
    torch.manual_seed(0)
    model, loss, x, targets = CASES["a linear head"]()
    model, loss = nnj.extend(model.double()), nnj.extend(loss)
    with nnj.collect("ggn_diag", tol=0.2) as rough, nnj.collect("ggn_block", tol=1e-12):
        loss(model(x), *targets).backward()
    assert rough.deficit <= 1e-12
    torch.testing.assert_close(model[0].weight.ggn_diag.flatten(), exact["0"].diagonal()[:63])


@pytest.mark.parametrize("tol", [-0.1, 1.0, float("nan")])
def test_errors(tol: float) -> None:
    with pytest.raises(
        nnj.NNJError, match="what may be lost of the trace is a number from 0 to below 1"
    ):
        nnj.collect("ggn_diag", tol=tol)
    with pytest.raises(nnj.NNJError, match="leaves out exact columns, which batch_grad do not use"):
        nnj.collect("batch_grad", tol=0.1)
