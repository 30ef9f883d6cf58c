"""When two attributes are the same for all that may be computed with them: plain values, containers
of such, tables of attributes, and what is to be known of a tensor beside its numbers.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections import deque
from collections.abc import Collection, Container, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_HOLDERS = ("types", "argparse", "collections", "__main__")


class Table:
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
            now = table.get(name, GONE)
            if now is not value and not is_same(now, value):
                return str(name)
        for name, number in self.tensors:
            now = table.get(name)
            if not isinstance(now, Tensor) or not put(tensors, number, now):
                return str(name)
        for name, was in self.contents:
            if not holds(table.get(name, GONE), was, tensors):
                return str(name)
        return None


GONE = object()


class Exactly:
    """A plain value, equal to others of its type that are equal, or an object, equal to itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exactly) and is_same(self.value, other.value)

    def __hash__(self) -> int:
        return id(type(self.value))


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same for all that may be computed with them."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, PLAIN):
        return type(one) is types.MethodType and bool(one == other)
    if isinstance(one, float) and one == other == 0:
        return math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def put(tensors: list[Tensor | None], number: int, t: Tensor) -> bool:
    """Note a tensor at its number; whether another one is not there."""
    there = tensors[number]
    tensors[number] = t
    return there is None or there is t


def holds(value: Any, was: Any, tensors: list[Tensor | None]) -> bool:
    """Whether a container is what `State.frozen` gave."""
    kind = type(value)
    if isinstance(value, Tensor):
        return was[0] is Tensor and put(tensors, was[1], value)
    if was[0] is not kind:
        return False
    if isinstance(value, functools.partial):
        return holds(parts(value), was[1], tensors)
    if isinstance(value, dict):
        return len(value) == len(was) - 1 and all(
            k == key and type(k) is type(key) and holds(v, kept, tensors)
            for (k, v), (key, kept) in zip(value.items(), was[1:], strict=True)
        )
    if isinstance(value, (set, frozenset)):
        return bool(value == was[1])
    if isinstance(value, CONTAINERS):
        return len(value) == len(was) - 1 and all(
            holds(v, kept, tensors) for v, kept in zip(value, was[1:], strict=True)
        )
    if is_buffer(value):
        same = getattr(value, "dtype", None) == was[1]
        return bool(same and memoryview(value).tobytes() == was[2])
    return is_same(value, was[1].value)


def parts(function: functools.partial[Any]) -> list[Any]:
    return [function.func, function.args, function.keywords]


def is_of_a_library(cls: type) -> bool:
    """Whether the objects of a class are torch's or Python's own, such as locks and loggers; those
    that hold what a user has put in are not meant.
    """
    top = cls.__module__.split(".")[0]
    return top == "torch" or (top in sys.stdlib_module_names and top not in _HOLDERS)


def is_buffer(value: Any) -> bool:
    """Whether an object holds numbers in memory that may be written over, as those of numpy do."""
    return isinstance(value, bytearray) or (
        type(value).__module__ == "numpy" and hasattr(value, "__array_interface__")
    )


def sign_of(t: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of an input beside its numbers."""
    hooks = (t._backward_hooks, t._post_accumulate_grad_hooks)
    return (t.shape, t.dtype, t.device, t.stride(), t.requires_grad, type(t), hooks)
