"""What of torch splits the data over processes: which wrapper a model is called through, and the
group over which it makes one gradient of those of all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnj.distributed.ranks import same_ranks
from nnj.errors import NNJError


def wrapper_of_call(module: nn.Module) -> nn.Module | None:
    """What an outermost call of a module goes through, asked while it runs; None for nothing."""
    if isinstance(module, DistributedDataParallel):
        return module
    return DistributedDataParallel._active_ddp_module


def inside_wrapper(module: nn.Module) -> nn.Module:
    """The model that a wrapper holds, by whose names its parameters go; else the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def data_group(
    wrappers: Collection[nn.Module | None], models: Iterable[nn.Module], group: Any = None
) -> Any:
    """The group over which gradients are averaged of models that were called through wrappers; None
    if there is none.

    Args:
        wrappers: of all calls, None among them for one that went through none.
        models: that took part.
        group: over which the user says that all is added up, whatever wrappers do.

    Errors: `NNJError` where gradients are another thing than the mean over one group.
    """
    models = list(models)
    found = [w for w in wrappers if w is not None]
    parts = [m for model in models for m in model.modules()]
    found += [m for m in parts if isinstance(m, DistributedDataParallel) and m not in found]
    for wrapper in found:
        check_mean(wrapper)
    if group is not None or not found:
        return group
    covered = {p for wrapper in found for p in wrapper.parameters()}
    apart = any(p.requires_grad and p not in covered for m in models for p in m.parameters())
    mixed = None in wrappers and (apart or len(wrappers) > 1)
    if mixed or any(map(_leaves_out, found)):
        raise NNJError(
            "some parameters, or calls of the model, are under DistributedDataParallel, which "
            "averages gradients over ranks, and others are not. Say group=..., over which all are "
            "then added up, or group=False for what this rank has"
        )
    groups = [group_of(wrapper) for wrapper in found]
    if not all(same_ranks(group, groups[0]) for group in groups):
        raise NNJError(
            "models under wrappers of other process groups took part, so that it is not known over "
            "which ranks to add up. Say group=..., or collect for each in a `with` of its own"
        )
    return groups[0]


def _leaves_out(wrapper: Any) -> bool:
    """Whether a wrapper was told to leave parameters out that require grad."""
    ignored = getattr(wrapper.module, "_ddp_params_and_buffers_to_ignore", ())
    return any(p.requires_grad and n in ignored for n, p in wrapper.module.named_parameters())


def first_group(wrappers: Iterable[nn.Module | None]) -> Any:
    """The group of the first wrapper; None if there is none."""
    return next((group_of(w) for w in wrappers if w is not None), None)


def group_of(wrapper: Any) -> Any:
    """The group over which a wrapper splits data."""
    return wrapper.process_group


def check_mean(wrapper: Any) -> None:
    """Errors: `NNJError` for a wrapper whose gradients are no mean over ranks."""
    if getattr(wrapper, "_comm_hooks", None):
        raise NNJError(
            "the model is under DistributedDataParallel with a communication hook, whose gradients "
            "may be anything. Collect without the hook, or with group=False what this rank has"
        )
    if not getattr(wrapper, "_divide_by_initial_world_size", True):
        raise NNJError(
            "join(divide_by_initial_world_size=False) divides gradients by how many ranks are "
            "left, which is another loss in each pass. Leave it at True, or collect with "
            "group=False what this rank has"
        )
