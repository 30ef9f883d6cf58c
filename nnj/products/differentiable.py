"""J and v^T J with a graph of their own, by torch.func: for those who propagate gradients through
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from nnj.errors import NNJError
from nnj.propagation.called import logits_of
from nnj.propagation.linearize import Modules, Slot, parameters, parameters_inside

Function = Callable[..., Tensor]


def differentiable_jacobian(module: nn.Module, x: Any, wrt: Slot, modules: Modules) -> Tensor:
    """J, (N, out, in) or (N, out, P)."""
    of_sample, at, in_dims = _of_sample(module, x, wrt, modules)
    j = _mapped(module, jacrev(of_sample), in_dims, *at)
    parts = list(j.values()) if isinstance(j, dict) else [j]
    shapes = [p.shape for p in at[0].values()] if wrt == "weight" else [x.shape[1:]]
    n, flat = len(x), [torch.Size(shape).numel() for shape in shapes]
    return torch.cat([t.reshape(n, -1, p) for t, p in zip(parts, flat, strict=True)], 2)


def differentiable_vjp(
    module: nn.Module,
    x: Any,
    vector: Tensor,
    wrt: Slot,
    modules: Modules,
) -> Tensor:
    """v^T J, (N, in) or (N, P)."""
    of_sample, at, in_dims = _of_sample(module, x, wrt, modules)

    def pulled(v: Tensor, first: Any, *rest: Any) -> Any:
        of_first = lambda first: of_sample(first, *rest)
        y, pull, *_ = vjp(of_first, first)
        return pull(v.reshape(y.shape))[0]

    found = _mapped(module, pulled, (0, *in_dims), vector, *at)
    parts = list(found.values()) if isinstance(found, dict) else [found]
    return torch.cat([t.reshape(len(x), -1) for t in parts], 1)


def _of_sample(
    module: nn.Module, x: Any, wrt: Slot, modules: Modules
) -> tuple[Function, tuple[Any, ...], tuple[Any, ...]]:
    """The model at one sample, as a function of what J is in; what it is given, and along which
    axes these have the samples.
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise NNJError("differentiable=True is of a model of one tensor (N, ...)")
    everything: dict[str, Tensor] = dict(module.named_parameters())
    if wrt == "input":
        if modules is not None:
            raise NNJError("modules= says in which parameters J is, so it is for wrt='weight'")
        of_input = lambda x: _output(module, everything, x)
        return of_input, (x,), (0,)
    wanted = set(parameters(module))
    if modules is not None:
        wanted &= parameters_inside(module, modules)
    params = {name: p for name, p in everything.items() if p in wanted}
    of_params = lambda params, x: _output(module, {**everything, **params}, x)
    return of_params, (params, x), (None, 0)


def _output(module: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    found: Tensor = logits_of(functional_call(module, params, (x[None],)))[0]
    return found


def _mapped(module: nn.Module, of_sample: Function, in_dims: tuple[Any, ...], *given: Any) -> Any:
    """Over the samples. Errors: `NNJError` where torch.func cannot."""
    try:
        return vmap(of_sample, in_dims, randomness="error")(*given)
    except NNJError:
        raise
    except Exception as error:
        raise NNJError(
            f"differentiable=True maps {type(module).__name__} over its samples by torch.func, "
            f"which failed with {type(error).__name__}: {error}. Use the product without it, whose "
            "result has no graph"
        ) from error
