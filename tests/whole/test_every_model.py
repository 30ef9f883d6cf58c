"""Every model of the table, exactly: four quantities in one backward pass, against torch.func, and
the gradient bit for bit.
"""

from __future__ import annotations

import pytest

import nnj
from tests.support.cases import CASES
from tests.support.collecting import QUANTITIES, collected, extended, wrong
from tests.support.oracle import run


@pytest.mark.parametrize("name", CASES)
def test_all_at_once(name):
    assert collected(CASES[name], *QUANTITIES) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantity", ["ggn_diag", "ggn_block", "batch_grad"])
def test_each_alone_with_one_column_at_a_time(name, quantity):
    assert collected(CASES[name], quantity, memory=1) == []


def test_wrong_is_seen():
    """The comparison of the table is not blind."""
    case = CASES["mlp"]
    model, losses = extended(case)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        run(case, model, losses).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert wrong(case, model, ("ggn_diag", "ggn_block", "batch_grad"), grads) == []
    model.two.weight.ggn_diag[0, 0] *= 1 + 1e-6
    model.three.ggn_block[0, 1] += 1e-6
    model.one.bias.batch_grad = None
    assert [
        w.split(" is")[0]
        for w in wrong(case, model, ("ggn_diag", "ggn_block", "batch_grad"), grads)
    ] == ["batch_grad of one.bias", "ggn_diag of two.weight", "ggn_block of 'three'"]
