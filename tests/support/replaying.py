"""What the tests of compiled passes share: a case of the table, traced on other numbers and
replayed on its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nnj.collecting.compile import Step
from nnj.collecting.pass_program import PassProgram, names_of_results
from nnj.collecting.request import Request
from nnj.compiling.cases import Cases
from nnj.recording.extend import is_own_hook
from tests.support.cases import Case
from tests.support.collecting import extended, gradients, wrong
from tests.support.oracle import data_of

CALLS = 2  # before a case is replayed: eager, traced


def compiled(
    case: Case, *quantities: str, backend: str = "aot", **options: Any
) -> tuple[nn.Module, Step]:
    """The model of a case, and its user's code as a step."""
    model, losses = extended(case)
    loss = losses[0] if len(losses) == 1 else losses

    def evaluate(batch: Any) -> tuple[Tensor, list[Tensor]]:
        return case.run(model, loss, *batch), []

    request = Request.by_name(quantities, **options)
    program = PassProgram(evaluate, [model, *losses], request)
    cases = Cases(
        program, backend, verify=False, ignored=names_of_results(request), is_own=is_own_hook
    )
    return model, Step(model, request, cases)


@torch.no_grad()
def moved(t: Any, by: float) -> Any:
    """A tensor of real numbers with slightly others in it."""
    real = isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())
    return t * (1 + by) if real and not t.requires_grad else t


def replayed(case: Case, *quantities: str, **options: Any) -> tuple[list[str], list[str]]:
    """Trace a case with other numbers in its data and parameters, replay it with its own; what is
    wrong then, and why it was not replayed.
    """
    value, grads = gradients(case)
    model, step = compiled(case, *quantities, **options)
    own = [p.detach().clone() for p in model.parameters()]
    data = data_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for i in range(CALLS + 1):
            last = i == CALLS
            with torch.no_grad():
                for p, was in zip(model.parameters(), own, strict=True):
                    p.copy_(was if last else moved(was, 0.01 * (i + 1)))
                    p.grad = None
            torch.manual_seed(2)
            found, _ = step(*(t if last else moved(t, 0.01 * (i + 1)) for t in data))
    faults = (
        [] if torch.allclose(found, value, rtol=1e-12) else [f"the value is {found}, not {value}"]
    )
    for name, p in model.named_parameters():
        there, g = p.grad, grads[name]
        if (there is None) != (g is None) or (
            g is not None and not torch.allclose(there, g, rtol=1e-9, atol=1e-12)
        ):
            faults.append(f"grad of {name} differs")
    faults += wrong(case, model, quantities, grads)
    return faults, step.reasons if step.replays else [*step.reasons, "(not replayed)"]
