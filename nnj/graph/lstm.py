"""A recurrent layer that is one node of autograd's (oneDNN's LSTM, in float32 on CPUs) as the many
nodes that it stands for.

Called with columns, such a node would take each column of each sample by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnj.graph.nodes import own_task, saved
from nnj.recording.records import MARK, Edge, edge_of, write

# the operands, in the order of next_functions
NAMES = ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_")
LSTM = 2
# from which on many nodes are faster: one node costs (samples x columns) calls, many cost some for
# each time step
ROWS = 16


def expand(node: Any) -> tuple[list[Edge | None], dict[Any, Edge]] | None:
    """The edges of the outputs y, h, c, computed anew, and for leaves that stand for other tensors
    the edges of these.

    None where the node is something else, has few rows, or gives another y: then it is taken as it
    is."""
    rows = node._input_metadata[1].shape[0]
    if node._saved_mode != LSTM or node._saved_batch_sizes or rows < ROWS:
        return None
    values, y = own_task(
        lambda: ([saved(node, name).detach() for name in NAMES], saved(node, "result0"))
    )
    aliases: dict[Any, Edge] = {}
    operands = [
        _operand(value, edge, aliases)
        for value, edge in zip(values, node.next_functions, strict=True)
    ]
    if not node._saved_has_biases:
        operands[3] = operands[4] = None
    with torch.enable_grad():
        x, w, u, b, d, h, c = operands
        outputs = _lstm(x, w, u, b, d, h, c, node._saved_reverse)
    eps = torch.finfo(y.dtype).eps ** 0.5
    if outputs[0].shape != y.shape or not torch.allclose(
        outputs[0].detach(), y, rtol=eps, atol=eps
    ):
        return None
    edges = [edge_of(t) for t in outputs]
    for number, edge in enumerate(edges):
        mark = node.metadata.get((MARK, number))
        if mark is not None and edge is not None:
            write(edge[0], (MARK, edge[1]), mark)
    return edges, aliases


def _operand(value: Tensor, edge: Edge, aliases: dict[Any, Edge]) -> Any:
    """A tensor for an operand of a node: the leaf that it is, or a leaf in its place."""
    if edge[0] is None:
        return value
    if hasattr(edge[0], "variable"):
        return edge[0].variable
    leaf = value.requires_grad_()
    aliases[torch.autograd.graph.get_gradient_edge(leaf).node] = edge
    return leaf


def _lstm(
    x: Tensor,
    w: Tensor,
    u: Tensor,
    b: Tensor | None,
    d: Tensor | None,
    h: Tensor,
    c: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, I) -> y of (T, N, H), and the last h and c: i, f, g, o = W x + U h + b + d;  c = f
    c + i g;  h = o tanh(c).
    """
    steps = list(F.linear(x, w, b).unbind(0))
    ys = []
    for step in reversed(steps) if reverse else steps:
        i, f, g, o = (step + F.linear(h, u, d)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        ys.append(h)
    return torch.stack(ys[::-1] if reverse else ys), h, c
