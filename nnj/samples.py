"""Which entry on which edge belongs to which sample: known from the names of autograd's nodes, or found out by a probe.

An edge is *plain* when its axis 0 holds the n samples in order, R / n rows each. Nodes listed here move samples from one axis to
another, or leave them where they are; for any other node the sweep asks the numbers themselves (`Probe`).
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.graph import Unit
from nnj.names import ALONG, ATTENTION, BATCHED, BROADCASTING, ELEMENTWISE, FLAT
from nnj.nodes import node_name, signed
from nnj.owners import Along, Owner


def _axes(saved: Any, dims: int) -> set[int]:
    """Saved axes, from 0 to dims - 1."""
    values = saved if isinstance(saved, (tuple, list)) else [saved]
    return {signed(v) % max(dims, 1) for v in values}


def carried(node: Any, child: int, out: tuple[int, ...], into: tuple[int, ...], n: int, at: Along) -> Along | None:
    """Where the samples are at operand number `child`, of shape `into`, of a node with a result of shape `out`.

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
    return Along(axis, at.run) if axis is not None and into[axis] == out[at.axis] else None


def _reshaped(out: tuple[int, ...], into: tuple[int, ...], n: int, at: Along) -> Along | None:
    """Entry number f, counted through all axes, belongs to sample (f // run) % n, and keeps its number."""
    run = math.prod(out[at.axis + 1 :]) * at.run
    for axis in reversed(range(len(into))):
        below = math.prod(into[axis + 1 :])
        if below and run and run % below == 0 and into[axis] % (n * (run // below)) == 0:
            return Along(axis, run // below)
    return None


def _operand_axis(node: Any, name: str, child: int, out: int, into: int, axis: int) -> int | None:
    """Which axis of an operand with `into` axes is an axis of the result, with `out` axes, entry by entry."""
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
    return 0 if axis == 0 and (name == "Bmm" or (BATCHED.get(name) == child and into >= 2)) else None


def _beside(node: Any, name: str, out: int, into: int, axis: int) -> int | None:
    """The same for nodes that work along axes which they have saved; those may be missing in the result, or be new there."""
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
    """Whether an operand of shape `into` is broadcast along the samples' axis, with the result not yet summed to its shape."""
    if node_name(node) not in BROADCASTING | {"Expand"} or not out or len(into) > len(out):
        return False
    aligned = (1,) * (len(out) - len(into)) + into
    fits = all(a == b or a == 1 for a, b in zip(aligned, out, strict=True))
    return fits and aligned[axis] == 1


def split(v: Tensor, owner: Owner) -> Tensor:
    """Each column once for each sample: (K, *shape) -> (K * n, *shape), with the other samples' entries zero."""
    return v if owner.explicit else owner.split(v)


class Probe:
    """Numbers the samples and lets the sweep carry the bits of the numbers backwards.

    With one random cotangent, column 2b holds the samples whose number has bit b, column 2b + 1 the others. An entry of any
    edge is non-zero in exactly the columns that spell its owner; both columns of a pair mean that samples influence
    one another. 2 ceil(log2 n) columns tell all owners of a graph at once, in any order of rows.
    """

    DRAWS = 2  # cotangents: an entry is nobody's only if it is zero for each of them

    def __init__(self, n: int):
        self.bits = max(1, math.ceil(math.log2(n)))
        self.n = n
        self.generator = torch.Generator().manual_seed(0x6E6E6A)  # one for all roots, so that they do not cancel

    def columns(self, owner: Owner, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The columns that start at one root edge, (2 * bits * DRAWS, *shape)."""
        if owner.of is None:
            of = owner.rows(shape[0], like.device)
            assert of is not None
            of = of.reshape(-1, *[1] * (len(shape) - 1))
        else:
            of = owner.of
        columns = []
        for _ in range(self.DRAWS):
            # Sizes are bounded away from zero, so that small ones do not vanish on the way.
            u = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            cotangent = ((u - 0.5).sign() * (0.5 + u)).to(device=like.device, dtype=like.dtype)
            for bit in range(self.bits):
                has = (of >> bit) & 1 == 1
                columns += [cotangent * (has & (of >= 0)), cotangent * (~has & (of >= 0))]
        return torch.stack(columns)

    def owner(self, v: Tensor, who: str) -> Owner:
        """The owners of an edge's entries from what arrived there. Errors: `NNJError` if samples influence one another.

        An entry where nothing arrived is given to the one sample of its row, if there is one: what arrives there later can only
        be what rounding leaves of zero.
        """
        there = (v != 0).unflatten(0, (self.DRAWS, self.bits, 2)).any(0)
        one, zero = there[:, 0], there[:, 1]
        if bool((one & zero).any()):
            raise Coupled.at(who)
        weights = (2 ** torch.arange(self.bits, device=v.device)).reshape(-1, *[1] * (v.dim() - 1))
        told = (one | zero).all(0)
        number = torch.where(told, (one * weights).sum(0), -1)
        if number.dim() == 0 or number.numel() == 0:
            return Owner(self.n, number)
        number = number[..., None].flatten(1)
        most = number.amax(1, keepdim=True)
        alone = ((number < 0) | (number == most)).all(1, keepdim=True)
        return Owner(self.n, torch.where(alone, most, number).reshape(told.shape))


class Coupled(NNJError):
    """Samples influence one another."""

    @classmethod
    def at(cls, who: str) -> Coupled:
        """With the sentence that says where it was seen."""
        return cls(f"samples influence one another (seen at {who}): the GGN is then not a sum over samples. If the samples are "
                   f"not in axis 0 of the model's input, say so with nnj.extend(model, batch_axis=...)")


def describe(unit: Unit, paths: dict[int, str]) -> str:
    """The name of a unit for a sentence."""
    if unit.record is not None:
        path = paths.get(id(unit.record.module), "")
        return f"layer '{path or type(unit.record.module).__name__}'"
    return f"autograd's {node_name(unit.node)}"


