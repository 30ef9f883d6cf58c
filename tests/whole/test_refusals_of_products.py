"""Bad input to a product: a sentence with what came and what was expected, and what no product can
be of.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import nnj
from tests.support.products import N, r

OUT, IN, P = 2, 3, 26


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def blocks(*sizes):
    return [r(N, size, size) for size in sizes]


CASES = {
    "wrt": (lambda m, x: nnj.jacobian(m, x, "bias"), "wrt='bias'; expected 'input' or 'weight'"),
    "vjp-shape": (lambda m, x: nnj.vjp(m, x, r(N, 3)), "vector has shape (3, 3), expected (3, 2)"),
    "vjp-one": (lambda m, x: nnj.vjp(m, x, r(OUT)), "vector has shape (2,), expected (3, 2)"),
    "vjp-dtype": (
        lambda m, x: nnj.vjp(m, x, r(N, OUT).float()),
        "vector is torch.float32 on cpu, expected torch.float64 on cpu",
    ),
    "vjp-device": (
        lambda m, x: nnj.vjp(m, x, r(N, OUT).to("meta")),
        "vector is torch.float64 on meta, expected torch.float64 on cpu",
    ),
    "vjp-type": (lambda m, x: nnj.vjp(m, x, None), "vector is NoneType, expected a tensor"),
    "jvp-shape": (
        lambda m, x: nnj.jvp(m, x, r(N, OUT)),
        "vector has shape (3, 2), expected (3, 3)",
    ),
    "jvp-weight": (
        lambda m, x: nnj.jvp(m, x, r(N, 3), "weight"),
        "vector has shape (3, 3), expected (3, 26) or (26,)",
    ),
    "jmp": (
        lambda m, x: nnj.jmp(m, x, r(N, OUT, 5)),
        "matrix has shape (3, 2, 5), expected (3, 3, 5) or (3, 5)",
    ),
    "jmp-weight": (
        lambda m, x: nnj.jmp(m, x, r(N, 3, 5), "weight"),
        "matrix has shape (3, 3, 5), expected (3, 26, 5) or (26, 5)",
    ),
    "jmp-vector": (
        lambda m, x: nnj.jmp(m, x, r(4)),
        "matrix has shape (4,), expected (3, 3, 4) or (3, 4)",
    ),
    "mjp": (
        lambda m, x: nnj.mjp(m, x, r(N, 5, 3)),
        "matrix has shape (3, 5, 3), expected (3, 5, 2) or (5, 2)",
    ),
    "mjp-type": (lambda m, x: nnj.mjp(m, x, [1.0]), "matrix is list, expected a tensor"),
    "metric": (
        lambda m, x: nnj.jTmjp(m, x, r(N, 3, 3)),
        "matrix has shape (3, 3, 3), expected (3, 2, 2) or (2, 2)",
    ),
    "metric-not-diagonal": (
        lambda m, x: nnj.jTmjp(m, x, r(N, 2, 2), from_diag=True),
        "matrix (a diagonal, from_diag=True) has shape (3, 2, 2), expected (3, 2) or (2,)",
    ),
    "metric-diagonal": (
        lambda m, x: nnj.jTmjp(m, x, r(N, 2)),
        "matrix has shape (3, 2), expected (3, 2, 2) or (2, 2)",
    ),
    "metric-dtype": (
        lambda m, x: nnj.jTmjp(m, x, r(N, 2, 2).half()),
        "matrix is torch.float16 on cpu, expected torch.float64 on cpu",
    ),
    "metric-list": (lambda m, x: nnj.jTmjp(m, x, blocks(2)), "matrix is list, expected a tensor"),
    "joint-diagonal": (
        lambda m, x: nnj.jTmjp(m, x, None, "weight", to_diag=True, joint=True),
        "joint asks for the full matrix on all parameters, so it is for wrt='weight' without "
        "to_diag",
    ),
    "joint-input": (
        lambda m, x: nnj.jTmjp(m, x, joint=True),
        "so it is for wrt='weight' without to_diag",
    ),
    "push-metric": (
        lambda m, x: nnj.jmjTp(m, x, r(2, 2)),
        "matrix has shape (2, 2), expected (3, 3, 3) or (3, 3)",
    ),
    "push-weights": (
        lambda m, x: nnj.jmjTp(m, x, r(N, 3), "weight", from_diag=True),
        "matrix (a diagonal, from_diag=True) has shape (3, 3), expected (3, 26) or (26,)",
    ),
    "push-blocks-of-input": (
        lambda m, x: nnj.jmjTp(m, x, blocks(3)),
        "matrix is a list of blocks, which is for wrt='weight' without from_diag",
    ),
    "push-blocks-diagonal": (
        lambda m, x: nnj.jmjTp(m, x, blocks(16, 10), "weight", from_diag=True),
        "matrix is a list of blocks, which is for wrt='weight' without from_diag",
    ),
    "push-number-of-blocks": (
        lambda m, x: nnj.jmjTp(m, x, blocks(16, 10, 1), "weight"),
        "matrix has 3 blocks, expected 2, one for each module that owns parameters",
    ),
    "push-block": (
        lambda m, x: nnj.jmjTp(m, x, blocks(16, 4), "weight"),
        "block 1 of matrix has shape (3, 4, 4), expected (3, 10, 10) or (10, 10)",
    ),
    "pair-tuple": (
        lambda m, x: nnj.jTmjp_pair(m, x, x, r(3, N, 2, 2)),
        "matrices is (M11, M12, M22) or None",
    ),
    "pair-two": (
        lambda m, x: nnj.jTmjp_pair(m, x, x, (r(N, 2, 2),) * 2),
        "matrices is (M11, M12, M22) or None",
    ),
    "pair-metric": (
        lambda m, x: nnj.jTmjp_pair(m, x, x, (r(N, 2, 2), r(N, 2, 2), r(N, 3, 3))),
        "matrix has shape (3, 3, 3), expected (3, 2, 2) or (2, 2)",
    ),
    "pair-samples": (
        lambda m, x: nnj.jTmjp_pair(m, x, x[:2]),
        "x1 and x2 are pairs of samples; found 3 and 2 samples",
    ),
    "x-empty": (
        lambda m, x: nnj.jacobian(m, x[:0]),
        "x has shape (0, 3); expected (N, ...) with at least one sample",
    ),
    "x-number": (
        lambda m, x: nnj.jacobian(m, torch.tensor(1.0)),
        "x has shape (); expected (N, ...)",
    ),
    "x-type": (lambda m, x: nnj.jacobian(m, [1.0]), "x is list, expected a tensor"),
    "x-integers": (
        lambda m, x: nnj.jacobian(nn.Embedding(3, 2), torch.tensor([0, 1])),
        "x is torch.int64, which has no derivative; the input must be of floating point for "
        "wrt='input'",
    ),
    "y-rows": (
        lambda m, x: nnj.jacobian(nn.Flatten(0), x),
        "Flatten gave (9,) for 3 samples; products need one tensor (N, ...)",
    ),
    "y-tuple": (
        lambda m, x: nnj.jacobian(nn.GRU(3, 2).double(), r(N, 2, 3)),
        "GRU gave tuple for 3 samples; products need one tensor (N, ...)",
    ),
    "batchnorm": (
        lambda m, x: nnj.jacobian(nn.BatchNorm1d(3).double(), x),
        "BatchNorm1d in training mode makes the samples of a batch influence one another",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_the_sentence(what):
    run, sentence = CASES[what]
    torch.manual_seed(0)
    with pytest.raises(nnj.NNJError, match=re.escape(sentence)):
        run(network(), r(N, IN))


class Coupled(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Reversed(nn.Module):
    def forward(self, x):
        return x.flip(0) * 2


class Couple(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return torch.softmax(self.layer(x), 0)


@pytest.mark.parametrize(
    "model, wrt", [(Coupled(), "input"), (Couple(), "input"), (Couple(), "weight")]
)
def test_samples_that_influence_one_another(model, wrt):
    with pytest.raises(nnj.NNJError, match="samples influence one another"):
        nnj.jacobian(model, r(N, 3), wrt)


def test_rows_in_another_order():
    with pytest.raises(nnj.NNJError, match="output n must be that of sample n, in axis 0"):
        nnj.jacobian(Reversed(), r(N, 3))
    with pytest.raises(nnj.NNJError, match="output n must be that of sample n, in axis 0"):
        nnj.jvp(Reversed(), r(N, 3), r(N, 3))


def test_what_is_no_module():
    with pytest.raises(
        TypeError, match=r"products are those of a torch\.nn\.Module, not of <built-in"
    ):
        nnj.jacobian(torch.sin, r(N, 3))


@pytest.mark.parametrize("product", ("jacobian", "vjp", "jvp"))
def test_a_model_that_ignores_its_input_or_has_no_parameters(product):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2, dtype=x.dtype)

    x = r(N, 3)
    for model in (Constant(), nn.Sequential(nn.Tanh(), Constant())):
        given = {"jacobian": (), "vjp": (r(N, 2),), "jvp": (r(N, 3),)}[product]
        found = getattr(nnj, product)(model, x, *given)
        assert (
            found.shape == {"jacobian": (N, 2, 3), "vjp": (N, 3), "jvp": (N, 2)}[product]
            and not found.any()
        )
    assert nnj.jTmjp(Constant(), x, diag_backprop=True).shape == (N, 3, 3)
    assert nnj.jmjTp(Constant(), x, diag_backprop=True).shape == (N, 2, 2)
    assert nnj.jmjTp(Constant(), x, wrt="weight", to_diag=True, diag_backprop=True).shape == (N, 2)
