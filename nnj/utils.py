"""convert_to_nnj: the interface of the original nnj, for any model."""

from __future__ import annotations

import copyreg
import types
from typing import Any, TypeVar

import torch
from torch import nn

from nnj.products.methods import AbstractJacobian

M = TypeVar("M", bound=nn.Module)
_classes: dict[type, type] = {}
_OWN = set(nn.Module().__dict__)  # the tables that torch keeps on a module


def convert_to_nnj(model: M) -> M:
    """The model with the products of `AbstractJacobian` as methods, and so its parts:
    `converted[0]._vjp(...)`.

    Modules are copied, what they hold is shared: parameters, buffers and attributes are the same
    objects, so that training one trains the other. The given model is left as it was. The class of
    each is a subclass of what it was, of the same name, with the methods of `AbstractJacobian` that
    it lacks. Converting again gives the same object; scripted parts stay as they are. References to
    parts that are not registered (in a plain list) still lead to the given model's parts, of which
    the numbers are the same."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_to_nnj takes a torch.nn.Module, not {model!r}")
    if all(
        isinstance(part, (AbstractJacobian, torch.jit.ScriptModule)) for part in model.modules()
    ):
        return model
    return _convert(model, {})


def _convert(module: M, done: dict[nn.Module, Any]) -> M:
    """A copy of a module that holds what it holds, of the class with the mixin; a part that stands
    in several places is copied once.
    """
    if module in done:
        known: M = done[module]
        return known
    if isinstance(module, torch.jit.ScriptModule):
        return module
    cls: Any = type(module) if isinstance(module, AbstractJacobian) else _class(type(module))
    new: M = cls.__new__(cls)
    done[module] = new
    for name, value in module.__dict__.items():
        table = name in _OWN and isinstance(value, (dict, set))
        new.__dict__[name] = value.copy() if table else value
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _convert(child, done)
    return new


def _class(cls: type) -> type:
    """The class with the mixin behind it: what the class has is kept, what it lacks is added.
    There is one for each class.
    """
    if cls not in _classes:
        body = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        made = types.new_class(
            cls.__name__,
            (cls, AbstractJacobian),
            exec_body=lambda namespace: namespace.update(body),
        )
        copyreg.pickle(made, _reduce)
        _classes[cls] = made
    return _classes[cls]


def _reduce(module: Any) -> tuple[Any, ...]:
    """Pickle and deepcopy: the class is made anew from the one that can be imported."""
    return _rebuild, (type(module).__mro__[1],), module.__reduce_ex__(2)[2]


def _rebuild(cls: type) -> Any:
    made: Any = _class(cls)
    return made.__new__(made)
