"""nnj.fit over batches of uneven sizes is one backward pass over all of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import nnj
from tests.support.fuzz.case import Case
from tests.support.fuzz.compare import compare, largest
from tests.support.fuzz.losses import Term
from tests.support.fuzz.truth import Truth

EXACT = ("ggn_diag", "ggn_block", "batch_grad")


def check_fit(true: Truth, model: nn.Module, scale: str) -> bool:
    """One scale; False where a user's mean over rows is not one over samples. Errors: `Wrong`."""
    case, term = true.case, true.case.terms[0]
    if not term.reduction and term.rows != 1:
        return False
    x, y = case.data()
    rows = [size * term.rows for size in case.batches]
    loader = zip(x.split(case.batches, case.batch_axis), y.split(rows), strict=True)
    given = lambda z: eval(term.output, case.names | {"z": z})
    quantities = EXACT[:2] if case.signed else EXACT
    result = nnj.fit(
        model,
        case.loss(term.source()),
        loader,
        *quantities,
        scale=scale,
        forward=lambda model, batch: given(model(batch[0])),
        target=lambda batch: batch[1],
        memory=case.memory,
        signed=case.signed,
        **({} if term.reduction else {"reduction": term.whole}),
    )
    loss, factor = as_one_batch(case, term, scale)
    compare_fit(true, model, result, loss, factor)
    return True


def as_one_batch(case: Case, term: Term, scale: str) -> tuple[Any, float]:
    """The loss of the whole data set, and what it is to be multiplied with."""
    if term.reduction:
        mean = term.reduction if term.reduction == "batchmean" else "mean"
        return case.loss(term.source(mean if scale == "mean" else "sum"), torch.float64), 1.0
    own = case.loss(term.source())
    if term.whole == scale:
        return own, 1.0
    return own, case.n if scale == "sum" else 1 / case.n


def compare_fit(true: Truth, model: nn.Module, result: nnj.Fit, loss: Any, factor: float) -> None:
    """Errors: `Wrong`."""
    expected, case = true.as_one_batch(loss), true.case
    names = {p: name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            for quantity in ("ggn_diag", "batch_grad")[: 1 if case.signed else 2]:
                of = expected.diag if quantity == "ggn_diag" else expected.batch_grad
                what = f"{quantity} of {name} in fit"
                scale = max(largest(t) for t in result[quantity].values())
                compare(case, what, result[quantity].get(name), factor * of(name), scale)
    for path, module in model.named_modules():
        own = [names[p] for p in module.parameters(recurse=False) if p.requires_grad]
        block = result["ggn_block"].get(path)
        if own and block is not None:
            compare(case, f"ggn_block of {path} in fit", block, factor * expected.block(own))
