"""AbstractJacobian: the products as methods, under the names and in the order of arguments of the
original nnj.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.products.jacobian_products import jacobian, jmjTp, jmp, jTmjp, jTmjp_pair, jvp, mjp, vjp
from nnj.products.metrics import Metric, slot_of
from nnj.propagation.linearize import parameters


class AbstractJacobian:
    """A mixin for modules: every product of `nnj` as a method, with and without a leading
    underscore.

    Two uses. `nnj.utils.convert_to_nnj` mixes it into the classes of a model. And a layer of your
    own, `class MyLayer(nnj.AbstractJacobian, nn.Module)`, that defines `forward` and
    `_jacobian(self, x, val=None, wrt="input")` - (N, out, in) over flattened axes, and (N, out, P)
    for wrt="weight" with parameters in the order of `parameters()` - has them all, and takes part
    in `nnj.collect`.

    In each method `val` (or `value`) is the output at x, of which only the batch is looked at;
    arguments, results and errors are those of the function of the same name, but products in the
    weights of a module without parameters that require grad are None. `wrt="weights"` is another
    spelling of "weight"."""

    @property
    def _n_params(self) -> int:
        """P, the number of parameters that require grad."""
        return sum(p.numel() for p in parameters(_module(self)))

    def get_weight(self) -> Tensor | None:
        """The parameters that require grad as one vector (P,), a copy; None if there are none."""
        params = parameters(_module(self))
        return torch.cat([p.detach().flatten() for p in params]) if params else None

    def set_weight(self, w: Tensor | None) -> None:
        """Write a vector (P,) into the parameters, in place: also into those of the model that this
        one was converted from.

        Errors: `NNJError` if its shape is not (P,).
        """
        params = parameters(_module(self))
        shape = None if w is None else tuple(w.shape)
        if shape != ((self._n_params,) if params else None):
            raise NNJError(f"w has shape {shape}, expected {(self._n_params,) if params else None}")
        with torch.no_grad():
            for p, part in zip(
                params, w.split([p.numel() for p in params]) if w is not None else (), strict=True
            ):
                p.copy_(part.reshape(p.shape))

    def _jacobian(
        self,
        x: Tensor,
        val: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(jacobian, x, val, value, wrt)

    # not an alias: a layer of your own defines `_jacobian`
    def jacobian(
        self,
        x: Tensor,
        val: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._jacobian(x, val if value is None else value, wrt=wrt)

    def _jvp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        vector: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(jvp, x, val, value, wrt, vector)

    def _vjp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        vector: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(vjp, x, val, value, wrt, vector)

    def _jmp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        matrix: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(jmp, x, val, value, wrt, matrix)

    def _mjp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        matrix: Tensor | None = None,
        wrt: str = "input",
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(mjp, x, val, value, wrt, matrix)

    def _jmjTp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        matrix: Metric = None,
        wrt: str = "input",
        from_diag: bool = False,
        to_diag: bool = False,
        diag_backprop: bool = False,
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(jmjTp, x, val, value, wrt, matrix, from_diag, to_diag, diag_backprop)

    def _jTmjp(
        self,
        x: Tensor,
        val: Tensor | None = None,
        matrix: Tensor | None = None,
        wrt: str = "input",
        from_diag: bool = False,
        to_diag: bool = False,
        diag_backprop: bool = False,
        *,
        value: Tensor | None = None,
    ) -> Any:
        return self._product(jTmjp, x, val, value, wrt, matrix, from_diag, to_diag, diag_backprop)

    def _jTmjp_batch2(
        self,
        x1: Tensor,
        x2: Tensor,
        val1: Tensor | None = None,
        val2: Tensor | None = None,
        matrixes: Sequence[Tensor] | None = None,
        wrt: str = "input",
        to_diag: bool = False,
        diag_backprop: bool = False,
        *,
        from_diag: bool = False,
        value1: Tensor | None = None,
        value2: Tensor | None = None,
    ) -> Any:
        """`nnj.jTmjp_pair`: in the weights of several layers three lists of blocks; with `to_diag`
        three diagonals (N, P).
        """
        _check(x2, val2 if value2 is None else value2)
        run = lambda m, x1, matrixes, wrt, *flags: jTmjp_pair(m, x1, x2, matrixes, wrt, *flags)
        return self._product(
            run, x1, val1, value1, wrt, matrixes, from_diag, to_diag, diag_backprop
        )

    jvp, vjp, jmp, mjp = _jvp, _vjp, _jmp, _mjp
    jmjTp, jTmjp, jTmjp_batch2 = _jmjTp, _jTmjp, _jTmjp_batch2  # noqa: N815

    def _product(
        self,
        product: Any,
        x: Tensor,
        val: Tensor | None,
        value: Tensor | None,
        wrt: str,
        *rest: Any,
    ) -> Any:
        """A function of `nnj.products`; `rest` is what it takes, without wrt, which comes behind
        the first of them.
        """
        _check(x, val if value is None else value)
        module = _module(self)
        if slot_of(wrt) == "weight" and not parameters(module):
            return None
        return product(module, x, *rest[:1], wrt, *rest[1:])


def _module(self: AbstractJacobian) -> nn.Module:
    if not isinstance(self, nn.Module):
        raise NNJError(
            f"{type(self).__name__} is no nn.Module: class "
            f"{type(self).__name__}(nnj.AbstractJacobian, nn.Module)"
        )
    return self


def _check(x: Any, val: Any) -> None:
    """Errors: `NNJError` if x is no tensor, or val cannot be the output there."""
    if not isinstance(x, Tensor):
        raise NNJError(f"x is {type(x).__name__}, expected a tensor")
    if val is not None and (
        not isinstance(val, Tensor) or val.dim() == 0 or val.shape[0] != x.shape[0]
    ):
        what = tuple(val.shape) if isinstance(val, Tensor) else type(val).__name__
        raise NNJError(
            f"val is {what}, expected the output of the module at x, ({x.shape[0]}, ...), or None"
        )
