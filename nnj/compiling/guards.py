"""What a graph was traced for: the tensors of modules, which are its inputs, and everything else in
their attributes, which is baked in and must be the same in each replay.

A module's attributes are tables (its `__dict__`, those of parameters, buffers, parts and hooks, and
those of other objects in them, such as a configuration), of which each entry is a tensor, a plain
value that is compared, a container of such, or an object that must be the same one. What a function
reads from globals, closures and files is nowhere in them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnj.compiling.values import (
    CONTAINERS,
    GONE,
    PLAIN,
    Exactly,
    Table,
    holds,
    is_buffer,
    is_of_a_library,
    is_same,
    parts,
    put,
    sign_of,
)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
_KEPT_BY_TORCH = frozenset(nn.Module().__dict__) - {"training"}
_OPAQUE = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.Generator,
)
_DEEPEST = 16  # containers in containers


class State:
    """What some modules are now.

    Args:
        modules: with all their parts.
        ignored: names of attributes that are results, and read by no forward pass.
        is_own: which hooks are nnj's own.

    Attributes:
        tensors: all of them, each once.
        refused: why a graph could not stand for these modules; None if it could.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        ignored: Collection[str] = (),
        is_own: Callable[[Any], bool] = lambda hook: False,
    ):
        self.tensors: list[Tensor] = []
        self.refused: str | None = None
        self._ignored, self._is_own = ignored, is_own
        self._number: dict[int, int] = {}  # of each tensor
        self._names: list[str] = []  # where each stands first
        self._signs: list[tuple[Any, ...]] = []
        self._tables: list[Table] = []
        self._met: dict[int, Any] = {}  # objects, which are held so that no other has their place
        for m in modules:
            self._visit(m, type(m).__name__)

    def finish(self) -> None:
        """No tensor is to be added any more."""
        self._signs = [sign_of(t) for t in self.tensors]
        tables = self._tables
        self._sizes = [(t.table, len(t.table), t) for t in tables if t.length is not None]
        self._values = [(t.table, name, value, t) for t in tables for name, value in t.values]
        self._slots = [(t.table, name, number) for t in tables for name, number in t.tensors]
        self._contents = [(t.table, name, was) for t in tables for name, was in t.contents]

    def name(self, number: int) -> str:
        """Where a tensor stands first."""
        return self._names[number]

    # -- reading -----------------------------------------------------------------------------------

    def _visit(self, holder: Any, path: str) -> None:
        """An object with attributes."""
        if id(holder) in self._met:
            return
        self._met[id(holder)] = holder
        if isinstance(holder, nn.Module):
            self._visit_module(holder, path)
        elif isinstance(getattr(holder, "__dict__", None), dict):
            self._table(vars(holder), path)

    def _visit_module(self, m: nn.Module, path: str) -> None:
        if isinstance(m, torch.jit.ScriptModule):
            self._refuse(f"{path} is a scripted module, whose attributes nobody can read")
            return
        own = m.__dict__
        self._table(own, path, _KEPT_BY_TORCH)
        for name in _TABLES:
            self._table(own[name], path)
        for name in _HOOKS:
            self._table(own[name], f"{path}.{name}", hooks=True)
            if not all(map(self._is_own, own[name].values())):
                self._refuse(f"{path} has a hook, which a graph does not call")
        for cls in type(m).__mro__:
            self._visit_class(cls)

    def _visit_class(self, cls: type) -> None:
        """What modules of a class read from it, and its forward, which may be replaced."""
        if id(cls) in self._met or cls in (nn.Module, object):
            return
        self._met[id(cls)] = cls
        own = not cls.__module__.startswith("torch.")
        names = [n for n in vars(cls) if n == "forward" or (own and not n.startswith("__"))]
        self._table(vars(cls), cls.__name__, names=names)

    def _table(
        self,
        table: Mapping[Any, Any],
        path: str,
        skipped: Container[str] = (),
        names: Sequence[str] | None = None,
        hooks: bool = False,
    ) -> None:
        found = Table(table, path, skipped, self._ignored, names)
        self._tables.append(found)
        for name in found.names if names is None else names:
            value = table[name]
            if isinstance(value, Tensor):
                found.tensors.append((name, self.tensor(value, f"{path}.{name}")))
                self._check_tensor(value, f"{path}.{name}")
            elif isinstance(value, (*CONTAINERS, functools.partial)) or is_buffer(value):
                found.contents.append((name, self.frozen(value, f"{path}.{name}")))
            else:
                found.values.append((name, value))
                if not hooks:
                    self._look_into(value, f"{path}.{name}")

    def _look_into(self, value: Any, path: str) -> None:
        if isinstance(value, types.MethodType):
            self._look_into(value.__self__, path)
        elif not isinstance(value, (*PLAIN, *_OPAQUE)) and (
            isinstance(value, nn.Module) or not is_of_a_library(type(value))
        ):
            self._visit(value, path)

    def tensor(self, t: Tensor, path: str) -> int:
        """The number of a tensor among the inputs."""
        number = self._number.get(id(t))
        if number is None:
            number = self._number[id(t)] = len(self.tensors)
            self.tensors.append(t)
            self._names.append(path)
        return number

    def _check_tensor(self, t: Tensor, path: str) -> None:
        if t._backward_hooks or t._post_accumulate_grad_hooks:
            self._refuse(f"{path} has a hook, which a graph does not call")
        elif type(t) not in (Tensor, nn.Parameter, nn.Buffer) or t.layout != torch.strided:
            self._refuse(f"{path} is a {type(t).__name__} of layout {t.layout}")
        elif t.grad_fn is not None:
            self._refuse(f"{path} was computed before the call, and its gradient goes on there")

    def _refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def frozen(self, value: Any, path: str = "", depth: int = 0) -> Any:
        """A container as something to compare: its types, plain values, and which tensors."""
        kind = type(value)
        if depth > _DEEPEST:
            self._refuse(f"{path} has containers in containers, more than {_DEEPEST}")
            return (kind, Exactly(value))
        inside: Callable[[Any], Any] = lambda v: self.frozen(v, path, depth + 1)
        if isinstance(value, Tensor):
            self._check_tensor(value, path)
            return (Tensor, self.tensor(value, path))
        if isinstance(value, functools.partial):
            return (kind, inside(parts(value)))
        if isinstance(value, dict):
            return (kind, *((k, inside(v)) for k, v in value.items()))
        if isinstance(value, (set, frozenset)):
            return (kind, frozenset(value))
        if isinstance(value, CONTAINERS):
            return (kind, *map(inside, value))
        if is_buffer(value):
            return (kind, getattr(value, "dtype", None), memoryview(value).tobytes())
        self._look_into(value, path)
        return (kind, Exactly(value))

    # -- comparing ---------------------------------------------------------------------------------

    def now(self, arguments: Any = (), were: Any = (tuple,)) -> list[Tensor] | None:
        """All tensors as they are now, in the same order; None if anything else is not what it was.

        Args:
            arguments: something more to compare, with what `frozen` gave for it.
        """
        found: list[Tensor | None] = [None] * len(self._signs)
        if not holds(arguments, were, found):
            return None
        if not self._is_same(found):
            return None
        for t, sign in zip(found, self._signs, strict=True):
            if t is None or sign_of(t) != sign:
                return None
        if len(set(map(id, found))) < len(found):  # one tensor where there were two
            return None
        return found  # type: ignore[return-value]

    def _is_same(self, found: list[Tensor | None]) -> bool:
        """Whether no entry of any table is another one; tensors are put in their places. In one
        loop for each kind of entry, since this is asked before each replay.
        """
        for table, length, whole in self._sizes:
            if len(table) != length and whole.size() != whole.length:
                return False
        for table, name, value, _ in self._values:
            now = table.get(name, GONE)
            if now is not value and not is_same(now, value):
                return False
        for table, name, number in self._slots:
            now = table.get(name)
            if not isinstance(now, Tensor) or not put(found, number, now):
                return False
        return all(holds(table.get(n, GONE), was, found) for table, n, was in self._contents)

    def difference(
        self, tensors: Sequence[Tensor] | None, arguments: Any = (), were: Any = (tuple,)
    ) -> str | None:
        """The attribute that is not what it was; None if all are. A tensor that is another one than
        that of the list, if there is one, is a difference here, too; else one of another shape,
        dtype or device.
        """
        found: list[Tensor | None] = [None] * len(self._signs)
        if not holds(arguments, were, found):
            return "the batch"
        for table in self._tables:
            name = table.difference(found)
            if name is not None:
                return f"{table.path}.{name}"
        for number, t in enumerate(found):
            if tensors is None:
                same = t is not None and sign_of(t) == self._signs[number]
            else:
                same = t is tensors[number]
            if not same:
                return self.name(number)
        return None
