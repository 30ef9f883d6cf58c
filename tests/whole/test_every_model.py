"""Every model of the table, exactly: four quantities in one backward pass, against torch.func, and
the gradient bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, Case
from tests.support.oracle import build, close, losses_of, run, truth

QUANTITIES = ("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad")


def extended(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    model = nnj.extend(build(case), batch_axis=case.batch_axis)
    return model, tuple(nnj.extend(loss) for loss in losses_of(case))


def gradients(case: Case) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The value and p.grad without nnj."""
    model = build(case)
    value = run(case, model, losses_of(case))
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def wrong(
    case: Case, model: nn.Module, quantities: tuple[str, ...], grads: dict[str, Tensor | None]
) -> list[str]:
    """What is wrong in the attributes of a model, one line each."""
    t, found = truth(case.name), []
    for name, p in model.named_parameters():
        for quantity, expected in (("ggn_diag", t.diag), ("batch_grad", t.batch_grad)):
            if quantity not in quantities:
                continue
            if not p.requires_grad:
                fault = "is there, though it is frozen" if hasattr(p, quantity) else ""
            elif not hasattr(p, quantity):
                fault = "is not there"
            elif grads[name] is None:
                fault = (
                    "" if getattr(p, quantity) is None else "is not None, though it was not reached"
                )
            else:
                fault = close(getattr(p, quantity), expected(name))
            found += [f"{quantity} of {name} {fault}"] if fault else []
        if "ggn_diag_mc" in quantities and p.requires_grad and grads[name] is not None:
            draw = getattr(p, "ggn_diag_mc", None)
            fine = (
                isinstance(draw, Tensor)
                and draw.shape == p.shape
                and bool((draw >= 0).all())
                and bool(draw.isfinite().all())
            )
            found += [] if fine else [f"ggn_diag_mc of {name} is {draw!r}"]
    names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        own = (
            [names[id(p)] for p in module.parameters(recurse=False) if p.requires_grad]
            if "ggn_block" in quantities
            else []
        )
        if own and any(grads[name] is not None for name in own):
            fault = close(getattr(module, "ggn_block", "not there"), t.block(own))
            found += [f"ggn_block of '{path}' {fault}"] if fault else []
        elif own and getattr(module, "ggn_block", "not there") is not None:
            found.append(
                f"ggn_block of '{path}', which was not reached, is "
                f"{getattr(module, 'ggn_block', 'not there')!r}"
            )
    return found


def collected(case: Case, *quantities: str, **options: Any) -> list[str]:
    """Collect in one backward pass; what is wrong with it."""
    value, grads = gradients(case)
    model, losses = extended(case)
    with nnj.collect(*quantities, **options):
        scalar = run(case, model, losses)
        scalar.backward()
    found = [] if torch.equal(scalar.detach(), value) else [f"the value is {scalar}, not {value}"]
    if not torch.allclose(truth(case.name).value, value, rtol=1e-12):
        found.append(f"the oracle is wrong: its value is {truth(case.name).value}, not {value}")
    for name, p in model.named_parameters():
        plain = grads[name]
        if (p.grad is None) != (plain is None) or (
            plain is not None and not torch.equal(p.grad, plain)
        ):
            found.append(f"grad of {name} differs")
    return found + wrong(case, model, quantities, grads)


@pytest.mark.parametrize("name", CASES)
def test_all_at_once(name):
    assert collected(CASES[name], *QUANTITIES) == []


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quantity", ["ggn_diag", "ggn_block", "batch_grad"])
def test_each_alone_with_one_column_at_a_time(name, quantity):
    assert collected(CASES[name], quantity, memory=1) == []
