"""Quantities in files: the names of their classes, and their plain attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nnj.collecting.quantity import Quantity
from nnj.errors import NNJError
from nnj.registry.manager import manager

PLACES: dict[type, str] = {Tensor: "parameters", nn.Module: "modules"}
FACTS: dict[str, type] = {"place": str, "per_sample": bool, "kind": str, "attributes": dict}


def written(quantity: Quantity) -> dict[str, Any]:
    """What a file keeps of a quantity: all but what is no plain value, such as a generator."""
    plain = {name: value for name, value in vars(quantity).items() if _is_plain(value)}
    return {
        "place": PLACES.get(quantity.place, "context"),
        "per_sample": quantity.per_sample,
        "kind": _kind(type(quantity)),
        "attributes": plain,
    }


def read(name: str, kept: dict[str, Any]) -> Quantity:
    """The quantity that was written. Errors: `NNJError` if its class is not there."""
    for cls in _classes():
        if _kind(cls) == kept["kind"]:
            quantity = cls.__new__(cls)
            vars(quantity).update(kept["attributes"])
            return quantity
    raise NNJError(
        f"the quantity {name!r} is one of the class {kept['kind']}, which is neither installed nor "
        "imported. Its values can be read; import its module for more"
    )


def is_written(kept: Any) -> bool:
    """Whether something from a file is what `written` gives."""
    return isinstance(kept, dict) and all(
        isinstance(kept.get(fact), kind) for fact, kind in FACTS.items()
    )


def _kind(cls: type[Quantity]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _classes() -> Iterator[type[Quantity]]:
    list(manager().entries("quantity"))  # imports those that are installed
    left: list[type[Quantity]] = [Quantity]
    while left:
        cls = left.pop()
        yield cls
        left += cls.__subclasses__()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
