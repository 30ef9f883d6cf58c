"""Every quantity of a case against brute force: in its backward passes, and of nnj.fit over batches
of uneven sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import same_grad
from tests.support.every_quantity import (
    ALL,
    AT_PARAMETERS,
    QUADRATIC,
    Compared,
    Expected,
    wrong_quantities,
)
from tests.support.fuzz.case import Case
from tests.support.fuzz.compare import FAILURE, REFUSED, Outcome, Wrong, asked, compare, words_of
from tests.support.fuzz.fitting import as_one_batch
from tests.support.fuzz.truth import Truth
from tests.support.oracle import Dense


def check_quantities(case: Case) -> dict[str, Outcome]:
    """All together, each alone where that is refused, and of nnj.fit; by name."""
    try:
        true = Truth(case)
    except Exception as error:
        return {"oracle": Outcome(FAILURE, words_of(error))}
    model = nnj.extend(case.model(), batch_axis=case.batch_axis)
    # H of what is not convex has no columns, and the gradient's are none of H
    of_gradient = ("batch_grad", *QUADRATIC)
    names = of_gradient if case.signed else ALL
    together = asked(lambda: _collect(true, model, names))
    found = {"together": together}
    if together is not None and together.kind == REFUSED:
        found |= {name: asked(lambda name=name: _collect(true, model, [name])) for name in names}
    if case.batches:
        scale = ("sum", "mean")[case.seed % 2]
        some = [name for name in names if name != "batch_grad_dot"]
        found["fit"] = asked(lambda: _fit(true, model, scale, some))
    return {name: outcome for name, outcome in found.items() if outcome is not None}


def _compared(case: Case) -> Compared:
    def fault(found: Any, expected: Tensor) -> str:
        try:
            compare(case, "it", found, expected)
        except Wrong as wrong:
            return str(wrong)
        return ""

    return fault


def _collect(true: Truth, model: nn.Module, names: Sequence[str]) -> None:
    """Errors: `Wrong`, and what nnj refuses."""
    case = true.case
    losses = [nnj.extend(loss) for loss in case.losses()]
    model.zero_grad(set_to_none=True)
    with nnj.collect(*names, memory=case.memory) as context:
        for k in range(case.passes):
            case.run(model, losses, case.data(k)).backward()
    for name, p in model.named_parameters():
        if not same_grad(p.grad, true.grads[name]):
            raise Wrong(f"p.grad of {name} differs")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    reached = lambda name: true.grads[name] is not None
    expected = Expected(true.passes, trained)
    for fault in wrong_quantities(model, context, expected, names, reached, _compared(case)):
        raise Wrong(fault)


class _Times(Dense):
    """The derivatives of a factor times what was differentiated."""

    def __init__(self, dense: Dense, factor: float):
        h, g = factor * dense.hessian, factor * dense.gradient
        super().__init__(dense.jacobian, h, g, dense.samples, dense.n)


def _fit(true: Truth, model: nn.Module, scale: str, names: Sequence[str]) -> bool:
    """One scale, merged of two parts; False where a user's mean is not one over samples."""
    case, term = true.case, true.case.terms[0]
    if not term.reduction and term.rows != 1:
        return False
    x, y = case.data()
    rows = [size * term.rows for size in case.batches]
    loader = list(zip(x.split(case.batches, case.batch_axis), y.split(rows), strict=True))
    given = lambda z: eval(term.output, case.names | {"z": z})

    def fit(part: Sequence[Any]) -> nnj.Fit:
        return nnj.fit(
            model,
            case.loss(term.source()),
            part,
            *names,
            scale=scale,
            forward=lambda model, batch: given(model(batch[0])),
            target=lambda batch: batch[1],
            memory=case.memory,
            **({} if term.reduction else {"reduction": term.whole}),
        )

    loss, factor = as_one_batch(case, term, scale)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = Expected([_Times(true.as_one_batch(loss), factor)], trained)
    fits = [fit(loader)]
    if len(loader) > 1 and scale == "sum":  # a mean over a part may divide by nothing
        fits.append(nnj.Fit.merge([fit(loader[:1]), fit(loader[1:])]))
    for found in fits:
        _compare_fit(case, found, expected, names)
    return True


def _compare_fit(case: Case, found: nnj.Fit, expected: Expected, names: Sequence[str]) -> None:
    """Errors: `Wrong`."""
    for quantity in [name for name in names if name in AT_PARAMETERS]:
        for name, value in found[quantity].items():
            compare(case, f"{quantity} of {name} in fit", value, expected.at(quantity, name))
    for key in ("ggn", "batch_grad_sq_norm", "noise_terms"):
        if key in found.context:
            compare(
                case, f"{key} in fit", *_plain(found.context[key], expected.on_the_context(key))
            )


def _plain(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The same with NaN, of a single sample, as zero; only where both are."""
    both = found.isnan() & expected.isnan()
    return torch.where(both, 0, found), torch.where(both, 0, expected)
