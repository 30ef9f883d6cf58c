"""What quantities would take is what they take, entry by entry."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.matrices import BlockDiagonal, Dense, Diagonal, Kronecker, Matrix
from nnj.testing import costs
from nnj.testing.costs import costs_of, text


class Words(nn.Module):
    """Tokens through an embedding, attention, a norm and bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.shift = nn.Embedding(7, 4), nn.Parameter(torch.randn(1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.w = nn.LayerNorm(4), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.words(x) + self.shift
        z = self.norm(z + self.attention(z, z, z, need_weights=False)[0])
        return z.mean(1) @ self.w


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3).requires_grad_(False)
        self.head.bias.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh())


MODELS: dict[str, Any] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.PReLU(), nn.Linear(5, 3, bias=False)),
        torch.randn(5, 4),
    ),
    "grouped": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
        torch.randn(5, 2, 6, 6),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)),
        torch.randn(5, 2, 4, 4),
    ),
    "words": lambda: (Words(), torch.randint(7, (6, 5))),
    "tied, frozen": lambda: (Tied(), torch.randn(6, 4)),
}


def entries(matrix: Matrix) -> int:
    """What a matrix holds."""
    if isinstance(matrix, BlockDiagonal):
        return sum(entries(part.matrix) for part in matrix.parts)
    if isinstance(matrix, Kronecker):
        return matrix.left.numel() + matrix.right.numel()
    if isinstance(matrix, Diagonal):
        return matrix.d.numel()
    assert isinstance(matrix, Dense)
    return matrix.m.numel()


@pytest.mark.parametrize("name", MODELS)
def test_entries_of_each_quantity(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    found = costs_of(model, x)
    data = [(x, torch.randint(3, (len(x),)))]
    fit = nnj.fit(model, nn.CrossEntropyLoss(), data, "kfac", "ggn_block", "ggn_diag")
    assert (found.samples, found.outputs) == (len(x), 3)
    assert found.parameters == fit.vector("ggn_diag").numel()
    assert {n: p * p for n, p in found.blocks.items()} == {
        n: block.numel() for n, block in fit["ggn_block"].items()
    }
    real = {n: entries(matrix) for n, matrix in fit["kfac"].items()}
    assert {n: real[n] for n in found.kronecker} == found.kronecker
    assert found.kfac == sum(real.values())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(costs, "BLOCK_LIMIT", 20)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(15)), torch.randn(3, 3, 4)
    model = nn.Sequential(model[0], nn.Flatten(), model[1])
    found = costs_of(model, x)
    assert found.too_large == ["0", "2"] and found.kfac == 50 + 30
    said = text(found)
    assert "refused beyond block_limit at '0', '2'" in said
    assert "No Kronecker factors, but an exact block or a diagonal: '2'" in said


def test_without_a_call():
    found = costs_of(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert (found.samples, found.column, found.kronecker) == (None, 0, {})
    said = text(found)
    assert re.search(r"ggn_diag, and each of its shape +172 B", said)
    assert "kfac" not in said and "column" not in said


def test_what_is_said():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    said = text(costs_of(model, torch.randn(32, 64)))
    assert said.startswith("9,610 parameters that require grad, 4 bytes each. Results take")
    assert re.search(r"batch_grad, batch_ggn_diag of 32 samples +1\.173 MiB", said)
    # (128² + 65² + 10² + 129²) entries
    assert re.search(r"kfac, ekfac +145\.9 KiB", said)
    assert re.search(r"ggn +352\.3 MiB$", said, re.MULTILINE)
    assert "a column (10 outputs of a sample)" in said and "No Kronecker" not in said


def test_a_model_without_parameters():
    assert costs_of(nn.Tanh(), torch.randn(3, 4)).parameters == 0


def test_a_lazy_layer_that_was_not_called() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(nnj.NNJError, match="^a lazy layer has parameters without a shape until"):
        costs_of(model)
    model(torch.randn(2, 4))
    assert costs_of(model).parameters == 15


def test_how_long_all_exact_columns_take_is_said_beforehand() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 30))
    found = costs_of(model, torch.randn(6, 4))
    assert 0 < found.backward < 10 and all(p.grad is None for p in model.parameters())
    found.backward = 0.5
    assert "30 columns, exactly" in text(found)
    assert "about 15 s at most, as a backward pass takes 0.5 s" in text(found)
