"""The row (or block of H) of each entry of a node's operand, given those of its result, by the name
of the node.

An index is a tensor of whole numbers that broadcasts to the shape that it describes: along axes of
length one nothing changes. So it is as small as what it says, though a tensor may have an entry for
each word of a vocabulary. A negative number is that of an entry that belongs to nobody.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nnj.graph.nodes import node_name, signed
from nnj.graph.op_names import ELEMENTWISE, FLAT
from nnj.jacobians.sample_index import SampleAxis
from nnj.propagation.sample_axes import carried

Shape = tuple[int, ...]

# Nodes of one operand that only choose and arrange its entries.
ARRANGING = FLAT | frozenset("Alias Clone Permute Select Slice Swapaxes T Transpose".split())


def behind(node: Any, i: int, of: Tensor, out: Shape, into: Shape) -> Tensor | None:
    """The index of operand number `i`, of shape `into`, of a node that keeps rows apart and whose
    result, of shape `out`, has the index `of`; None if its name does not tell.
    """
    name = node_name(node)
    if name in ELEMENTWISE:
        return of if out == into else None
    if name in FLAT:
        return reshaped(of, out, into)
    order: list[int | None] = [None] * len(into)  # the axis of the result that each axis is
    for axis in range(len(out)):
        at = carried(node, i, out, into, out[axis], SampleAxis(axis, 1))
        if at is not None:
            order[at.axis] = axis
    left = [axis for axis in range(len(out)) if axis not in order]
    if any(of.shape[axis] > 1 for axis in left):
        return None
    shape = [1 if axis is None else of.shape[axis] for axis in order]
    kept = [axis for axis in order if axis is not None]
    return of.permute(*kept, *left).reshape(shape)


def arranged(node: Any, of: Tensor, out: Shape, into: Shape) -> Tensor | None:
    """The index of the only operand of a node of ARRANGING, of which it may choose a part."""
    name = node_name(node)
    if name in ("Select", "Slice"):
        axis = signed(node._saved_dim) % len(into)
        if name == "Select":
            part, of = [signed(node._saved_index) % into[axis]], of.unsqueeze(axis)
        else:
            part = list(range(into[axis]))[_slice(node)]
            if len(part) != out[axis]:
                return None
        if of.shape[axis] == 1 and len(part) == into[axis]:
            return of
        shape = [*of.shape[:axis], into[axis], *of.shape[axis + 1 :]]
        chosen = torch.tensor(part, device=of.device)
        return of.new_full(shape, -1).index_copy(axis, chosen, _along(of, axis, len(part)))
    return behind(node, 0, of, out, into)


def _slice(node: Any) -> slice:
    return slice(signed(node._saved_start), signed(node._saved_end), signed(node._saved_step))


def _along(of: Tensor, axis: int, size: int) -> Tensor:
    shape = list(of.shape)
    shape[axis] = size
    return of.expand(shape)


def reshaped(of: Tensor, out: Shape, into: Shape) -> Tensor:
    """The index of a tensor of shape `into` whose entries, in their flat order, are those of one of
    shape `out`: axis by axis where these agree, or several that are one axis of the other.
    """
    spread, shape = list[int](), list[int]()
    for a, b, c, d in _groups(out, into):
        varies = any(size > 1 for size in of.shape[a:b])
        spread += out[a:b] if varies else of.shape[a:b]
        shape += into[c:d] if varies else [1] * (d - c)
    return of.expand(spread).reshape(shape)


def _groups(out: Shape, into: Shape) -> list[tuple[int, int, int, int]]:
    """The shortest ranges of axes of the one and the other that have as many entries."""
    first, second = _cuts(out), _cuts(into)
    both = sorted(first.keys() & second.keys())
    return [(first[p], first[q], second[p], second[q]) for p, q in pairwise(both)]


def _cuts(shape: Shape) -> dict[int, int]:
    """How many entries there are up to an axis, and which axis that is: of axes of length one the
    last; the first cut is before all axes.
    """
    found, total = {0: 0}, 1
    for axis, size in enumerate(shape):
        total *= size
        found[total] = axis + 1
    if total == 1:
        found = {0: 0, 1: len(shape)}
    return found


def leading(of: Tensor) -> int:
    """How many axes tell the row of an entry: all others have length one."""
    return max([1, *(axis + 1 for axis, size in enumerate(of.shape) if size > 1)])


def view_of(of: Tensor, base: Tensor) -> tuple[object, ...] | None:
    """How a tensor views the storage of another one: two that do so alike have the same numbers,
    and nothing need be asked of them. None if it does not.
    """
    if of.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
        return None
    strides = [s for size, s in zip(of.shape, of.stride(), strict=True) if size > 1]
    return (of.storage_offset(), tuple(of.shape), *strides)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two indices are the same, by what they are views of where that tells."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    seen = view_of(one, other)
    return (seen is not None and seen == view_of(other, other)) or torch.equal(one, other)


def in_order(of: Tensor, base: Tensor) -> bool:
    """Whether an index has the numbers of base, 0, 1, ... in order, one after the other."""
    if of.numel() != base.numel():
        return False
    if view_of(of, base) is not None:  # of as many entries: another order, if it is another view
        return of.is_contiguous() and of.storage_offset() == base.storage_offset()
    return torch.equal(of.flatten(), base.flatten())
