"""Every model of the table: kfac and ekfac wherever a block is, with the trace of the block and no
larger an error, and their joint order; the gradient bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, Case
from tests.support.collecting import extended, gradients, same_grad
from tests.support.oracle import close, run
from tests.support.slow import few

# Two losses of the same samples, or two calls, have eigenvectors of their own.
APART = {f"loss-{name}" for name in (
    "two-on-one-output", "module-of-losses", "two-heads", "deep-supervision",
    "two-forward-passes", "two-forward-passes-of-as-many")}  # fmt: skip


def collected(case: Case, *quantities: str, memory: int) -> tuple[nn.Module, nnj.collect]:
    """One backward pass, which leaves the gradient as it is."""
    _, grads = gradients(case)
    model, losses = extended(case)
    with nnj.collect(*quantities, memory=memory) as context:
        run(case, model, losses).backward()
    for name, p in model.named_parameters():
        assert same_grad(p.grad, grads[name]), f"grad of {name} differs"
    return model, context


@pytest.mark.parametrize("name", few(CASES, 2))
def test_factors_of_curvature(name):
    case, asked = CASES[name], ["ggn_block", "ggn", "kfac", "ekfac"]
    memory = 2**28 if list(CASES).index(name) % 2 else 1
    if name in APART:
        message = r"^ekfac: two backward passes, losses or fits have eigenvectors of their own"
        with pytest.raises(nnj.NNJError, match=message):
            collected(case, "ekfac", memory=memory)
        asked.remove("ekfac")
    model, context = collected(case, *asked, memory=memory)
    starts: dict[nn.Parameter, int] = {}
    for p in model.parameters():
        if p.requires_grad:
            starts[p] = sum(q.numel() for q in starts)
    for m in model.modules():
        own = dict.fromkeys(p for p in m.parameters(recurse=False) if p.requires_grad)
        block = getattr(m, "ggn_block", None)
        if own:
            assert (m.kfac is None) == (block is None)
        if block is not None:
            at = torch.cat([torch.arange(starts[p], starts[p] + p.numel()) for p in own])
            assert close(context.ggn[at[:, None], at], block) == ""
            _check_factors(m, block)


def _check_factors(m: nn.Module, block: Tensor) -> None:
    assert m.kfac.shape == block.shape
    if hasattr(m, "ekfac"):
        torch.testing.assert_close(m.ekfac.trace(), block.trace(), rtol=1e-11, atol=1e-300)
        error, other = ((k.dense() - block).norm() for k in (m.ekfac, m.kfac))
        assert error <= other * (1 + 1e-9) + 1e-12 * block.norm()
