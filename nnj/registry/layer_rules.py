"""Which rule describes a module, and what it says at a point: lookups are made once, answers are
checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnj.errors import NNJError, PluginError
from nnj.jacobians.jacobian import Jacobian
from nnj.registry.claim import Entry, at_work
from nnj.registry.manager import manager

# What a subclass may override without becoming another layer.
_HARMLESS = {
    "extra_repr",
    "reset_parameters",
    "train",
    "eval",
    "state_dict",
    "load_state_dict",
    "forward_features",
}
_HARMLESS |= {
    "__init__",
    "__repr__",
    "__doc__",
    "__module__",
    "__annotations__",
    "__constants__",
    "__dir__",
    "__setstate__",
    "__getstate__",
    "__static_attributes__",
    "__firstlineno__",
    "__qualname__",
    "__orig_bases__",
    "__parameters__",
}


def describes(entry: Entry, module: nn.Module) -> bool:
    """Whether the class that was registered still says what this module computes."""
    return not undescribed(entry, module)


def undescribed(entry: Entry, module: nn.Module) -> str:
    """Why the class that was registered does not say what this module computes; "" if it does."""
    held = module.__dict__
    if "forward" in held or "__call__" in held:
        return "its forward was replaced"
    if "parametrizations" in held["_modules"] and parametrize.is_parametrized(module):
        return "its parameters are computed by a parametrization"
    for p in held["_parameters"].values():
        if not (p is None or isinstance(p, nn.Parameter)):
            return "a parameter of it is no nn.Parameter"
    if entry.when is not None:
        return "" if entry.when(module) else "its rule is for others of its class"
    if type(module) is entry.key or entry.key is nn.Module:
        return ""
    for cls in type(module).__mro__:
        if cls is entry.key:
            return ""
        own = [
            name
            for name in vars(cls)
            if (name not in _HARMLESS and hasattr(entry.key, name)) or name in module._parameters
        ]
        if own:  # its own method, or its own idea of what a parameter of that name is
            return f"{cls.__name__} has another {', '.join(own)} than {entry.key.__name__}"
    return "its class has no rule"


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
        held, tables = module.__dict__, manager().tables
        if (
            type(module) is not self._cls
            or tables is not self._tables
            or held["_modules"]
            or "forward" in held
        ):
            return self._ask(module)
        for p in held["_parameters"].values():
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


def blame(entry: Entry, module: nn.Module, path: str) -> str:
    """Subject of an error about a rule."""
    return f"plugin '{entry.source.plugin}' (layer '{path or type(module).__name__}')"


def apply_rule(
    entry: Entry, module: nn.Module, x: Tensor, y: Tensor, path: str = ""
) -> dict[str, Jacobian] | None:
    """The Jacobians of a module at a point; None where the rule declines, or leaves out a parameter
    that it must know.

    Errors: as `ask_rule`.
    """
    found = ask_rule(entry, module, x, y, path)
    return None if isinstance(found, str) else found


def ask_rule(
    entry: Entry, module: nn.Module, x: Tensor, y: Tensor, path: str = ""
) -> dict[str, Jacobian] | str:
    """The Jacobians of a module at a point, or the reason for which the rule cannot be taken there.

    Errors: `PluginError` for anything but Jacobians of the right shapes under "input" and names of
    parameters; `NNJError` with the path of the layer if the rule refuses."""
    if x.is_complex() or y.is_complex():
        # autograd's vjp is J^H u, where theirs is J^T u
        return "its tensors are complex, and rules are those of real ones"
    who = blame(entry, module, path)
    try:
        slots = entry.rule(
            module,
            x if "x" in entry.uses else _shape_of(x),
            y if "y" in entry.uses else _shape_of(y),
        )
    except NotImplementedError as error:
        return str(error) or "its rule declines"
    except NNJError as error:  # a refusal, not a fault: say where
        error.args = (f"layer '{path or type(module).__name__}': {error}",)
        raise
    except Exception as error:
        raise PluginError(
            f"{who}: the rule failed with {type(error).__name__}: {error}{at_work(entry.source)}"
        ) from error
    if not isinstance(slots, dict):
        raise PluginError(
            f"{who}: the rule returned {type(slots).__name__}, expected a dict of Jacobians"
        )
    own = dict(module.named_parameters(remove_duplicate=False))
    for slot, j in slots.items():
        if slot != "input" and slot not in own and isinstance(getattr(module, slot, None), Tensor):
            return f"a computed tensor stands in the place of {slot!r}"  # pruning, old weight norm
        if slot != "input" and slot not in own:
            raise PluginError(
                f"{who}: the rule names {slot!r}, which is neither 'input' nor a parameter of the "
                "layer"
            )
        if not isinstance(j, Jacobian):
            raise PluginError(f"{who}: {slot!r} is {type(j).__name__}, expected a nnj.Jacobian")
        shape = tuple(x.shape[1:]) if slot == "input" else tuple(own[slot].shape)
        if j.inputs != shape or j.outputs != tuple(y.shape[1:]) or j.n != y.shape[0]:
            raise PluginError(
                f"{who}: {slot!r} maps {j.inputs} to {j.outputs} for {j.n} rows, "
                f"expected {shape} to {tuple(y.shape[1:])} for {y.shape[0]}"
            )
        if j.like.is_meta:  # a rule that reads neither x nor y knows no device
            j.like = x if y.is_meta and x.is_floating_point() else y
    known = {id(own[name]) for name in slots if name != "input"}
    unknown = [name for name, p in own.items() if p.requires_grad and id(p) not in known]
    return f"its rule does not know {', '.join(unknown)}" if unknown else slots


def _shape_of(t: Tensor) -> Any:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def checked(what: str, out: Any, shape: tuple[int, ...], who: str) -> Tensor:
    """`out` if it has the shape that the contract of a rule asks for. Errors: `PluginError`."""
    if not isinstance(out, Tensor) or tuple(out.shape) != shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise PluginError(f"{who}: {what} returned {found}, expected {shape}")
    return out
