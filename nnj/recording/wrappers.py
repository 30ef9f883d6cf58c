"""What splits the data over processes: which wrapper of torch a model is called through, and the
group over which it makes one gradient of those of all ranks; and engines that nnj cannot follow.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnj.distributed.ranks import same_ranks
from nnj.errors import NNJError

# Engines by the packages in which they are, and why nnj cannot follow them.
ENGINES = {
    "torch.distributed.pipelining": "the model is a stage of torch.distributed.pipelining: only "
    "the last one has a loss, of parts of a batch, and gradients are divided when all is done. "
    "Collect with the whole model, on one process or under DistributedDataParallel or fully_shard",
    "deepspeed": "the model runs in an engine of DeepSpeed, which scales gradients, adds them up "
    "over ranks and keeps them where nnj has no hook. Collect with the model before DeepSpeed is "
    "given it, or under DistributedDataParallel or fully_shard",
}


def check_engine(name: str | None) -> None:
    """Errors: `NNJError` for one of the engines."""
    if name is not None:
        raise NNJError(ENGINES[name])


def engine_of(model: Any) -> str | None:
    """Which engine an object is; None for none."""
    for base in type(model).__mro__:
        if base.__name__ == "DeepSpeedEngine":
            return "deepspeed"
        if _is_in(base.__module__, "torch.distributed.pipelining"):
            return "torch.distributed.pipelining"
    return None


def engine_of_call(python: FrameType | None) -> str | None:
    """Which engine a frame of Python was called by; None for none."""
    there = [name for name in ENGINES if name in sys.modules]
    while there and python is not None:
        module = python.f_globals.get("__name__") or ""
        for name in there:
            if _is_in(module, name):
                return name
        python = python.f_back
    return None


def check_not_flat(modules: Iterable[nn.Module]) -> None:
    """Errors: `NNJError` for a part of a model under FullyShardedDataParallel."""
    for kind in set(map(type, modules)):
        if any(base.__name__ == "FullyShardedDataParallel" for base in kind.__mro__):
            raise flat_error(kind.__name__)


def flat_error(who: str) -> NNJError:
    return NNJError(
        f"{who} is sharded by FSDP 1 (FullyShardedDataParallel), where a parameter is a part of a "
        "flat one, and nnj does not take it. Shard it with torch.distributed.fsdp.fully_shard, or "
        "collect with the model before it is sharded, or under DistributedDataParallel"
    )


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


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
