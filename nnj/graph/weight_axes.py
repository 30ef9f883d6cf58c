"""A weight as einsum hands it to a product of matrices: the axes of a parameter in another order,
some of them taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnj.graph.nodes import leaf_of, node_name, signed
from nnj.graph.op_names import FLAT
from nnj.recording.records import Edge

SEEN = FLAT | {"Clone", "Permute", "T"}
Axes = list[list[int]]  # of each axis of a view those of the parameter that it is made of, in order


def weight_axes(edge: Edge, wanted: Callable[[Tensor], bool]) -> tuple[nn.Parameter, Axes] | None:
    """The wanted parameter to which an edge leads through permutations of its axes, and views that
    take some of them together, alone; and of which axes the tensor on the edge is made.
    """
    views = []
    node: Any = edge[0]
    while node is not None and leaf_of(node) is None:
        if len(node.next_functions) != 1 or node_name(node) not in SEEN:
            return None
        views.append(node)
        node = node.next_functions[0][0]
    p: Any = None if node is None else leaf_of(node)
    if p is None or not wanted(p) or p.dim() < 2 or p.layout != torch.strided:
        return None
    axes: Axes = [[i] for i in range(p.dim())]
    for view in reversed(views):
        seen = _seen(view, axes, p.shape)
        if seen is None:
            return None
        axes = seen
    return p, axes


def _seen(view: Any, axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes behind one more view; None where it splits one."""
    name = node_name(view)
    if name == "T":
        return axes[::-1]
    if name == "Permute":
        return [axes[signed(d) % len(axes)] for d in view._saved_dims]
    left = [i for axis in axes for i in axis if shape[i] > 1]
    found: Axes = []
    for size in view._input_metadata[0].shape:
        group: list[int] = []
        while size > 1 and left and size % shape[left[0]] == 0:
            size //= shape[left[0]]
            group.append(left.pop(0))
        if size != 1:
            return None
        found.append(group)
    return None if left else found
