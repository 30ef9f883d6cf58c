"""What is asked of nnj about a case: every quantity, an estimate made exact, nnj.fit, products.

Only an `NNJError` is a refusal. A wrong number, a result that is not there, a gradient that differs
from that of plain torch, and any other exception are failures.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import nnj
from nnj.loss_hessian.base import LossHessian
from tests.support.collecting import same_grad
from tests.support.fuzz.case import Case
from tests.support.fuzz.compare import (
    FAILURE,
    REFUSED,
    Outcome,
    Wrong,
    asked,
    compare,
    largest,
    words_of,
)
from tests.support.fuzz.fitting import EXACT, check_fit
from tests.support.fuzz.products import check_products
from tests.support.fuzz.truth import Truth

DRAWS = 64


def check(case: Case) -> dict[str, Outcome]:
    """All questions about a case, by name: to one model, one after the other."""
    try:
        true = Truth(case)
    except Exception as error:
        return {"oracle": Outcome(FAILURE, words_of(error))}
    if fault := true.fault():
        return {"oracle": Outcome(FAILURE, fault)}
    model = nnj.extend(case.model(), batch_axis=case.batch_axis)
    found = check_quantities(true, model)
    if not case.signed:
        found["ggn_diag_mc"] = asked(lambda: check_estimate(true, model))
    found["modules="] = asked(lambda: check_modules(true, model))
    grads = {name: p.grad for name, p in model.named_parameters()}
    if case.batches:
        scale = ("sum", "mean")[case.seed % 2]
        found["fit"] = asked(lambda: check_fit(true, model, scale))
    alone = case.outputs == 1 and case.one_call and not case.batch_axis
    if alone and not case.autocast:
        found |= check_products(true, model)
    if any(p.grad is not grads[name] for name, p in model.named_parameters()):
        found["fit and products"] = Outcome(FAILURE, "p.grad is another one afterwards")
    return {name: outcome for name, outcome in found.items() if outcome is not None}


# -- nnj.collect -----------------------------------------------------------------------------------


def check_quantities(true: Truth, model: nn.Module) -> dict[str, Outcome | None]:
    """The exact ones together; each alone if that was refused or wrong, or a loss is signed."""
    together = None
    if not true.case.signed:
        together = asked(lambda: check_collect(true, model, *EXACT))
    if together is not None and together.kind not in (REFUSED, FAILURE):
        return dict.fromkeys(EXACT, together)
    found = {name: asked(lambda name=name: check_collect(true, model, name)) for name in EXACT}
    if together is not None and together.kind == FAILURE:
        found["together"] = together
    return found


def check_collect(
    true: Truth, model: nn.Module, *names: str, inside: str = "", **options: Any
) -> None:
    """Backward passes of a case with nnj; `inside`: a module, at which alone. Errors: `Wrong`."""
    case, error = true.case, None
    signed = case.signed and "batch_grad" not in names
    options = {"memory": case.memory, "signed": signed} | options
    if inside:
        options["modules"] = [model.get_submodule(inside)]
    losses = [nnj.extend(loss) for loss in case.losses()]
    model.zero_grad(set_to_none=True)
    try:
        with nnj.collect(*names, **options):
            for k, value in enumerate(true.values):
                again = case.run(model, losses, case.data(k))
                again.backward()
                if not torch.equal(again.detach(), value):
                    raise Wrong(f"the value of the loss is {again}, not {value}")
    except nnj.NNJError as refusal:
        error = refusal
    if error is None or case.passes == 1:
        for name, p in model.named_parameters():
            if not same_grad(p.grad, true.grads[name]):
                raise Wrong(f"p.grad of {name} differs")
    if error is not None:
        raise error
    for name in names:
        compare_attributes(true, model, name, inside)


def check_modules(true: Truth, model: nn.Module) -> bool:
    """At one of its modules alone; False where no module owns a parameter that is trained."""
    owners = [
        path
        for path, m in model.named_modules()
        if path and any(p.requires_grad for p in m.parameters())
    ]
    if not owners:
        return False
    inside = random.Random(true.case.seed).choice(owners)
    check_collect(true, model, "ggn_diag", "ggn_block", inside=inside)
    return True


def compare_attributes(true: Truth, model: nn.Module, quantity: str, inside: str = "") -> None:
    """One quantity at all parameters or modules of one, or of the model. Errors: `Wrong`."""
    reached = {name for name, grad in true.grads.items() if grad is not None}
    here = set(model.get_submodule(inside).parameters())
    there = {name for name, p in model.named_parameters() if p not in here}
    for name, p in model.named_parameters():
        if name in there and hasattr(p, quantity):
            raise Wrong(f"{quantity} is at {name}, outside of modules=")
    if quantity == "ggn_block":
        found, expected = blocks(true, model, reached, inside)
    else:
        of = true.batch_grad if quantity == "batch_grad" else true.diag
        named = model.named_parameters()
        trained = {name: p for name, p in named if p.requires_grad and name not in there}
        found = {name: getattr(p, quantity, "not there") for name, p in trained.items()}
        expected = {name: of(name) if name in reached else None for name in trained}
    scale = max((largest(t) for t in expected.values() if t is not None), default=0.0)
    for name, true_one in expected.items():
        if true_one is not None:
            compare(true.case, f"{quantity} of {name}", found[name], true_one, scale)
        elif found[name] is not None:
            raise Wrong(f"{quantity} of {name}, which is not reached, is {found[name]!r}")


def blocks(
    true: Truth, model: nn.Module, reached: set[str], inside: str
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """By the paths of modules: what nnj has left there, and what is true."""
    names = {p: name for name, p in model.named_parameters()}
    found, expected = {}, {}
    for path, module in model.named_modules():
        if not (path == inside or path.startswith(f"{inside}." if inside else "")):
            continue
        own = [names[p] for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            found[path] = getattr(module, "ggn_block", "not there")
            expected[path] = true.block(own) if reached & set(own) else None
    return found, expected


# -- an estimate, made exact -----------------------------------------------------------------------


@contextlib.contextmanager
def orthogonal_signs() -> Iterator[list[int]]:
    """Rows of a Hadamard matrix in place of random signs.

    Any two columns of T have orthogonal signs over DRAWS draws: the mean of (T e)(T e)^T is then
    T T^T, and the estimate equals what it estimates. Gives how many signs were asked for at once.
    """
    asked_for: list[int] = []

    def signs(self: LossHessian, count: int, generator: Any = None) -> Tensor:
        shape = (self.mixed, self.rows, self.places)
        asked_for.append(math.prod(shape))
        size = 1 << max(count - 1, math.prod(shape) - 1, 1).bit_length()
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            top = torch.cat([matrix, matrix], 1)
            matrix = torch.cat([top, torch.cat([matrix, -matrix], 1)])
        return matrix[:count, : math.prod(shape)].reshape(count, *shape).to(self.device)

    with mock.patch.object(LossHessian, "signs", signs):
        yield asked_for


def check_estimate(true: Truth, model: nn.Module) -> bool:
    """ggn_diag_mc is ggn_diag where the signs are orthogonal; False where they cannot be."""
    with orthogonal_signs() as asked_for:
        try:
            check_collect(true, model, "ggn_diag_mc", samples=DRAWS, memory=2**28)
        except Wrong:
            if max(asked_for, default=0) > DRAWS:
                return False
            raise
    return max(asked_for, default=0) <= DRAWS
