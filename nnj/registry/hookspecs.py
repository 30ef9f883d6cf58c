"""What a plugin may implement. This file is the reference for plugin authors.

A plugin is a module (or object) behind an entry point of the group `nnj`. It implements any of
these hooks with `@nnj.hookimpl`; each is called once, when nnj first needs its tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import pluggy
from torch import nn

hookspec = pluggy.HookspecMarker("nnj")
hookimpl = pluggy.HookimplMarker("nnj")


class RegisterLayer(Protocol):
    """What `nnj_register_layers` is given: it claims a class of layers."""

    def __call__(
        self,
        cls: type[Any],
        rule: Callable[..., Any],
        /,
        *,
        uses: Literal["", "x", "y", "xy"] = "xy",
        replace: bool = False,
        when: Callable[[Any], bool] | None = None,
        node: str = "",
    ) -> None: ...


class RegisterLoss(Protocol):
    """What `nnj_register_losses` is given: it claims a class of losses."""

    def __call__(
        self,
        cls: type[nn.Module],
        rule: Callable[..., Any],
        /,
        *,
        reference: Callable[..., Any] | None = None,
        replace: bool = False,
    ) -> None: ...


class RegisterQuantity(Protocol):
    """What `nnj_register_quantities` is given: it claims a name for a subclass of
    `nnj.Quantity`.
    """

    def __call__(self, name: str, cls: type[Any], /, *, replace: bool = False) -> None: ...


@hookspec
def nnj_register_layers(register: RegisterLayer) -> None:
    """Say what layers are: `register(cls, rule, *, uses="xy", replace=False, when=None, node="")`.

    `rule(module, x, y) -> {"input": J, "weight": J, ...}` gives at the point x, with y = module(x),
    one `nnj.Jacobian` for the input and one for each parameter by its name; both x and y are
    detached and have the batch in axis 0. Raise `NotImplementedError` with a reason to decline a
    module (an odd option, a mode): nnj then goes through autograd.

    `uses` names which of x and y the rule *reads* ("x", "y", "xy" or ""). Of the other
    one it gets the shape alone (on the `meta` device), and what follows may overwrite that one in
    place without harm.

    The rule holds for `cls` and for subclasses that override none of its methods; or, if `cls` is
    an interface of which each subclass defines `forward`, for those of which `when(module)` says
    so. `replace=True` takes over a class that another plugin has claimed.

    `node` names a node of autograd ("MaxPool2DWithIndicesBackward0") that is as exact and knows
    more, such as indices that the rule would have to find again: where it made y straight from x,
    it is used in place of the rule."""


@hookspec
def nnj_register_losses(register: RegisterLoss) -> None:
    """Say what the Hessian of a loss is: `register(cls, rule, *, reference=None, replace=False)`.

    `rule(module, scale, output, *args) -> nnj.LossHessian`: `scale` is what multiplies the loss in
    the scalar that is differentiated (a tensor of the shape of the loss), `output` the model's
    detached output, `args` what else was given to the loss. Raise `NotImplementedError` with a
    reason to decline: nnj then differentiates the loss twice.

    `reference(module, output, *args)` is what `nnj.testing` differentiates twice in place of the
    loss, where autograd cannot, or where the rule takes in what made the output
    (the log_softmax before an NLLLoss). At `output` it has the value of the loss."""


@hookspec
def nnj_register_quantities(register: RegisterQuantity) -> None:
    """Say what can be collected: `register(name, cls, *, replace=False)`, `cls` a subclass of
    `nnj.Quantity`.

    `name` is what `nnj.collect` takes, and the attribute under which results appear.
    """
