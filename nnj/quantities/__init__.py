"""The quantities that nnj brings, registered like a stranger's."""
from __future__ import annotations

from collections.abc import Callable

from nnj.hookspecs import hookimpl
from nnj.quantities.base import Quantity
from nnj.quantities.batch_grad import BatchGrad
from nnj.quantities.ggn_block import GGNBlock
from nnj.quantities.ggn_diag import GGNDiag
from nnj.quantities.ggn_diag_mc import GGNDiagMC


@hookimpl
def nnj_register_quantities(register: Callable[..., None]) -> None:
    register("ggn_diag", GGNDiag)
    register("ggn_block", GGNBlock)
    register("ggn_diag_mc", GGNDiagMC)
    register("batch_grad", BatchGrad)


__all__ = ["BatchGrad", "GGNBlock", "GGNDiag", "GGNDiagMC", "Quantity"]
