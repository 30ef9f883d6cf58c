"""Every model of the table: all quantities that are made of a sample's gradient, or of curvature in
another form, against those that test_every_model compares with torch.func; and the gradient bit for
bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, Case
from tests.support.collecting import extended, gradients, same_grad
from tests.support.oracle import close, run

OF_GRADIENTS = (
    "batch_grad",
    "batch_grad_sq_norm",
    "batch_grad_dot",
    "ggn_diag_empirical",
    "grad_variance",
)
OF_CURVATURE = ("ggn_diag", "ggn_block", "batch_ggn_diag", "ggn", "kfac", "ekfac")


def collected(
    case: Case, *quantities: str, **options: Any
) -> tuple[nn.Module, nnj.collect, dict[str, Tensor | None]]:
    """One backward pass, which leaves the gradient as it is."""
    _, grads = gradients(case)
    model, losses = extended(case)
    with nnj.collect(*quantities, **options) as context:
        run(case, model, losses).backward()
    for name, p in model.named_parameters():
        assert same_grad(p.grad, grads[name]), f"grad of {name} differs"
    return model, context, grads


# Two losses of the same samples, whose gradients add up before anything is squared; two calls,
# whose samples meet in no pass; and a loss that compares the rows of two samples.
LOSSES = {f"loss-{name}" for name in (
    "two-on-one-output", "same-twice-on-one-output", "module-of-losses", "two-heads",
    "deep-supervision")}  # fmt: skip
CALLS = {"loss-two-forward-passes", "loss-two-forward-passes-of-as-many"}
OTHER_EIGENVECTORS = (LOSSES | CALLS) - {"loss-same-twice-on-one-output"}
TOGETHER = {"two-views-compared-in-loss"}


def refused(case: Case, quantity: str, message: str) -> None:
    with pytest.raises(nnj.NNJError, match=message):
        collected(case, quantity)


@pytest.mark.parametrize("name", CASES)
def test_of_gradients(name):
    case, asked = CASES[name], OF_GRADIENTS
    if name in LOSSES:
        for quantity in asked[1:]:
            refused(case, quantity, rf"^{quantity}: two losses of the same samples are in one")
        return
    if name in CALLS:
        refused(case, "batch_grad_dot", r"^batch_grad_dot: samples of two backward passes, or of")
        asked = tuple(quantity for quantity in asked if quantity != "batch_grad_dot")
    model, context, _ = collected(case, *asked)
    reached = [p for p in model.parameters() if getattr(p, "batch_grad", None) is not None]
    n = context.samples
    for p in reached:
        rows = p.batch_grad.reshape(n, -1)
        squared = rows.square()
        assert close(p.batch_grad_sq_norm, squared.sum(1)) == ""
        if "batch_grad_dot" in asked:
            assert close(p.batch_grad_dot, rows @ rows.mT) == ""
        assert close(p.ggn_diag_empirical, squared.sum(0).reshape(p.shape)) == ""
        variance = rows.var(0, unbiased=False).reshape(p.shape)
        # relative to the second moment, of which rounding is what is left
        torch.testing.assert_close(
            p.grad_variance, variance, rtol=1e-9, atol=1e-13 * float(1 + squared.max())
        )
    every = torch.cat([p.batch_grad.reshape(n, -1) for p in reached], 1)
    assert close(context.batch_grad_sq_norm, every.square().sum(1)) == ""
    if "batch_grad_dot" in asked:
        assert close(context.batch_grad_dot, every @ every.mT) == ""
    if n > 1:
        tr = n**3 / (n - 1) * every.var(0, unbiased=False).sum()
        g2 = every.sum(0).square().sum() - tr / n
        torch.testing.assert_close(
            context.noise_terms, torch.stack([tr, g2]), rtol=1e-8, atol=1e-10 * float(1 + tr)
        )


@pytest.mark.parametrize("memory", [1, 2**28])
@pytest.mark.parametrize("name", CASES)
def test_of_curvature(name, memory):
    case, asked = CASES[name], OF_CURVATURE
    if name in TOGETHER:
        refused(case, "batch_ggn_diag", r"^batch_ggn_diag: MSELoss takes samples together")
        asked = tuple(quantity for quantity in asked if quantity != "batch_ggn_diag")
    if name in OTHER_EIGENVECTORS:
        refused(case, "ekfac", r"^ekfac: two backward passes, losses or fits have eigenvectors")
        asked = tuple(quantity for quantity in asked if quantity != "ekfac")
    model, context, _ = collected(case, *asked, memory=memory)
    params = [p for p in model.parameters() if p.requires_grad]
    diagonal = [torch.zeros_like(p) if p.ggn_diag is None else p.ggn_diag for p in params]
    assert close(context.ggn.diagonal(), torch.cat([d.flatten() for d in diagonal])) == ""
    if "batch_ggn_diag" in asked:
        for p in params:
            if p.ggn_diag is not None:
                assert close(p.batch_ggn_diag.sum(0), p.ggn_diag) == ""
                assert len(p.batch_ggn_diag) == context.samples
    starts: dict[nn.Parameter, int] = {}
    for p in params:
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


@pytest.mark.parametrize("name", CASES)
def test_moments_of_inputs_are_those_of_kfac(name):
    """Without the row of ones, not divided, and of every weight that has factors."""
    case = CASES[name]
    if name == "loss-deep-supervision":
        refused(case, "input_moment", r"^input_moment: two losses of the same samples see other")
        return
    model, _, _ = collected(case, "input_moment", "kfac", bias="separate")
    for m in model.modules():
        kfac = getattr(m, "kfac", None)
        if kfac is None or m.input_moment is None:
            continue
        assert m.input_moment.dim() == 3
        if isinstance(kfac, nnj.matrices.Kronecker) and kfac.left.dim() == 3 == kfac.right.dim():
            a = kfac.right / kfac.right.norm()
            assert close(m.input_moment / m.input_moment.norm(), a) == ""
