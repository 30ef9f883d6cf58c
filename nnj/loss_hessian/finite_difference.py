"""H v against g(y + v) - g(y - v) over 2: whether the gradient g of a loss, differentiated again,
is what it is.

Torch's own operations are differentiated by formulas that can be differentiated again, or say that
they cannot. A function of somebody else, a compiled one or a hook on a gradient may detach what it
gives, and then H is zero without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nnj.generators import OwnGenerator

_OWN = re.compile(r"(Backward\d+|AccumulateGrad|CopySlices|CopyBackwards|UndefinedGrad|GraphRoot)$")


class HookWatch(TorchFunctionMode):
    """Notes whether a hook is put on a tensor.

    Attributes:
        hooked: whether one was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hooked = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") == "register_hook":
            self.hooked = True
        return function(*args, **(kwargs or {}))


def has_foreign_node(value: Tensor) -> bool:
    """Whether a node on autograd's graph of a value is none of torch's own operations."""
    stack, met = [value.grad_fn], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        met.add(node)
        python = isinstance(node, torch.autograd.function.BackwardCFunction)
        if python or not _OWN.search(node.name()):
            return True
        stack += [child for child, _ in node.next_functions]
    return False


def is_differentiated(at: Callable[[list[Tensor]], Any], outputs: Sequence[Tensor]) -> bool:
    """Whether the Hessian is the derivative of the gradient, at outputs moved by a small random
    amount, which are off any kink that is at the outputs themselves.

    A kink may be met all the same, so that one of three tries is enough; where the loss is not
    defined at moved outputs, nothing is known against it.

    Args:
        at: gives for outputs something with `gradient` (n, entries) and `product(v)`.
        outputs: in the dtype in which the Hessian is taken.
    """
    seed = OwnGenerator.seeded(0)
    double = outputs[0].dtype == torch.float64
    tolerance, amounts = (1e-4, (1e-3, 1e-4, 1e-5)) if double else (2e-2, (1e-1, 3e-2, 1e-2))
    seen = False
    for amount in amounts:
        agrees = _agrees(at, outputs, amount, tolerance, seed)
        if agrees:
            return True
        seen = seen or agrees is not None
    return not seen


def _agrees(
    at: Callable[[list[Tensor]], Any],
    outputs: Sequence[Tensor],
    amount: float,
    tolerance: float,
    seed: torch.Generator,
) -> bool | None:
    """Whether both agree where outputs are moved by half of `amount` to all of it; None where the
    loss is not defined there.
    """
    moved = [t + amount * _random(t, seed) for t in outputs]
    ahead, behind = [], []
    for t in moved:
        v = amount / 10 * _random(t, seed)
        ahead.append(t + v)
        behind.append(t - v)
    try:
        here, after, before = at(moved), at(ahead).gradient, at(behind).gradient
        v = torch.cat(
            [(a - b).reshape(len(after), -1) for a, b in zip(ahead, behind, strict=True)], -1
        )
        found, expected = here.product(v[None])[0], (after - before).detach()
    except Exception:
        return None
    if not bool(torch.isfinite(found).all() & torch.isfinite(expected).all()):
        return None
    size = torch.maximum(found.abs(), expected.abs()).max()
    noise = 1e2 * torch.finfo(found.dtype).eps * torch.maximum(after.abs(), before.abs()).max()
    return bool(((found - expected).abs() <= tolerance * size + noise).all())


def _random(like: Tensor, seed: torch.Generator) -> Tensor:
    """Of every sign, and from a half to one, times what the entries are where they are large."""
    drawn = torch.rand(2, *like.shape, generator=seed, dtype=torch.float64).to(like)
    return (1 + drawn[0]) / 2 * torch.where(drawn[1] < 0.5, -1.0, 1.0) * like.abs().clamp(min=1)
