"""Every quantity at every model of the table, all in one backward pass, against torch.func, and the
gradient bit for bit; every second model with one column at a time.

What goes by the sample is refused where several losses, or a loss of pairs, leave no answer; the
rest is then exact.
"""

from __future__ import annotations

import pytest

import nnj
from tests.support.cases import CASES
from tests.support.collecting import extended, gradients, same_grad
from tests.support.every_quantity import ALL, QUADRATIC, Expected, wrong_quantities
from tests.support.oracle import run, truth
from tests.support.slow import few

SAME = "two losses of the same samples are in one backward pass"
APART = "samples of two backward passes, or of two calls of the model, have inner products"
TOGETHER = "takes samples together, so that none has a curvature of its own"
REFUSED = {
    "loss-two-on-one-output": (SAME, QUADRATIC),
    "loss-same-twice-on-one-output": (SAME, QUADRATIC),
    "loss-module-of-losses": (SAME, QUADRATIC),
    "loss-two-heads": (SAME, QUADRATIC),
    "loss-deep-supervision": (SAME, QUADRATIC),
    "loss-two-forward-passes": (APART, {"batch_grad_dot"}),
    "loss-two-forward-passes-of-as-many": (APART, {"batch_grad_dot"}),
    "two-views-compared-in-loss": (TOGETHER, {"batch_ggn_diag"}),
}


@pytest.mark.parametrize("name", few(CASES, 2))
def test_all_at_once(name):
    memory = 1 if list(CASES).index(name) % 2 else 2**28
    if name not in REFUSED:
        assert wrong_in_one_pass(name, ALL, memory) == []
        return
    message, refused = REFUSED[name]
    for quantity in refused:
        with pytest.raises(nnj.NNJError, match=f"^{quantity}: .*{message}"):
            wrong_in_one_pass(name, [quantity], memory)
    assert wrong_in_one_pass(name, [q for q in ALL if q not in refused], memory) == []


def wrong_in_one_pass(name: str, quantities, memory: int) -> list[str]:
    """What is wrong in one backward pass of a case, one line each."""
    case = CASES[name]
    _, grads = gradients(case)
    model, losses = extended(case)
    more = () if name in REFUSED else ("input_moment",)
    with nnj.collect(*quantities, *more, memory=memory) as context:
        run(case, model, losses).backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    expected = Expected([truth(name)], trained)
    reached = lambda n: grads[n] is not None
    found = [
        f"grad of {n} differs"
        for n, p in model.named_parameters()
        if not same_grad(p.grad, grads[n])
    ]
    return found + list(wrong_quantities(model, context, expected, quantities, reached))
