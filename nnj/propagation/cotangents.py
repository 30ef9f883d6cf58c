"""What has arrived at the edges of a graph and not yet gone on."""

from __future__ import annotations

from torch import Tensor

from nnj.recording.records import Edge


class Cotangents(dict[Edge, Tensor]):
    """Cotangents by edge, (K, *shape). Sums are tensors of our own, to which more is added in
    place.
    """

    def __init__(self, *args: dict[Edge, Tensor]):
        super().__init__(*args)
        self._own: set[Edge] = set()

    def add(self, edge: Edge, v: Tensor) -> None:
        """One more share."""
        there = self.get(edge)
        if there is None:
            self[edge] = v
        elif edge in self._own:
            there += v
        else:
            self[edge] = there + v
            self._own.add(edge)

    def add_part(
        self, edge: Edge, shape: tuple[int, ...], axis: int, index: int, v: Tensor
    ) -> None:
        """A share that is zero but at one index of an axis of `shape`."""
        there = self.get(edge)
        if there is None or edge not in self._own:
            self[edge] = v.new_zeros(len(v), *shape) if there is None else there.clone()
            self._own.add(edge)
        self[edge].select(axis + 1, index).add_(v)

    def take(self, edge: Edge) -> Tensor:
        """What arrived, which goes on."""
        self._own.discard(edge)
        return self.pop(edge)
