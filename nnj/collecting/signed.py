"""Losses that are not convex: H = H_+ - H_-, two positive semi-definite parts that walk one after
the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nnj.collecting.accumulate import Contribution
from nnj.collecting.loss_columns import LossColumns
from nnj.collecting.per_loss import contribute
from nnj.collecting.quantity import Quantity
from nnj.errors import Indefinite, NNJError
from nnj.loss_hessian.autodiff import autodiff_hessian
from nnj.recording.records import LossCall

if TYPE_CHECKING:
    from nnj.collecting.collect import collect


def parts(call: LossCall, scale: Tensor) -> dict[int, LossColumns]:
    """The columns of H_+ under 1, and those of H_- under -1 where there is any.

    A loss is linear in its factor: if it is convex, H_- is that under the negative part of the
    factor. Else H is had as it is and split by the signs of its eigenvalues."""
    signs = [sign for sign in (1, -1) if bool((sign * scale > 0).any())] or [1]
    found = {sign: LossColumns(call, (sign * scale).clamp(min=0)) for sign in signs}
    try:
        for columns in found.values():
            columns.hessian  # noqa: B018
    except Indefinite:
        found = {sign: LossColumns(call, scale.abs()) for sign in (1, -1)}
        for sign, columns in found.items():
            columns.scale = scale.detach()
            columns.hessian = autodiff_hessian(
                columns._value, tuple(columns.outputs), columns.name, sign
            )
            columns.rows = columns.hessian.rows
    return {
        sign: columns
        for sign, columns in found.items()
        if sign > 0 or bool(columns.hessian.diagonal().any())
    }


def contribute_signed(
    call: LossCall, scale: Tensor, node: Any, collections: list[collect]
) -> dict[int, Contribution]:
    """`contribute` for all open collections, of which those that are signed have both parts.
    Errors: those of `contribute`.
    """
    convex, signed = ([c for c in collections if c.signed == which] for which in (False, True))
    found = contribute(call, scale, node, convex) if convex else {}
    for sign, columns in parts(call, scale).items() if signed else ():
        for key, part in contribute(call, scale, node, signed, columns).items():
            whole = found.setdefault(key, part)
            for name, values in part.values.items():
                there = whole.values.setdefault(name, {})
                for holder, v in values.items():
                    there[holder] = sign * v if whole is part else there.get(holder, 0) + sign * v
    return found


def check_signed(quantities: dict[str, Quantity], tol: float) -> None:
    """Errors: `NNJError` for a quantity that is not linear in the Hessian, or a tolerance."""
    for name, quantity in quantities.items():
        if quantity.source != "exact" or quantity.per_sample:
            raise NNJError(
                f"{name} cannot be collected with signed=True, which is for sums over the exact "
                "Hessian of the loss, such as ggn_diag and ggn_block. Collect it in a `with` of "
                "its own"
            )
    if tol:
        raise NNJError(
            "tol= gives a lower bound, but under signed=True the difference of two, which is none. "
            "Leave one out"
        )
