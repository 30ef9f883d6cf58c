"""Models whose parameters are sharded by torch's FSDP2 (`fully_shard`): which units there are, and
how they are whole for a while, with FSDP's own hooks at rest.

Here is all that nnj knows of FSDP's insides. Of each parameter there are two: the sharded one, a
DTensor, which the model has between steps and on which `.grad` stands; and the whole one, which
takes part in the graph, and whose memory is freed where FSDP does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nnj.distributed.ranks import there_are_groups
from nnj.errors import NNJError
from nnj.recording.scope import modules_of
from nnj.recording.tensor_parallel import (
    is_distributed,
    local_of,
    part_on_mesh,
    settled,
    shape_here,
)


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
        mesh, group: of the ranks over which data are split.
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
        self.mesh, self.group = meshes[0], _group_of(meshes[0])
        factors = {_factor_of(group) for group in self.groups}
        if len(factors) > 1:
            raise NNJError(
                "set_gradient_divide_factor gives units of the model other factors, so that their "
                "gradients are those of no one loss. Set one factor on all units"
            )
        (factor,) = factors
        self.divides = float(dist.get_world_size(self.group) if factor is None else factor)
        self._of = {param.sharded_param: param for param in self.params}
        self._asleep: list[Any] = []  # groups that are sharded, while all are at rest

    @property
    def sharded(self) -> dict[Tensor, nn.Parameter]:
        """The sharded parameters, by the whole ones."""
        known = [param for param in self.params if hasattr(param, "_unsharded_param")]
        return {param._unsharded_param: param.sharded_param for param in known}

    @property
    def largest(self) -> int:
        """Bytes of the largest unit while it is whole."""
        sizes = (
            sum(p.numel() * p.element_size() for p in (f.sharded_param for f in group.fsdp_params))
            for group in self.groups
        )
        return max(sizes, default=0)

    @property
    def parallel(self) -> dict[Tensor, Tensor]:
        """The parameters that tensor parallelism distributes, too: by the sharded one the one that
        takes part in the graph, a DTensor of which this rank has its part.
        """
        known = self.sharded.items()
        return {sharded: whole for whole, sharded in known if is_distributed(whole)}

    def whole_of(self, holder: Any) -> Any:
        """Of a sharded parameter the one that takes part in the graph; None of anything else."""
        return _whole(self._of[holder]) if holder in self._of else None

    @property
    def placements(self) -> list[Any]:
        """How the first parameter is placed on the mesh."""
        return self.placements_of(self.params[0].sharded_param)

    def placements_of(self, holder: Any) -> list[Any]:
        """How a sharded parameter is placed on the mesh."""
        placements = list(holder.placements[: self.mesh.ndim])
        return [_as_shards(at) for at in placements]

    def placed(self, t: Any, holder: Any) -> Tensor:
        """A DTensor on the mesh that is the part of a result on this rank as one that is placed as
        a sharded parameter is.
        """
        if holder.device_mesh == self.mesh:
            return _arrived(t)
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            settled(t.to_local()),
            holder.device_mesh,
            holder.placements,
            run_check=False,
            shape=holder.shape,
            stride=holder.stride(),
        )

    def check_covered(self) -> None:
        """Errors: `NNJError` for parameters that take part in no unit, or are of another kind."""
        mine = {p for param in self.params for p in (param.sharded_param, _whole(param))}
        for model in self.models:
            for name, p in model.named_parameters():
                if p not in mine:
                    raise NNJError(
                        f"parameter '{name}' is in no unit of fully_shard, while others are: its "
                        ".grad is of this rank alone. Call fully_shard on the whole model, too"
                    )
        for param in self.params:
            whole = _whole(param)
            if type(whole) is not nn.Parameter and (
                not is_distributed(whole) or whole.device_mesh.ndim != 1
            ):
                raise NNJError(
                    f"a parameter that fully_shard shards is a {type(whole).__name__} while it is "
                    "whole, which nnj does not take: plain ones, and those that tensor parallelism "
                    "distributes over one dimension of ranks"
                )

    # -- whole for a while -------------------------------------------------------------------------

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """FSDP's hooks at rest, and in the model the whole parameters, which of sharded units have
        no memory until `open`: afterwards all is as it was.
        """
        self._asleep = [group for group in self.groups if not group.is_unsharded]
        states, contexts = self.states, [state._state_ctx for state in self.states]
        kept = [
            *_attributes(states, "_training_state", "_states_to_backward_prefetch"),
            *_attributes(contexts, "post_backward_final_callback_queued"),
            *_attributes(self.groups, "_training_state"),
        ]
        for group in self._asleep:
            group.lazy_init()
        try:
            for state, context in zip(states, contexts, strict=True):
                context.post_backward_final_callback_queued = True
                state._states_to_backward_prefetch = []
            for group in self.groups:
                vars(group).update(dict.fromkeys(_AT_REST, _nothing))
            for _, param in self._asleep_fsdp():
                param._setattr_on_modules(param._unsharded_param)
            yield
        finally:
            for group in self.groups:
                for name in _AT_REST:
                    vars(group).pop(name, None)
            for owner, name, value in kept:
                setattr(owner, name, value)
            for _, param in self._asleep_fsdp():
                param._setattr_on_modules(_between(param))
            self._asleep = []

    def never_whole(self) -> list[int]:
        """The numbers of units at rest that have not been whole yet."""
        whole = {unit for unit, _ in self._asleep_fsdp()}
        return [i for i, group in enumerate(self._asleep) if group.fsdp_params and i not in whole]

    def asleep_params(self) -> list[tuple[int, Tensor]]:
        """The whole parameters of units that are sharded while at rest, by the number of the
        unit.
        """
        return [(i, param._unsharded_param) for i, param in self._asleep_fsdp()]

    def _asleep_fsdp(self) -> list[tuple[int, Any]]:
        every = [(i, param) for i, group in enumerate(self._asleep) for param in group.fsdp_params]
        return [(i, param) for i, param in every if _whole(param) is not None]

    def open(self, unit: int) -> None:
        """Make a unit at rest whole. A collective of all ranks."""
        group = self._asleep[unit]
        was, group._training_state = group._training_state, _idle(group)
        type(group).unshard(group)
        type(group).wait_for_unshard(group)
        group._training_state = was

    def close(self, unit: int) -> None:
        """Free what `open` took."""
        group = self._asleep[unit]
        was, group._training_state = group._training_state, _idle(group)
        type(group).reshard(group)
        group._training_state = was
        for param in group.fsdp_params:
            param._setattr_on_modules(param._unsharded_param)


# What FSDP does of a group around the forward and the backward pass of its unit.
_AT_REST = ("pre_backward", "post_backward", "unshard", "wait_for_unshard", "reshard")


def _nothing(*given: Any, **options: Any) -> None:
    """In the place of what FSDP does by itself."""


def _idle(group: Any) -> Any:
    """FSDP's word for a group that is in no pass."""
    return type(group._training_state).IDLE


def _between(param: Any) -> Any:
    """What a model has of a parameter that is sharded."""
    state = getattr(param.sharded_state, "name", "")
    return param._sharded_post_forward_param if "POST_FORWARD" in state else param.sharded_param


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


def _attributes(owners: Iterable[Any], *names: str) -> list[tuple[Any, str, Any]]:
    """What owners have under some names now."""
    return [(owner, name, getattr(owner, name)) for owner in owners for name in names]


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


def placed_sum(t: Tensor, holder: Any, sharding: Sharding) -> Tensor:
    """The sum over ranks of a tensor as a DTensor: at a sharded parameter placed as that is, if it
    has its shape, or else by rows.
    """
    mine = _local_part(t, holder, sharding)
    if mine is None:
        rows = [_rows() if at.is_shard() else at for at in sharding.placements]
        return _arrived(_terms(t, sharding).redistribute(placements=rows))
    placements = sharding.placements_of(holder)
    return sharding.placed(_terms(mine, sharding).redistribute(placements=placements), holder)


def whole_sum(t: Tensor, sharding: Sharding) -> Tensor:
    """The sum over ranks of a tensor, on each of them."""
    found: Tensor = _terms(t, sharding).full_tensor()
    return found


def part_of(t: Tensor, holder: Any, sharding: Sharding) -> Tensor:
    """A tensor that all ranks have, if it has the shape of a sharded parameter as a DTensor that is
    placed as this is.
    """
    mine = _local_part(t, holder, sharding)
    if mine is None:
        return t
    like = SimpleNamespace(device_mesh=sharding.mesh)
    return sharding.placed(part_on_mesh(mine, like, sharding.placements_of(holder)), holder)


def _local_part(t: Tensor, holder: Any, sharding: Sharding) -> Tensor | None:
    """Of a tensor of the shape of a parameter that of its part on this rank, where tensor
    parallelism distributes it; None for tensors of another shape.
    """
    whole = sharding.whole_of(holder)
    if not is_distributed(whole):
        return t if isinstance(holder, Tensor) and t.shape == holder.shape else None
    if tuple(t.shape) == shape_here(whole):
        return t
    if t.shape != holder.shape:
        return None
    return local_of(part_on_mesh(t, whole))


def _arrived(t: Any) -> Tensor:
    """A DTensor when its collective is over: until somebody waits for it, torch keeps what it was
    given.
    """
    settled(t.to_local())
    found: Tensor = t
    return found


def _terms(t: Tensor, sharding: Sharding) -> Any:
    """A tensor as the term of a sum over the mesh of a sharded model."""
    from torch.distributed.tensor import DTensor, Partial

    terms = [Partial()] * sharding.mesh.ndim
    return DTensor.from_local(t.contiguous(), sharding.mesh, terms, run_check=False)


def _as_shards(at: Any) -> Any:
    """A placement among those of the part that a rank has: shards of it alone."""
    from torch.distributed.tensor import Shard

    return Shard(at.dim) if hasattr(at, "split_factor") else at


def _rows() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)
