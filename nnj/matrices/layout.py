"""The vector v of a matrix: named parameters, each flattened, one behind the other."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Container, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from nnj.errors import NNJError

# A number, or numbers by the names of modules (or of parameters).
Damping: TypeAlias = "float | Mapping[str, float]"


class Layout:
    """Where each parameter stands in v of (P,).

    Args:
        shapes: of each parameter by its name, in the order of `model.named_parameters()`.

    Attributes:
        size: P.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        starts = itertools.accumulate(self.sizes.values(), initial=0)
        self.starts = dict(zip(self.shapes, starts, strict=False))
        self.size = sum(self.sizes.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and list(self.shapes.items()) == list(other.shapes.items())

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """v of (P, k) by name: (*shape, k)."""
        parts = v.split(list(self.sizes.values()))
        items = self.shapes.items()
        return {n: t.reshape(*s, *v.shape[1:]) for (n, s), t in zip(items, parts, strict=True)}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(P, k) from (*shape, k) by name."""
        flat = []
        for name, shape in self.shapes.items():
            t = parts[name]
            flat.append(t.reshape(self.sizes[name], *t.shape[len(shape) :]))
        return torch.cat(flat)

    def entries(self, names: Container[str]) -> Tensor:
        """Where the entries of some parameters are in v."""
        every = [torch.empty(0, dtype=torch.long)]
        for name, start in self.starts.items():
            if name in names:
                every.append(torch.arange(start, start + self.sizes[name]))
        return torch.cat(every)

    def below(self, path: str) -> list[str]:
        """The parameters of a module and of all modules within it, by its name ("" is the model).

        Errors: `NNJError` for a name that there is not.
        """
        found = [name for name in self.shapes if _covers(path, name)]
        if not found:
            known = sorted({part for name in self.shapes for part in _prefixes(name)})
            close = difflib.get_close_matches(path, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise NNJError(
                f"{path!r} is the name of no module that has parameters in this matrix{hint}. "
                f"Its parameters: {_listed(list(self.shapes))}"
            )
        return found

    def damping(self, damping: Damping) -> dict[str, float]:
        """The damping of each parameter, of which the most particular name counts.

        Errors: `NNJError` for what is negative, no number, or names too few or other modules.
        """
        if not isinstance(damping, Mapping):
            return dict.fromkeys(self.shapes, _number(damping))
        found: dict[str, float] = {}
        for path in sorted(damping, key=len):  # longer names are more particular
            found.update(dict.fromkeys(self.below(path), _number(damping[path])))
        missing = [name for name in self.shapes if name not in found]
        if missing:
            raise NNJError(
                f"damping={{...}} says nothing of {_listed(missing)}. Give a number for every "
                "module; 0 is one, and '' stands for all that no other name covers"
            )
        return found

    def spread(self, values: Mapping[str, float], like: Tensor) -> Tensor:
        """A number for each parameter as a vector (P,)."""
        parts = [like.new_full((size,), values[name]) for name, size in self.sizes.items()]
        return torch.cat([like.new_empty(0), *parts])


def uniform(values: Mapping[str, float]) -> float | None:
    """The one number that all parameters have; None where they differ. 0 of no parameters."""
    found = set(values.values())
    return None if len(found) > 1 else found.pop() if found else 0.0


def _covers(path: str, name: str) -> bool:
    return path == "" or name == path or name.startswith(path + ".")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _number(value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise NNJError(
            f"damping={value!r}: it is a finite number that is not negative, or one for the name "
            "of each module"
        )
    return float(value)  # type: ignore[arg-type]
