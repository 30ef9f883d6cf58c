"""What a graph was traced for: the tensors of modules, which are its inputs, and everything else in
their attributes, which is baked in and must be the same in each replay.

A module's attributes are tables (its `__dict__`, those of parameters, buffers, parts and hooks, and
those of other objects in them, such as a configuration), of which each entry is a tensor, a plain
value that is compared, a container of such, or an object that must be the same one. What a function
reads from globals, closures and files is nowhere in them."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
_KEPT_BY_TORCH = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_OPAQUE = (
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    torch.Generator,
)
_HOLDERS = ("types", "argparse", "collections", "__main__")
_DEEPEST = 16
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


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
        self._tables: list[_Table] = []
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
        found = _Table(table, path, skipped, self._ignored, names)
        self._tables.append(found)
        for name in found.names if names is None else names:
            value = table[name]
            if isinstance(value, Tensor):
                found.tensors.append((name, self.tensor(value, f"{path}.{name}")))
                self._check_tensor(value, f"{path}.{name}")
            elif isinstance(value, (*_CONTAINERS, functools.partial)) or _is_buffer(value):
                found.contents.append((name, self.frozen(value, f"{path}.{name}")))
            else:
                found.values.append((name, value))
                if not hooks:
                    self._look_into(value, f"{path}.{name}")

    def _look_into(self, value: Any, path: str) -> None:
        if isinstance(value, types.MethodType):
            self._look_into(value.__self__, path)
        elif not isinstance(value, (*_PLAIN, *_OPAQUE)) and (
            isinstance(value, nn.Module) or not _is_of_a_library(type(value))
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
            return (kind, _Exactly(value))
        inside: Callable[[Any], Any] = lambda v: self.frozen(v, path, depth + 1)
        if isinstance(value, Tensor):
            self._check_tensor(value, path)
            return (Tensor, self.tensor(value, path))
        if isinstance(value, functools.partial):
            return (kind, inside(_parts(value)))
        if isinstance(value, dict):
            return (kind, *((k, inside(v)) for k, v in value.items()))
        if isinstance(value, (set, frozenset)):
            return (kind, frozenset(value))
        if isinstance(value, _CONTAINERS):
            return (kind, *map(inside, value))
        if _is_buffer(value):
            return (kind, getattr(value, "dtype", None), memoryview(value).tobytes())
        self._look_into(value, path)
        return (kind, _Exactly(value))

    # -- comparing ---------------------------------------------------------------------------------

    def now(self, arguments: Any = (), were: Any = (tuple,)) -> list[Tensor] | None:
        """All tensors as they are now, in the same order; None if anything else is not what it was.

        Args:
            arguments: something more to compare, with what `frozen` gave for it.
        """
        found: list[Tensor | None] = [None] * len(self._signs)
        if not _holds(arguments, were, found):
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
            now = table.get(name, _GONE)
            if now is not value and not _same(now, value):
                return False
        for table, name, number in self._slots:
            now = table.get(name)
            if not isinstance(now, Tensor) or not _put(found, number, now):
                return False
        return all(_holds(table.get(n, _GONE), was, found) for table, n, was in self._contents)

    def difference(
        self, tensors: Sequence[Tensor] | None, arguments: Any = (), were: Any = (tuple,)
    ) -> str | None:
        """The attribute that is not what it was; None if all are. A tensor that is another one than
        that of the list, if there is one, is a difference here, too; else one of another shape,
        dtype or device.
        """
        found: list[Tensor | None] = [None] * len(self._signs)
        if not _holds(arguments, were, found):
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


class _Table:
    """One table of attributes, and what stood in it."""

    __slots__ = ("contents", "ignored", "length", "names", "path", "table", "tensors", "values")

    def __init__(
        self,
        table: Mapping[Any, Any],
        path: str,
        skipped: Container[str],
        ignored: Collection[str],
        names: Sequence[str] | None,
    ):
        self.table, self.path, self.ignored = table, path, ignored
        self.names = [n for n in table if n not in skipped and n not in ignored]
        self.length = None if names is not None else self.size()
        self.tensors: list[tuple[Any, int]] = []
        self.values: list[tuple[Any, Any]] = []
        self.contents: list[tuple[Any, Any]] = []

    def size(self) -> int:
        """How many entries there are that are no results."""
        found = len(self.table)
        for name in self.ignored:
            if name in self.table:
                found -= 1
        return found

    def difference(self, tensors: list[Tensor | None]) -> str | None:
        """The name of an entry that is another one; where there is none the tensors are put in
        their places.
        """
        table = self.table
        if self.length is not None and self.size() != self.length:
            known = set(self.names)
            return str(next((n for n in table if n not in known and n not in self.ignored), "?"))
        for name, value in self.values:
            now = table.get(name, _GONE)
            if now is not value and not _same(now, value):
                return str(name)
        for name, number in self.tensors:
            now = table.get(name)
            if not isinstance(now, Tensor) or not _put(tensors, number, now):
                return str(name)
        for name, was in self.contents:
            if not _holds(table.get(name, _GONE), was, tensors):
                return str(name)
        return None


_GONE = object()


class _Exactly:
    """A plain value, equal to others of its type that are equal, or an object, equal to itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Exactly) and _same(self.value, other.value)

    def __hash__(self) -> int:
        return id(type(self.value))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same for all that may be computed with them."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, _PLAIN):
        return type(one) is types.MethodType and bool(one == other)
    if isinstance(one, float) and one == other == 0:
        return math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def _put(tensors: list[Tensor | None], number: int, t: Tensor) -> bool:
    """Note a tensor at its number; whether another one is not there."""
    there = tensors[number]
    tensors[number] = t
    return there is None or there is t


def _holds(value: Any, was: Any, tensors: list[Tensor | None]) -> bool:
    """Whether a container is what `State.frozen` gave."""
    kind = type(value)
    if isinstance(value, Tensor):
        return was[0] is Tensor and _put(tensors, was[1], value)
    if was[0] is not kind:
        return False
    if isinstance(value, functools.partial):
        return _holds(_parts(value), was[1], tensors)
    if isinstance(value, dict):
        return len(value) == len(was) - 1 and all(
            k == key and type(k) is type(key) and _holds(v, kept, tensors)
            for (k, v), (key, kept) in zip(value.items(), was[1:], strict=True)
        )
    if isinstance(value, (set, frozenset)):
        return bool(value == was[1])
    if isinstance(value, _CONTAINERS):
        return len(value) == len(was) - 1 and all(
            _holds(v, kept, tensors) for v, kept in zip(value, was[1:], strict=True)
        )
    if _is_buffer(value):
        same = getattr(value, "dtype", None) == was[1]
        return bool(same and memoryview(value).tobytes() == was[2])
    return _same(value, was[1].value)


def _parts(function: functools.partial[Any]) -> list[Any]:
    return [function.func, function.args, function.keywords]


def _is_of_a_library(cls: type) -> bool:
    """Whether the objects of a class are torch's or Python's own, such as locks and loggers; those
    that hold what a user has put in are not meant.
    """
    top = cls.__module__.split(".")[0]
    return top == "torch" or (top in sys.stdlib_module_names and top not in _HOLDERS)


def _is_buffer(value: Any) -> bool:
    """Whether an object holds numbers in memory that may be written over, as those of numpy do."""
    return isinstance(value, bytearray) or (
        type(value).__module__ == "numpy" and hasattr(value, "__array_interface__")
    )


def sign_of(t: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of an input beside its numbers."""
    hooks = (t._backward_hooks, t._post_accumulate_grad_hooks)
    return (t.shape, t.dtype, t.device, t.stride(), t.requires_grad, type(t), hooks)


def surroundings() -> tuple[Any, ...]:
    """What torch's operators depend on beside their arguments."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) for k in kinds),
        torch.backends.cudnn.allow_tf32,
    )


def unusual() -> str | None:
    """Why nothing can be traced or replayed here and now; None if it can."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "there are no gradients here (torch.no_grad or inference_mode)"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is called inside a transform of torch.func"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "it is called inside a mode of torch"
    if any(_GLOBAL_HOOKS):
        return "there are hooks on all modules of torch"
    return None
