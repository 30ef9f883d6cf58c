"""i, f, g, o = W x + U h + b + d,  c = f c + i g,  h = o tanh(c): oneDNN's LSTM as many nodes.

On CPUs, in float32, such a layer is one node of autograd, which torch runs under vmap once for each
column of each sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnj.graph.nodes import leaf_of, own_task, saved
from nnj.recording.records import MARK, Edge, edge_of, write

# the operands, in the order of next_functions
NAMES = ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_")
LSTM = 2  # the mode of a node that is an LSTM
# With so many samples the many nodes are faster: they cost some calls for each time step, the one
# node costs (samples x columns) calls.
ROWS = 16


def expand(node: Any) -> tuple[list[Edge | None], dict[Any, Edge]] | None:
    """The layer computed anew: the edges of its outputs y, h and c, and for each leaf that stands
    for a tensor of the model the edge of that tensor.

    None where the node is something else, has few rows, or gave another y: then the node itself is
    used."""
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
    """The tensor of an operand if it is a leaf or needs no gradient, else a leaf in its place."""
    if edge[0] is None:
        return value
    own = leaf_of(edge[0])
    if own is not None:
        return own
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
    """(T, N, I) -> y of (T, N, H), and the last h and c."""
    steps = list(F.linear(x, w, b).unbind(0))
    ys = []
    for step in reversed(steps) if reverse else steps:
        i, f, g, o = (step + F.linear(h, u, d)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        ys.append(h)
    return torch.stack(ys[::-1] if reverse else ys), h, c
