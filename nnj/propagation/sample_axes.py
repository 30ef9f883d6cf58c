"""Which entry on which edge belongs to which sample: known from the names of autograd's nodes, or
found out by a probe.

An edge is *plain* when its axis 0 holds the n samples in order, R / n rows each. Nodes listed here
move samples from one axis to another, or leave them where they are; for any other node the sweep
asks the numbers themselves (`Probe`)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from nnj.graph.nodes import node_name, signed
from nnj.graph.op_names import ALONG, ATTENTION, BATCHED, BROADCASTING, ELEMENTWISE, FLAT
from nnj.jacobians.sample_index import SampleAxis, SampleIndex


def _axes(saved: Any, dims: int) -> set[int]:
    """Saved axes, from 0 to dims - 1."""
    values = saved if isinstance(saved, (tuple, list)) else [saved]
    return {signed(v) % max(dims, 1) for v in values}


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
    axis = _operand_axis(node, name, child, len(out), len(into), at.axis)
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


def _operand_axis(node: Any, name: str, child: int, out: int, into: int, axis: int) -> int | None:
    """Which axis of an operand with `into` axes is an axis of the result, with `out` axes, entry by
    entry.
    """
    if name in ELEMENTWISE or name == "Expand":
        return axis if into == out else None
    if name in ALONG or name == "Stack":
        return _beside(node, name, out, into, axis)
    if name in ("Transpose", "Swapaxes"):
        pair = [signed(d) % into for d in (node._saved_dim0, node._saved_dim1)]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if name == "Permute":
        (source,) = _axes(node._saved_dims[axis], into)
        return source
    if name == "T":
        return 1 - axis if into == 2 else None
    if name == "ConstantPadNd":
        return axis if 2 * (into - axis) > len(node._saved_pad) else None
    if name == "NativeLayerNorm":
        return axis if child == 0 and axis < into - len(node._saved_normalized_shape) else None
    if name in ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"):
        return 0 if child == axis == 0 and not node._saved_training else None
    if name.startswith(ATTENTION):
        return axis if child < 3 and into == 4 and axis < 2 else None
    return (
        0 if axis == 0 and (name == "Bmm" or (BATCHED.get(name) == child and into >= 2)) else None
    )


def _beside(node: Any, name: str, out: int, into: int, axis: int) -> int | None:
    """The same for nodes that work along axes which they have saved; those may be missing in the
    result, or be new there.
    """
    saved = node._saved_dims if name == "Flip" else getattr(node, "_saved_dim", None)
    if saved is None or saved == ():
        return None
    along = _axes(saved, max(out, into))
    if out == into:
        return None if axis in along else axis
    if name == "Stack":
        return None if axis in along else axis - sum(new < axis for new in along)
    left = [i for i in range(into) if i not in along]
    return left[axis] if len(left) == out else None


def broadcast_operand(node: Any, out: tuple[int, ...], into: tuple[int, ...], axis: int) -> bool:
    """Whether an operand of shape `into` is broadcast along the samples' axis, with the result not
    yet summed to its shape.
    """
    if node_name(node) not in BROADCASTING | {"Expand"} or not out or len(into) > len(out):
        return False
    aligned = (1,) * (len(out) - len(into)) + into
    fits = all(a == b or a == 1 for a, b in zip(aligned, out, strict=True))
    return fits and aligned[axis] == 1


def split(v: Tensor, sample_index: SampleIndex) -> Tensor:
    """Each column once for each sample: (K, *shape) -> (K * n, *shape), with the other samples'
    entries zero.
    """
    return v if sample_index.by_column else sample_index.split(v)
