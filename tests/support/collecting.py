"""What the tests of collect share: a small case and its data, one collected pass, what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import nnj
from tests.support.cases import MLP, Case, plain
from tests.support.oracle import Truth, build, close, losses_of, run, truth

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
    """A case outside the table, a small network on X and Y unless said otherwise."""
    return Case("", make, data, how, loss, **options)


def extended(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and the losses of a case, extended."""
    model = nnj.extend(build(case), batch_axis=case.batch_axis)
    return model, tuple(nnj.extend(loss) for loss in losses_of(case))


def pair(case: Case | None = None) -> tuple[nn.Module, Any]:
    """The same, where one loss stands alone."""
    model, losses = extended(base() if case is None else case)
    return model, losses[0] if len(losses) == 1 else losses


def net() -> nn.Module:
    """A network of layers with rules, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def Fixed(model: nn.Module) -> nn.Module:
    """A twin that has its own parameters, and takes none from the model."""
    model.load_state_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return model.double()


# -- one backward pass, and what is wrong with it --------------------------------------------------


def gradients(case: Case) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The value and p.grad without nnj."""
    model = build(case)
    value = run(case, model, losses_of(case))
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def collected(case: Case, *quantities: str, **options: Any) -> list[str]:
    """Collect in one backward pass of a case of the table; what is wrong with it."""
    value, grads = gradients(case)
    model, losses = extended(case)
    with nnj.collect(*quantities, **options):
        scalar = run(case, model, losses)
        scalar.backward()
    found = [] if torch.equal(scalar.detach(), value) else [f"the value is {scalar}, not {value}"]
    if not torch.allclose(truth(case.name).value, value, rtol=1e-12):
        found.append(f"the oracle is wrong: its value is {truth(case.name).value}, not {value}")
    for name, p in model.named_parameters():
        if not same_grad(p.grad, grads[name]):
            found.append(f"grad of {name} differs")
    return found + wrong(case, model, quantities, grads)


def same_grad(found: Tensor | None, expected: Tensor | None) -> bool:
    """Bit for bit, or both None."""
    if found is None or expected is None:
        return found is expected
    return torch.equal(found, expected)


def wrong(
    case: Case, model: nn.Module, quantities: tuple[str, ...], grads: dict[str, Tensor | None]
) -> list[str]:
    """What is wrong in the attributes of a model, one line each."""
    expected, found = truth(case.name), []
    for name, p in model.named_parameters():
        for quantity in quantities:
            if quantity != "ggn_block" and (
                fault := wrong_at(p, quantity, expected, name, grads[name] is not None)
            ):
                found.append(f"{quantity} of {name} {fault}")
    return found + (list(wrong_blocks(model, expected, grads)) if "ggn_block" in quantities else [])


def wrong_at(p: nn.Parameter, quantity: str, expected: Truth, name: str, reached: bool) -> str:
    """What is wrong with one quantity at one parameter: an estimate is only looked at."""
    there = getattr(p, quantity, "not there")
    if quantity == "ggn_diag_mc":
        return "" if not p.requires_grad or not reached or estimates(there, p) else f"is {there!r}"
    if not p.requires_grad:
        return "is there, though it is frozen" if hasattr(p, quantity) else ""
    if not hasattr(p, quantity):
        return "is not there"
    if not reached:
        return "" if there is None else "is not None, though it was not reached"
    return close(there, getattr(expected, quantity.removeprefix("ggn_"))(name))


def estimates(draw: Any, p: nn.Parameter) -> bool:
    """Whether it may be an estimate of a diagonal of curvature at p."""
    if not isinstance(draw, Tensor) or draw.shape != p.shape:
        return False
    return bool((draw >= 0).all()) and bool(draw.isfinite().all())


def wrong_blocks(
    model: nn.Module, expected: Truth, grads: dict[str, Tensor | None]
) -> Iterator[str]:
    """What is wrong with `ggn_block`, one line for each module."""
    names = {p: name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        own = [names[p] for p in module.parameters(recurse=False) if p.requires_grad]
        block = getattr(module, "ggn_block", "not there")
        if own and any(grads[name] is not None for name in own):
            fault = close(block, expected.block(own))
            if fault:
                yield f"ggn_block of '{path}' {fault}"
        elif own and block is not None:
            yield f"ggn_block of '{path}', which was not reached, is {block!r}"


def same(
    model: nn.Module,
    expected: Truth | dict[str, Tensor],
    quantity: str = "ggn_diag",
    factor: float = 1.0,
) -> None:
    """One quantity is what it should be at every parameter."""
    for name, p in model.named_parameters():
        want = (
            expected[name]
            if isinstance(expected, dict)
            else getattr(expected, quantity.removeprefix("ggn_"))(name)
        )
        assert close(getattr(p, quantity), factor * want) == "", f"{quantity} of {name}"


def exact(case: Case) -> nn.Module:
    """The model of any case: exact after one backward pass, with the gradient of plain torch."""
    _, grads = gradients(case)
    model, losses = extended(case)
    with nnj.collect(*QUANTITIES):
        run(case, model, losses).backward()
    expected = Truth(case)
    for name, p in model.named_parameters():
        assert same_grad(p.grad, grads[name])
        for quantity in ("ggn_diag", "batch_grad"):
            if p.grad is not None:
                assert wrong_at(p, quantity, expected, name, True) == "", f"{quantity} of {name}"
    return model


def intact(model: nn.Module) -> None:
    """Nothing half collected."""
    for part in model.modules():
        assert not hasattr(part, "ggn_block")
    for p in model.parameters():
        assert not any(hasattr(p, q) for q in QUANTITIES)
