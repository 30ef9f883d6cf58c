"""Along which axis the samples are at an operand of a node, given where they are in its result: as
far as the name of the node tells.

Nodes listed here move samples from one axis to another, or leave them where they are; of any other
node the sweep asks the numbers themselves (`Probe`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nnj.graph.nodes import node_name, signed
from nnj.graph.op_names import ALONG, ATTENTION, BATCHED, BROADCASTING, ELEMENTWISE, FLAT
from nnj.jacobians.sample_index import SampleAxis


def carried(
    node: Any, child: int, out: tuple[int, ...], into: tuple[int, ...], n: int, at: SampleAxis
) -> SampleAxis | None:
    """Where the samples are at operand number `child`, of shape `into`, of a node with a result of
    shape `out`.

    Args:
        at: where they are in the result.

    Returns: None if the name of the node does not tell.
    """
    if not into or not out:
        return None
    name = node_name(node)
    if name in FLAT:
        return _reshaped(out, into, n, at)
    rule = _fused_attention if name.startswith(ATTENTION) else _RULES.get(name)
    axis = None if rule is None else rule(node, child, len(out), len(into), at.axis)
    return SampleAxis(axis, at.run) if axis is not None and into[axis] == out[at.axis] else None


def _reshaped(
    out: tuple[int, ...], into: tuple[int, ...], n: int, at: SampleAxis
) -> SampleAxis | None:
    """Entry number f, counted through all axes, belongs to sample (f // run) % n, and keeps its
    number.
    """
    run = math.prod(out[at.axis + 1 :]) * at.run
    for axis in reversed(range(len(into))):
        below = math.prod(into[axis + 1 :])
        if below and run and run % below == 0 and into[axis] % (n * (run // below)) == 0:
            return SampleAxis(axis, run // below)
    return None


def broadcast_operand(node: Any, out: tuple[int, ...], into: tuple[int, ...], axis: int) -> bool:
    """Whether an operand of shape `into` is broadcast along the samples' axis, with the result not
    yet summed to its shape.
    """
    if node_name(node) not in BROADCASTING | {"Expand"} or not out or len(into) > len(out):
        return False
    aligned = (1,) * (len(out) - len(into)) + into
    fits = all(a == b or a == 1 for a, b in zip(aligned, out, strict=True))
    return fits and aligned[axis] == 1


# A rule for nodes of one name: which axis of operand number `child`, which has `into` axes, is axis
# `axis` of the result, which has `out` axes, entry by entry; None where there is no such axis.
_Rule = Callable[[Any, int, int, int, int], int | None]


def _the_same(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return axis if into == out else None


def _unless_worked_along(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    """Nodes that work along axes which they have saved; those may be missing in the result."""
    along = _saved_axes(node, "_saved_dim", max(out, into))
    if along is None:
        return None
    if out == into:
        return None if axis in along else axis
    left = [i for i in range(into) if i not in along]
    return left[axis] if len(left) == out else None


def _slice(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    """Also along the axis that is sliced, where all of it is taken: else `carried` sees that sizes
    differ.
    """
    return axis


def _flip(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    along = _saved_axes(node, "_saved_dims", into)
    return None if along is None or axis in along else axis


def _stack(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    """The saved axis is new in the result."""
    along = _saved_axes(node, "_saved_dim", out)
    return None if along is None or axis in along else axis - sum(new < axis for new in along)


def _transpose(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    pair = [signed(d) % into for d in (node._saved_dim0, node._saved_dim1)]
    return pair[1 - pair.index(axis)] if axis in pair else axis


def _permute(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return signed(node._saved_dims[axis]) % into


def _matrix_transpose(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return 1 - axis if into == 2 else None


def _pad(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    """Two numbers for each padded axis, from the last one on."""
    return axis if 2 * (into - axis) > len(node._saved_pad) else None


def _layer_norm(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return axis if child == 0 and axis < into - len(node._saved_normalized_shape) else None


def _batch_norm(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return 0 if child == axis == 0 and not node._saved_training else None


def _fused_attention(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    """Q, K and V of (N, H, T, d): samples and heads have nothing to do with one another."""
    return axis if child < 3 and into == 4 and axis < 2 else None


def _batched_product(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return 0 if axis == 0 else None


def _batch_first(node: Any, child: int, out: int, into: int, axis: int) -> int | None:
    return 0 if axis == 0 and child == BATCHED[node_name(node)] and into >= 2 else None


def _saved_axes(node: Any, name: str, dims: int) -> set[int] | None:
    """The axes that a node has saved, from 0 to dims - 1; None if it has saved none."""
    saved = getattr(node, name, None)
    if saved is None or saved == ():
        return None
    values = saved if isinstance(saved, (tuple, list)) else [saved]
    return {signed(v) % max(dims, 1) for v in values}


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(BATCHED, _batch_first),
    **dict.fromkeys(ALONG, _unless_worked_along),
    **dict.fromkeys(ELEMENTWISE | {"Expand"}, _the_same),
    **dict.fromkeys(("Transpose", "Swapaxes"), _transpose),
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"), _batch_norm),
    "Flip": _flip,
    "Slice": _slice,
    "Stack": _stack,
    "Permute": _permute,
    "T": _matrix_transpose,
    "ConstantPadNd": _pad,
    "NativeLayerNorm": _layer_norm,
    "Bmm": _batched_product,
}
