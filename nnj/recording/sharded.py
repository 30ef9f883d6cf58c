"""Models whose parameters are sharded by torch's FSDP2 (`fully_shard`): which units there are, and
how they are whole for a while, with FSDP's own hooks at rest.

Here is all that nnj knows of FSDP's insides. Of each parameter there are two: the sharded one, a
DTensor, which the model has between steps and on which `.grad` stands; and the whole one, which
takes part in the graph, and whose memory is freed where FSDP does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nnj.distributed.ranks import there_are_groups
from nnj.errors import NNJError
from nnj.recording.scope import modules_of


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with a module."""
    return dist.is_available() and isinstance(module, _fsdp_module())


def _fsdp_module() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def sharded_models(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of some models in which parameters are sharded."""
    if not there_are_groups():
        return []
    return [model for model in dict.fromkeys(models) if any(map(is_unit, modules_of(model)))]


class Sharding:
    """The units of sharded models.

    Args:
        models: in which some are.

    Attributes:
        group: of the ranks over which data are split.
        divides: by what gradients of the sum over ranks are divided.

    Errors: `NNJError` for units of several kinds, of which no one loss has the gradients.
    """

    def __init__(self, models: Iterable[nn.Module]):
        self.models = list(models)
        units: list[Any] = [m for model in self.models for m in modules_of(model) if is_unit(m)]
        self.states: list[Any] = list(dict.fromkeys(unit._get_fsdp_state() for unit in units))
        self.groups = [group for state in self.states for group in _groups(state)]
        self.params = [param for group in self.groups for param in group.fsdp_params]
        meshes = [group.mesh_info.mesh for group in self.groups]
        if any(mesh != meshes[0] for mesh in meshes):
            raise NNJError(
                "units of the model are sharded over other meshes, so that it is not known over "
                "which ranks to add up. Shard all of them over one mesh"
            )
        self.group = _group_of(meshes[0])
        factors = {_factor_of(group) for group in self.groups}
        if len(factors) > 1:
            raise NNJError(
                "set_gradient_divide_factor gives units of the model other factors, so that their "
                "gradients are those of no one loss. Set one factor on all units"
            )
        (factor,) = factors
        self.divides = float(dist.get_world_size(self.group) if factor is None else factor)

    @property
    def sharded(self) -> dict[Tensor, nn.Parameter]:
        """The sharded parameters, by the whole ones."""
        known = [param for param in self.params if hasattr(param, "_unsharded_param")]
        return {param._unsharded_param: param.sharded_param for param in known}

    def like(self, holder: Any) -> Tensor:
        """A sharded parameter on whose mesh a result is placed."""
        if isinstance(holder, Tensor):
            return holder
        first: Tensor = self.params[0].sharded_param
        return first

    def check_covered(self) -> None:
        """Errors: `NNJError` for parameters that take part in no unit, or in several dimensions."""
        mine = {p for param in self.params for p in (param.sharded_param, _whole(param))}
        for model in self.models:
            for name, p in model.named_parameters():
                if p not in mine:
                    raise NNJError(
                        f"parameter '{name}' is in no unit of fully_shard, while others are: its "
                        ".grad is of this rank alone. Call fully_shard on the whole model, too"
                    )
        for param in self.params:
            if type(_whole(param)) is not nn.Parameter:
                raise NNJError(
                    "a parameter is sharded by fully_shard and distributed by tensor parallelism, "
                    "too, which nnj does not take yet. Collect with one of both"
                )

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters whole, and FSDP's hooks at rest: afterwards all is as it was. A collective
        of all ranks.
        """
        asleep = [group for group in self.groups if not group.is_unsharded]
        kept = [(state, state._training_state, _prefetched(state)) for state in self.states]
        queued = [
            (s._state_ctx, s._state_ctx.post_backward_final_callback_queued) for s in self.states
        ]
        for group in asleep:
            group.lazy_init()
            group.unshard()
            group.wait_for_unshard()
        try:
            for state in self.states:
                state._state_ctx.post_backward_final_callback_queued = True
                state._states_to_backward_prefetch = []
            for group in self.groups:
                group.pre_backward = group.post_backward = _nothing
            yield
        finally:
            for group in self.groups:
                vars(group).pop("pre_backward", None)
                vars(group).pop("post_backward", None)
            for state, training, prefetched in kept:
                state._training_state, state._states_to_backward_prefetch = training, prefetched
            for context, was in queued:
                context.post_backward_final_callback_queued = was
            for group in asleep:
                group.reshard()


def _nothing(*given: Any) -> None:
    """In the place of what FSDP does before and behind the backward pass of a unit."""


def _groups(state: Any) -> list[Any]:
    """The groups of parameters of a unit."""
    several = getattr(state, "_fsdp_param_groups", None)  # one in older torch
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _factor_of(group: Any) -> float | None:
    """By what a group divides gradients; None for the number of ranks. Errors: `NNJError` for what
    older torch has in its place.
    """
    if getattr(group, "reduce_scatter_reduce_op", None) is not None:
        raise NNJError(
            "set_reduce_scatter_divide_factor changes gradients in a way that this version of "
            "torch does not tell. Leave it out"
        )
    found: float | None = getattr(group, "gradient_divide_factor", None)
    return found


def _prefetched(state: Any) -> list[Any]:
    found: list[Any] = state._states_to_backward_prefetch
    return found


def _whole(param: Any) -> Any:
    return getattr(param, "_unsharded_param", None)


def _group_of(mesh: Any) -> Any:
    """The process group of a mesh. Errors: `NNJError` for a mesh of several dimensions that are not
    all ranks.
    """
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise NNJError(
        f"the model is sharded over a mesh of {mesh.ndim} dimensions that are not all ranks. Shard "
        "it over one dimension, or over all ranks"
    )


def placed_like(t: Tensor, p: Tensor) -> Tensor:
    """The sum over ranks of a tensor as a DTensor: placed as a sharded parameter of its shape is,
    or else by rows.
    """
    terms, placements = _terms(t, p)
    if t.shape != p.shape:
        placements = [_rows() if at.is_shard() else at for at in placements]
    found: Tensor = terms.redistribute(placements=placements)
    return found


def whole_sum(t: Tensor, p: Tensor) -> Tensor:
    """The sum over ranks of a tensor, on each of them."""
    found: Tensor = _terms(t, p)[0].full_tensor()
    return found


def part_of(t: Tensor, p: Tensor) -> Tensor:
    """A tensor that all ranks have as a DTensor that is placed as a sharded parameter is."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    every = DTensor.from_local(t.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: Tensor = every.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return found


def _terms(t: Tensor, p: Tensor) -> tuple[Any, list[Any]]:
    """A tensor as the term of a sum over the mesh of a sharded parameter, and its placements."""
    from torch.distributed.tensor import DTensor, Partial

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    terms = DTensor.from_local(t.contiguous(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return terms, list(p.placements)  # type: ignore[attr-defined]


def _rows() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)
