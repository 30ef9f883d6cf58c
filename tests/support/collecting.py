"""What the tests of collect share: a small case, its data, and comparisons with the truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import MLP, Case, plain
from tests.support.oracle import Truth, build, close, losses_of, run
from tests.whole.test_every_model import extended

QUANTITIES = ("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(1))
T = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).double()


def base(
    how: Any = plain,
    loss: Any = nn.CrossEntropyLoss,
    make: Any = MLP,
    data: Any = lambda: (X, Y),
    **options: Any,
) -> Case:
    return Case("", make, data, how, loss, **options)


def pair(case: Case | None = None) -> tuple[nn.Module, Any]:
    model, losses = extended(base() if case is None else case)
    return model, losses[0] if len(losses) == 1 else losses


def same(
    model: nn.Module,
    expected: Truth | dict[str, Tensor],
    quantity: str = "ggn_diag",
    factor: float = 1.0,
) -> None:
    for name, p in model.named_parameters():
        want = (
            expected[name]
            if isinstance(expected, dict)
            else getattr(expected, quantity.removeprefix("ggn_"))(name)
        )
        assert close(getattr(p, quantity), factor * want) == "", f"{quantity} of {name}"


def exact(case: Case) -> nn.Module:
    """Collected in one backward pass, and compared with the truth and with the gradient of a model
    without nnj.
    """
    alone = build(case)
    run(case, alone, losses_of(case)).backward()
    model, losses = extended(case)
    with nnj.collect(*QUANTITIES):
        run(case, model, losses).backward()
    expected = Truth(case)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (
            p.grad is None or torch.equal(p.grad, q.grad)
        )
        for quantity, value in (("ggn_diag", expected.diag), ("batch_grad", expected.batch_grad)):
            if p.grad is not None:
                assert close(getattr(p, quantity), value(name)) == "", f"{quantity} of {name}"
    return model


def Fixed(model: nn.Module) -> nn.Module:
    model.load_state_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model.double()
