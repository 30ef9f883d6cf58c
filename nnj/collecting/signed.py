"""H = H_+ - H_-: losses that are not convex, as the difference of two positive semi-definite parts
that are propagated one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnj.checks import at_once
from nnj.collecting.contribution import Contribution
from nnj.collecting.loss_columns import LossColumns
from nnj.collecting.loss_reading import check_as_called
from nnj.collecting.per_loss import contribute
from nnj.collecting.request import GRADIENT, Request
from nnj.collecting.shares import Shares
from nnj.errors import Indefinite
from nnj.recording.records import LossCall


def contribute_signed(
    call: LossCall,
    scale: Tensor,
    node: Any,
    requests: Sequence[Request],
    shares: Shares | None = None,
) -> dict[Request, Contribution]:
    """`contribute` for all requests; those that are signed get the difference of the two parts.

    Args:
        shares: takes in sums of sharded models.

    Errors: those of `contribute`.
    """
    check_as_called(call, scale, node)
    convex = [request for request in requests if not request.signed]
    signed = [request for request in requests if request.signed]
    found: dict[Request, Contribution] = {}
    if convex:
        curvature = any(s is not GRADIENT for r in requests for s in r.sources.values())
        columns = LossColumns(call, scale, node, curvature=curvature)
        found = contribute(call, node, convex, columns, shares)
    for sign, columns in _parts(call, scale, node).items() if signed else ():
        for request, part in contribute(call, node, signed, columns, shares, sign).items():
            mine = found.setdefault(request, Contribution(part.calls, part.n))
            mine.absorb(part, request.quantities, sign)
    return found


@at_once()
def _parts(call: LossCall, scale: Tensor, node: Any) -> dict[int, LossColumns]:
    """The columns of H_+ under 1, and those of H_- under -1; what is known to be zero is left
    out.
    """
    try:
        found = _by_factor(call, scale, node)
    except Indefinite:
        found = {sign: LossColumns(call, scale, node, sign) for sign in (1, -1)}
    kept = {
        sign: columns
        for sign, columns in found.items()
        if sign > 0 or bool(columns.hessian.diagonal().any())
    }
    return kept or {1: found[-1]}  # of zero, which has no sign


def _by_factor(call: LossCall, scale: Tensor, node: Any) -> dict[int, LossColumns]:
    """Of a convex loss, which is linear in its factor: H_- is H under the negative part of the
    factor. Errors: `Indefinite` if the loss is not convex.
    """
    signs = [sign for sign in (1, -1) if bool((sign * scale > 0).any())] or [1]
    found = {sign: LossColumns(call, (sign * scale).clamp(min=0), node) for sign in signs}
    for columns in found.values():
        _ = columns.hessian  # raises
    return found
