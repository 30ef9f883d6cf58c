"""What predictions are asked of: one input, or a loader of batches, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nnj.collecting.batches import length, moved, read, with_bar
from nnj.errors import NNJError

Forwarding = Callable[[nn.Module, Any], Any]


class Reader(NamedTuple):
    """How a batch is read: as `nnj.fit` takes these.

    Attributes:
        axis: of the samples, in what the model is given.
    """

    device: torch.device
    forward: Forwarding | None
    target: str | Callable[[Any], Any] | None
    axis: int

    def chunks(self, x: Any, batch_size: int | None, progress: bool) -> Iterator[Any]:
        """What the model is given, chunk by chunk.

        Args:
            x: a tensor, a tuple of arguments or a dict of named ones: one input, cut to
                `batch_size`. Anything else that can be read is a loader, as that of `nnj.fit`: its
                targets, where there are any, are left out.
        """
        if isinstance(x, (Tensor, tuple, Mapping)):
            given = moved(x, self.device)
            yield from self._cut(given, batch_size)
        elif batch_size is not None:
            raise NNJError(
                "batch_size= cuts one input, and x is a loader, which has batches. Leave it out"
            )
        elif isinstance(x, Iterable):
            for batch in with_bar(x, progress, "nnj.laplace"):
                yield self._input(moved(batch, self.device))
        else:
            raise NNJError(
                f"x is {type(x).__name__}, expected a tensor, a tuple, a dict, or a loader of "
                "batches"
            )

    def labelled(self, loader: Iterable[Any], progress: bool) -> Iterator[tuple[Any, Any]]:
        """What the model is given and the targets, batch by batch."""
        for batch in with_bar(loader, progress, "nnj.laplace"):
            yield read(moved(batch, self.device), self.forward, self.target)

    def _cut(self, given: Any, size: int | None) -> Iterator[Any]:
        if size is None:
            yield given
            return
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise NNJError(f"batch_size={size!r}, expected a whole number of samples above 0")
        n, axis = length(given, self.axis), self.axis
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        if any(t.dim() <= axis or t.shape[axis] != n for t in tensors):
            raise NNJError(
                f"batch_size={size} cuts every tensor of x along its axis {axis}, of which some "
                f"have not {n} samples there. Give chunks as a list of batches instead"
            )
        for start in range(0, n, size):
            count = min(size, n - start)
            cut = lambda t, at=start, many=count: (
                t.narrow(axis, at, many) if isinstance(t, Tensor) else t
            )
            yield tree_map(cut, given)

    def _input(self, batch: Any) -> Any:
        """What of a batch goes into the model."""
        if isinstance(batch, Tensor) or self.forward is not None or callable(self.target):
            return batch
        if isinstance(batch, Mapping):
            key = "labels" if self.target is None else self.target
            return {k: v for k, v in batch.items() if k != key}
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0]
        return tuple(read(batch, None, self.target)[0])
