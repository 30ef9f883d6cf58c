"""Which rule describes a module, and what it says of a call: rules are looked up once, and their
answers are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnj.errors import NNJError, PluginError
from nnj.jacobians.jacobian import Jacobian
from nnj.registry import manager as managers
from nnj.registry.blame import blame, rule_failed
from nnj.registry.claim import Entry
from nnj.registry.manager import manager


class Described(NamedTuple):
    """What a rule says of a call: the Jacobian in each slot, and the module's parameters by
    name.
    """

    jacobians: dict[str, Jacobian]
    parameters: dict[str, nn.Parameter]


class Declined(NamedTuple):
    """That a rule does not speak for a module or a call, and why: what follows "declined: "."""

    reason: str


# What a subclass may override without becoming another layer.
_HARMLESS = frozenset(
    """
    extra_repr reset_parameters train eval state_dict load_state_dict forward_features
    __init__ __repr__ __doc__ __module__ __annotations__ __constants__ __dir__ __setstate__
    __getstate__ __dict__ __weakref__
    __static_attributes__ __firstlineno__ __qualname__ __orig_bases__ __parameters__
    """.split()
)


def describes(entry: Entry, module: nn.Module) -> bool:
    """Whether the class that was registered still says what this module computes."""
    return undescribed(entry, module) is None


def undescribed(entry: Entry, module: nn.Module) -> Declined | None:
    """Why the class that was registered does not say what this module computes; None if it does."""
    own = module.__dict__
    if "forward" in own or "__call__" in own:
        return Declined("its forward was replaced")
    if "parametrizations" in own["_modules"] and parametrize.is_parametrized(module):
        return Declined("its parameters are computed by a parametrization")
    for p in own["_parameters"].values():
        if not (p is None or isinstance(p, nn.Parameter)):
            return Declined("a parameter of it is no nn.Parameter")
    if entry.when is not None:
        return None if entry.when(module) else Declined("its rule is for others of its class")
    if type(module) is entry.key or entry.is_fallback:
        return None
    return _overridden(entry.key, module)


def _overridden(base: type, module: nn.Module) -> Declined | None:
    """The methods, or ideas of what a parameter is, in which the module's class differs from a base
    class, if there are any.
    """
    for cls in type(module).__mro__:
        if cls is base:
            return None
        if cls.__module__.startswith("torch.distributed.fsdp"):
            continue  # fully_shard gives a module methods of its own, and computes what it did
        changed = [
            name
            for name in vars(cls)
            if (name not in _HARMLESS and hasattr(base, name)) or name in module._parameters
        ]
        if changed:
            return Declined(f"{cls.__name__} has another {', '.join(changed)} than {base.__name__}")
    return Declined("its class has no rule")


def find_rule(module: nn.Module) -> Entry | None:
    """The rule for a module, or None: then what it computes goes through autograd's own nodes."""
    entry = manager().find("layer", type(module))
    return entry if entry is not None and describes(entry, module) else None


class RuleLookup:
    """`find_rule` for one module, asked at each of its calls: what cannot have changed since the
    last one is not asked again.
    """

    __slots__ = ("_cls", "_entry", "_tables")

    def __init__(self) -> None:
        self._cls: type | None = None

    def rule(self, module: nn.Module) -> Entry | None:
        own, tables = module.__dict__, managers.in_use.tables
        if (
            type(module) is not self._cls
            or tables is not self._tables
            or own["_modules"]
            or "forward" in own
        ):
            return self._ask(module)
        for p in own["_parameters"].values():
            if p is not None and type(p) is not nn.Parameter:
                return self._ask(module)
        return self._entry

    def _ask(self, module: nn.Module) -> Entry | None:
        entry, self._cls = find_rule(module), None
        if entry is not None and entry.when is None and type(module) is entry.key:
            self._cls, self._entry, self._tables = entry.key, entry, manager().tables
        return entry

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return RuleLookup, ()  # a copy of a module asks anew


def ask_rule(
    entry: Entry,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    paths: Mapping[nn.Module, str] = MappingProxyType({}),
) -> Described | Declined:
    """The Jacobians of a module at a point, or why the rule cannot be taken there.

    Args:
        paths: the names of modules, for errors.

    Errors: `PluginError` for anything but Jacobians of the right shapes under "input" and names of
    parameters; `NNJError` with the path of the layer if the rule refuses."""
    if x.is_complex() or y.is_complex():
        # autograd's vjp is J^H u, where theirs is J^T u
        return Declined("its tensors are complex, and rules are those of real ones")
    try:
        jacobians = entry.rule(
            module,
            x if "x" in entry.uses or x.is_meta else _shape_of(x),
            y if "y" in entry.uses or y.is_meta else _shape_of(y),
        )
    except NotImplementedError as error:
        return Declined(str(error) or "its rule declines")
    except NNJError as error:  # a refusal, not a fault: say where
        error.args = (f"layer '{paths.get(module) or type(module).__name__}': {error}",)
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # one that exits would take the user's program with it
        raise rule_failed(blame(entry, module, paths.get(module, "")), entry, error) from error
    parameters = parameters_by_name(module)
    fault = _fault(jacobians, module, parameters, x, y)
    if isinstance(fault, Declined):
        return fault
    if fault is not None:
        raise PluginError(f"{blame(entry, module, paths.get(module, ''))}: {fault}")
    if [name for name, p in parameters.items() if p.requires_grad and name not in jacobians]:
        known = {parameters[slot] for slot in jacobians if slot != "input"}  # under another name
        unknown = [name for name, p in parameters.items() if p.requires_grad and p not in known]
        if unknown:
            return Declined(f"its rule gives no Jacobian in {', '.join(unknown)}")
    return Described(jacobians, parameters)


def _fault(
    jacobians: Any, module: nn.Module, parameters: dict[str, nn.Parameter], x: Tensor, y: Tensor
) -> Declined | str | None:
    """What is wrong with the answer of a rule, if anything: it names a tensor that the module
    computes, and is not taken; or it breaks the contract.
    """
    if not isinstance(jacobians, dict):
        return f"the rule returned {type(jacobians).__name__}, expected a dict of Jacobians"
    rows, outputs = y.shape[0], tuple(y.shape[1:])
    for slot, j in jacobians.items():
        if slot == "input":
            shape = tuple(x.shape[1:])
        elif slot in parameters:
            shape = tuple(parameters[slot].shape)
        elif isinstance(getattr(module, slot, None), Tensor):  # by pruning, or the old weight norm
            return Declined(f"a computed tensor stands in the place of {slot!r}")
        else:
            return f"the rule names {slot!r}, which is neither 'input' nor a parameter of the layer"
        if not isinstance(j, Jacobian):
            return f"{slot!r} is {type(j).__name__}, expected a nnj.Jacobian"
        if j.inputs != shape or j.outputs != outputs or j.n != rows:
            return (
                f"{slot!r} maps {j.inputs} to {j.outputs} for {j.n} rows, "
                f"expected {shape} to {outputs} for {rows}"
            )
        if j.like.is_meta:  # a rule that reads neither x nor y knows no device
            j.like = x if y.is_meta and x.is_floating_point() else y
    return None


def parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """`named_parameters(remove_duplicate=False)`, without torch's generators for a layer that has
    no parts.
    """
    if module._modules:
        return dict(module.named_parameters(remove_duplicate=False))
    return {name: p for name, p in module._parameters.items() if p is not None}


def _shape_of(t: Tensor) -> Any:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def checked(what: str, out: Any, shape: tuple[int, ...], who: str) -> Tensor:
    """`out` if it has the shape that the contract of a rule asks for. Errors: `PluginError`."""
    if not isinstance(out, Tensor) or tuple(out.shape) != shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise PluginError(f"{who}: {what} returned {found}, expected {shape}")
    return out
