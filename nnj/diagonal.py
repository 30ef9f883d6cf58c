"""(J o J)^T m: a metric of which only the diagonal is kept between layers, in one pass whatever the size of the output.

This is the approximation that the original nnj calls diag_backprop: (J2 J1)o2 is not J2o2 J1o2, so what is neglected is how the
inputs of a layer vary together, and how the uses of one tensor do.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnj.attention import attention_squares, fused_attention
from nnj.errors import NNJError
from nnj.forward import Forward
from nnj.graph import Unit, call_node, edge_dtype, edge_shape, own_task
from nnj.hooks import Edge
from nnj.linearisation import Linearisation
from nnj.operators import Jacobian
from nnj.samples import ELEMENTWISE, describe
from nnj.sweep import Sweep

# Jacobians of zeros and ones are their own squares.
_COPIES = set("""View UnsafeView ReshapeAlias Permute Transpose T Swapaxes Unsqueeze Squeeze Select Slice Split SplitWithSizes
    UnsafeSplit Unbind Cat Stack ConstantPadNd Expand Index IndexSelect Gather Flip Roll Repeat AsStrided CopySlices Clone Alias
    MaxPool2DWithIndices Max Min UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D Embedding PixelShuffle
    PixelUnshuffle""".split())
# Each operand's entry feeds one entry of the result: the square is the factor that it is sent back with, twice.
_SINGLE = ELEMENTWISE | {"Sum", "Mean"}


def squared_backward(unit: Unit, m: list[Tensor | None], k: int, paths: dict[int, str]) -> list[Tensor | None]:
    """(J o J)^T m of a raw node. Errors: `NNJError` with the name of an operation whose squares nnj does not know."""
    node, name = unit.node, unit.name
    if name in _COPIES:
        return call_node(node, m, k)
    if name in _SINGLE:
        ones: list[Tensor | None] = [None if t is None else torch.ones_like(t[:1]) for t in m]
        factors, back = call_node(node, ones, 1), call_node(node, m, k)
        return [None if c is None or b is None else b * c.detach() for b, c in zip(back, factors, strict=True)]
    (first, *_) = m
    assert first is not None
    if name == "Mm":
        return _products(node, first, node._saved_self, node._saved_mat2)
    if name == "Addmm":
        ones = [torch.ones_like(first[:1])]
        bias = call_node(node, ones, 1)[0]
        own = first if bias is None else first * _constant(bias) ** 2
        left, right = _products(node, first, node._saved_mat1, node._saved_mat2)
        return [own, left, right]
    if name == "Bmm":
        return _products(node, first, node._saved_self, node._saved_mat2)
    if name == "Softmax":
        p = node._saved_result
        axis = _axis(node._saved_dim, p.dim())
        inner = (p.square() * first).sum(axis - p.dim(), keepdim=True)
        return [p.square() * (inner + (1 - 2 * p) * first)]
    if name == "LogSoftmax":
        p = node._saved_result.exp()
        axis = _axis(node._saved_dim, p.dim())
        return [(1 - 2 * p) * first + p.square() * first.sum(axis - p.dim(), keepdim=True)]
    if fused_attention(node):
        return attention_squares(node, first)
    raise NNJError(f"diag_backprop cannot go on at {describe(unit, paths)}: no rule says what the squares of its Jacobian are. "
                   f"Put the operation into a module with a rule, or leave out diag_backprop")


def _constant(t: Tensor) -> Tensor:
    return t.reshape(-1)[0]


def _axis(saved: int, dims: int) -> int:
    return (saved - 2**64 if saved >= 2**63 else saved) % dims


def _products(node: Any, m: Tensor, a: Tensor | None, b: Tensor | None) -> list[Tensor | None]:
    """y = a b: dy_ij = sum_k da_ik b_kj + a_ik db_kj."""
    return [None if b is None else m @ b.square().mT, None if a is None else a.square().mT @ m]


class DiagonalSweep(Sweep):
    """The sweep with J o J in the place of J: what walks is the diagonal of a metric, (1, N, *shape)."""

    def operator(self, unit: Unit, slot: str) -> Jacobian:
        cache = unit.__dict__.setdefault("squares", {})
        if slot not in cache:
            cache[slot] = unit.slots[slot].square()
        return cache[slot]

    def backward(self, unit: Unit, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        if self._probing:
            return call_node(unit.node, args, k)
        return squared_backward(unit, args, k, self.graph.paths)

    _probing = False

    def _find_owners(self, roots: dict[Edge, Any]) -> None:
        self._probing = True
        try:
            super()._find_owners(roots)
        finally:
            self._probing = False


class _Walk:
    """One backward pass of a metric on the output."""

    def __init__(self, at: Linearisation, to_diag: bool):
        assert isinstance(at.sweep, DiagonalSweep)
        self.at, self.sweep, self.to_diag = at, at.sweep, to_diag
        self.diagonals: dict[int, Tensor] = {}
        self.blocks: dict[int, Tensor] = {}

    def add(self, p: Tensor, value: Tensor) -> None:
        there = self.diagonals.get(id(p))
        self.diagonals[id(p)] = value if there is None else there + value

    def run(self, m: Tensor | None) -> None:
        own_task(lambda: self._run(m))

    def _run(self, m: Tensor | None) -> None:
        at, root = self.at, self.at.root
        assert root is not None
        values: dict[Edge, Tensor] = {}
        units = list(self.sweep.graph.units)
        if m is None or m.dim() == 2:
            start = at.y.new_ones(at.n, at.out) if m is None else m
            values[root] = start.reshape(1, at.n, *at.outputs).to(edge_dtype(root))
        else:
            units = self._head(m, units, root, values)
        for unit in units:
            if not self.to_diag and unit.record is not None and unit.params:
                (edge,) = unit.into
                if edge in values:
                    self._exact_block(unit, values[edge], None)
            if not self.to_diag and unit.leaf is not None and any(e in values for e in unit.into):
                raise NNJError("diag_backprop keeps only the diagonal at a parameter that no layer with a rule owns. "
                               "Use to_diag=True")
            self.sweep._step(unit, values, 1, lambda p, f: self.add(p, f.dense()[0]))

    def _head(self, m: Tensor, units: list[Unit], root: Edge, values: dict[Edge, Tensor]) -> list[Unit]:
        """A full metric enters exactly: rows of the identity and of M walk as columns down to the last layer."""
        at, edge = self.at, root
        left = at.basis()
        right = m.transpose(0, 1).reshape(at.out, at.n, *at.outputs)
        for i, unit in enumerate(units):
            outs = [(i, e) for i, e in enumerate(unit.out) if e is not None]
            if unit.record is not None:
                self._exact(unit, left, right, values)
                return units[i + 1 :]
            plain = len(outs) == 1 and len(unit.into) == 1 and unit not in self.sweep.explicit
            if not plain or (unit, outs[0][0]) in self.sweep.reduced | self.sweep.split:
                values[edge] = (left * right).sum(0, keepdim=True)
                return units[i:]
            number, after = outs[0]
            args: list[Tensor | None] = [None] * len(unit.node._input_metadata)
            args[edge[1]] = torch.cat([left, right])
            back = call_node(unit.node, args, 2 * at.out)[number]
            if back is None or tuple(back.shape[1:]) != edge_shape(after):
                values[edge] = (left * right).sum(0, keepdim=True)
                return units[i:]
            left, right = back[: at.out], back[at.out :]
            edge = after
        return []

    def _exact(self, unit: Unit, left: Tensor, right: Tensor, values: dict[Edge, Tensor]) -> None:
        """The last layer: diag(J^T M J), or the block of its parameters, with all of M."""
        (edge,) = unit.into
        if unit.params and not self.to_diag:
            self._exact_block(unit, left, right)
        for slot, p in unit.params if self.to_diag else []:
            owner = self.sweep._owner(edge, unit)
            a, b = (unit.slots[slot].pullback(t, owner).dense() for t in (left, right))
            self.add(p, (a * b).sum(0))
        out = unit.out[0]
        if out is not None:
            j = unit.slots["input"]
            values[out] = (j.vjp(left) * j.vjp(right)).sum(0, keepdim=True)

    def _exact_block(self, unit: Unit, left: Tensor, right: Tensor | None) -> None:
        """J^T M J over a layer's own parameters, with M diagonal (left) or the pair of the identity's and M's rows."""
        assert unit.record is not None
        (edge,) = unit.into
        owner = self.sweep._owner(edge, unit)
        if right is None:
            shape = left.shape[1:]
            d = math.prod(shape[1:])
            eye = torch.eye(d, dtype=left.dtype, device=left.device).reshape(d, 1, *shape[1:]).expand(d, *shape)
            left, right = eye, eye * left
        if owner.of is not None or (owner.explicit and self.at.n > 1) or left.shape[1] != self.at.n:
            raise NNJError(f"diag_backprop gives blocks only where a layer has one row for each sample, which "
                           f"{describe(unit, self.sweep.graph.paths)} has not. Use to_diag=True")
        order = {id(p): i for i, p in enumerate(unit.record.module.parameters(recurse=False))}
        params = sorted(unit.params, key=lambda pair: order.get(id(pair[1]), 0))
        a, b = (torch.cat([unit.slots[s].vjp(t).flatten(2) for s, _ in params], -1).transpose(0, 1) for t in (left, right))
        block, key = a.mT @ b, id(unit.record.module)
        self.blocks[key] = self.blocks[key] + block if key in self.blocks else block


def _zeros(at: Linearisation, size: int) -> Tensor:
    return at.y.new_zeros(at.n, size)


def backward(at: Linearisation, m: Tensor | None, to_diag: bool) -> Any:
    """diag(J^T M J), (N, in) or (N, P), or the list of blocks, with only the diagonal kept between layers."""
    walk = _Walk(at, to_diag)
    if at.sweep is not None:
        walk.run(m)
    if at.wrt == "input":
        return walk.diagonals.get(id(at.x), _zeros(at, at.size)).reshape(at.n, -1)
    if to_diag:
        return torch.cat([walk.diagonals.get(id(p), _zeros(at, p.numel())).reshape(at.n, -1) for p in at.params], 1)
    found = []
    for part in at.module.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad]
        if own:
            size = sum(p.numel() for p in own)
            found.append(walk.blocks.get(id(part), at.y.new_zeros(at.n, size, size)))
    return found[0] if len(found) == 1 else found


def forward(at: Linearisation, m: Any, to_diag: bool) -> Tensor:
    """diag(J M J^T), (N, out), with only the diagonal kept between layers; a diagonal metric, or the diagonals of blocks."""
    if not to_diag:
        raise NNJError("diag_backprop keeps only the diagonal between layers when a metric goes forward, so to_diag=False is "
                       "contradictory. Pass to_diag=True, or leave out diag_backprop")
    if m is None:
        diagonal = at.y.new_ones(at.n, at.size)
    elif isinstance(m, list):
        diagonal = at.y.new_zeros(at.n, at.size)
        for index, block in m:
            diagonal[:, index] = block.diagonal(dim1=1, dim2=2)
    else:
        diagonal = m if m.dim() == 2 else m.diagonal(dim1=1, dim2=2)
    if at.sweep is None or at.root is None:
        return _zeros(at, at.out)
    seeds = {id(at.x): diagonal.reshape(1, at.n, *at.inputs)} if at.wrt == "input" else {
        id(p): t.reshape(1, at.n, *p.shape) for p, t in zip(at.params, diagonal.split(at.sizes, 1), strict=True)}
    found = Forward(at.sweep).run(seeds, 1).get(at.root)
    return _zeros(at, at.out) if found is None else found.reshape(at.n, -1)
