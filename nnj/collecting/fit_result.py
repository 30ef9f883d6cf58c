"""What nnj.fit gives: quantities of a whole data set by the names of parameters and modules, to be
kept, saved and flattened.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError

_FORMAT = 1
_FACTS: dict[str, Any] = {  # what is saved beside the values, and of which type it is
    "samples": int,
    "scale": str,
    "total": (int, float),
    "loss": str,
    "per_sample": (tuple, list),
    "of_modules": (tuple, list),
    "deficit": (int, float),
}


class Fit(Mapping[str, dict[str, Tensor]]):
    """`fit["ggn_diag"]["0.weight"]`: quantities by name, each a dict from names of parameters, or
    of modules, to tensors.

    Parameters stand in the order of `model.named_parameters()`, and are those that require grad;
    modules stand in that of `model.named_modules()`.

    Attributes:
        samples: the number of samples.
        scale: "sum" or "mean".
        total: what the sum over samples was divided by: 1 for a sum.
        loss: the name of the loss.
        per_sample: the quantities that have the samples in axis 0, in the order of the loader.
        of_modules: the quantities that belong to modules.
        deficit: what was left out under tol=, as a part of the trace of the Hessians in the
            outputs.
    """

    def __init__(
        self,
        values: dict[str, dict[str, Tensor]],
        *,
        samples: int,
        scale: str,
        total: float = 1.0,
        loss: str = "",
        per_sample: tuple[str, ...] = (),
        of_modules: tuple[str, ...] = (),
        deficit: float = 0.0,
    ):
        self.values_of = values
        self.samples, self.scale, self.total, self.loss = samples, scale, total, loss
        self.per_sample, self.of_modules, self.deficit = (
            tuple(per_sample),
            tuple(of_modules),
            deficit,
        )

    def __getitem__(self, quantity: str) -> dict[str, Tensor]:
        return self.values_of[quantity]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)

    def vector(self, quantity: str) -> Tensor:
        """A quantity of parameters as one vector (P,), in the order of `model.parameters()`; (N, P)
        for one of each sample.

        Errors: `NNJError` for a quantity that is not in it, or belongs to modules.
        """
        if quantity not in self.values_of:
            raise NNJError(f"{quantity!r} was not fitted. Fitted: {', '.join(self)}")
        if quantity in self.of_modules:
            raise NNJError(
                f"{quantity!r} belongs to modules, and has no vector of parameters. Use "
                f"fit[{quantity!r}][name]"
            )
        axis = 1 if quantity in self.per_sample else 0
        flat = [  # also of parameters without axes, or without entries
            t.reshape(*t.shape[:axis], math.prod(t.shape[axis:])) for t in self[quantity].values()
        ]
        return torch.cat(flat, axis)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to a file, which holds tensors and plain values alone."""
        torch.save({"nnj.Fit": _FORMAT, "values": self.values_of, **self._facts()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], map_location: Any = None) -> Fit:
        """Read what `save` wrote; no code in the file is run. Errors: `NNJError` for a file of
        another kind.
        """
        cause: Exception | None = None
        try:
            found = torch.load(path, map_location=map_location, weights_only=True)
        except OSError:
            raise  # no file, or one that may not be read
        except Exception as error:  # a file of another kind: torch has many names for that
            found, cause = None, error
        if not _is_fit(found):
            raise NNJError(
                f"{os.fspath(path)} holds no nnj.Fit that this version can read. Write it with "
                "Fit.save"
            ) from cause
        return cls(found["values"], **{name: found[name] for name in _FACTS})

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    def __repr__(self) -> str:
        lines = [f"Fit({self.samples} samples, scale={self.scale!r}, loss={self.loss})"]
        width = max(map(len, self), default=0)
        for name, found in self.items():
            what = "modules" if name in self.of_modules else "parameters"
            numbers = sum(t.numel() for t in found.values())
            lines.append(f"  {name:{width}}  {numbers} numbers of {len(found)} {what}")
        return "\n".join(lines)


def _is_fit(found: Any) -> bool:
    """Whether what was read from a file is what `Fit.save` writes."""
    if not isinstance(found, dict) or found.get("nnj.Fit") != _FORMAT:
        return False
    values = found.get("values")
    return (
        isinstance(values, dict)
        and all(isinstance(kept, dict) for kept in values.values())
        and all(isinstance(t, Tensor) for kept in values.values() for t in kept.values())
        and all(isinstance(found.get(name), kind) for name, kind in _FACTS.items())
    )
