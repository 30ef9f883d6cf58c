"""y = x W^T + b with bare parameters, without a layer: autograd's node says what a layer's rule
would.

The projections of attention, recurrent cells, adapters, functional and exported models end in such
nodes; so do convolutions. Where the weight's edge leads straight to a parameter, through transposes
and chunks of its rows alone, the pullback is that of `nnj.PatchMatmul`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnj.graph.nodes import edge_shape, leaf_of, node_name, own_task, saved, signed
from nnj.graph.weight_axes import Axes, weight_axes
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.views import View, ViewJacobian
from nnj.jacobians.weight_jacobian import PatchMatmul, ScaleShift
from nnj.recording.records import Edge

NAMES = {"Addmm": "mat1", "Mm": "self", "Convolution": "input"}  # what x is saved as
FACTORS = ("self", "mat2")  # what the operands of Bmm are saved as
FORMS = {"Addmm": 1, "Mm": 0}  # y = x M: the operand that x is; M is saved as mat2
PRODUCTS = {"Add", "Bmm", *NAMES}  # the nodes that may have bare parameters


@dataclass(eq=False)
class BareParameter:
    """Operand number `operand` of a node is the parameter p, or rows of it; j is the Jacobian in
    p.
    """

    operand: int
    p: nn.Parameter
    j: Jacobian


class SavedInput:
    """x of y = x W^T, as a node has saved it: asked for once, in a pass of its own or during a
    walk, and then kept.

    A checkpoint gives it once in each pass, and the next pass is the user's.
    """

    def __init__(self, node: Any):
        self.node = node
        self.name = NAMES.get(node_name(node))
        self.value: Tensor | None = None

    def take(self) -> None:
        if self.value is None and self.name is not None:
            self.value = saved(self.node, self.name)

    def __call__(self) -> Tensor:
        if self.value is None:
            own_task(self.take)
        assert self.value is not None
        return self.value


def bare_parameters(
    node: Any, wanted: Callable[[Tensor], bool], saved_x: SavedInput
) -> list[BareParameter]:
    """The bare parameters of a node y = x W^T + b; empty if it is something else, or its weight is
    computed.
    """
    name = node_name(node)
    if name == "Add":
        return _bias(node, wanted)
    if name == "Convolution":
        return _convolution(node, wanted, saved_x)
    if name == "Bmm":
        return _product_of_one(node, wanted, saved_x)
    return _matrix_product(node, FORMS[name], wanted, saved_x) if name in FORMS else []


def _matrix_product(
    node: Any, first: int, wanted: Callable[[Tensor], bool], saved_x: SavedInput
) -> list[BareParameter]:
    """The bare parameters of y = x M + b, of which x is operand `first`, M the next one, and b
    operand 0 where there is one.
    """
    if any(getattr(node, f"_saved_{scale}", 1) != 1 for scale in ("alpha", "beta")):
        return []
    shape = tuple(node._input_metadata[0].shape)
    end = _end(node.next_functions[first + 1], wanted)
    if end is None or len(shape) != 2 or not node._input_metadata[0].dtype.is_floating_point:
        return []
    p, transposed, rows = end
    width = p.shape[0] if transposed else p.shape[-1]
    like = torch.empty(shape[0], 0, dtype=p.dtype, device=p.device)
    patches = lambda at: saved_x()[at, None, :, None].to(p.dtype)
    j: Jacobian = PatchMatmul(patches, (shape[1], width), shape[1:], like)
    if transposed:
        j = ViewJacobian(j, View.permuted(j.inputs[::-1], j.inputs))
    else:
        j = _whole(j, rows, p)
    found = [BareParameter(first + 1, p, j)]
    end = _end(node.next_functions[0], wanted) if first else None
    if (
        end is not None
        and edge_shape(node.next_functions[0]) == shape[1:]
        and end.p.dtype == p.dtype
    ):
        b, _, rows = end
        found.append(BareParameter(0, b, _whole(ScaleShift(shape[1:], shape[1:], like), rows, b)))
    wide = torch.promote_types(p.dtype, node._input_metadata[0].dtype) == p.dtype
    fits = all(math.prod(bare.j.inputs) == bare.p.numel() for bare in found)
    return found if wide and fits else []


def _product_of_one(
    node: Any, wanted: Callable[[Tensor], bool], saved_x: SavedInput
) -> list[BareParameter]:
    """The bare weight of a product in a batch of one, (1, R, I) by (1, I, O), which einsum makes of
    one weight: rows of x are the places of one row. The weight may come first, and x be (1, I, R).
    """
    if node._input_metadata[0].shape[0] != 1 or not node._input_metadata[0].dtype.is_floating_point:
        return []
    for operand in (1, 0):
        end = weight_axes(node.next_functions[operand], wanted)
        if end is not None and end[0].dtype == node._input_metadata[0].dtype:
            return [_operand_of_one(node, operand, *end, saved_x)]
    return []


def _operand_of_one(
    node: Any, operand: int, p: nn.Parameter, axes: Axes, saved_x: SavedInput
) -> BareParameter:
    """The parameter p as that operand, made of some of its axes each."""
    last = operand == 1
    inner, outer = axes[1:] if last else axes[:0:-1]
    long = [axis for axis, size in enumerate(p.shape) if size > 1]  # others have no part in views
    form = [math.prod(p.shape[axis] for axis in group) for group in (outer, inner)]
    order = [long.index(axis) for axis in (*outer, *inner)]
    view = View.permuted(p.shape, form, [p.shape[axis] for axis in long], order)
    saved_x.name = FACTORS[1 - operand]
    patches = lambda rows: (saved_x()[rows].mT if last else saved_x()[rows])[:, None]
    one = torch.empty(1, 0, dtype=p.dtype, device=p.device)
    outputs = tuple(node._input_metadata[0].shape[1:])
    return BareParameter(
        operand, p, ViewJacobian(PatchMatmul(patches, form, outputs, one, last=last), view)
    )


def _bias(node: Any, wanted: Callable[[Tensor], bool]) -> list[BareParameter]:
    """The bare parameter of y = x + b, with b along the last axis: torch adds a bias in a node of
    its own where the rows of x are not contiguous.
    """
    shape, dtype = tuple(node._input_metadata[0].shape), node._input_metadata[0].dtype
    found = []
    for operand, edge in enumerate(node.next_functions):
        end = (
            _end(edge, wanted)
            if edge[0] is not None and len(shape) > 1 and edge_shape(edge) == shape[-1:]
            else None
        )
        if end is None or end.p.dtype != dtype or node._saved_alpha != 1:
            continue
        p, _, rows = end
        j = ScaleShift(
            shape[-1:], shape[1:], torch.empty(shape[0], 0, dtype=p.dtype, device=p.device)
        )
        if (rows is None and p.shape == shape[-1:]) or (rows is not None and p.dim() == 1):
            found.append(BareParameter(operand, p, _whole(j, rows, p)))
    return found


def _convolution(
    node: Any, wanted: Callable[[Tensor], bool], saved_x: SavedInput
) -> list[BareParameter]:
    """The bare parameters of y = w * x + b on one or two spatial axes, w seen as a matrix and x in
    patches.
    """
    (w, _), b = node.next_functions[1], node.next_functions[2]
    shape, dtype = tuple(node._input_metadata[0].shape), node._input_metadata[0].dtype
    ends: list[Any] = [None if end is None else leaf_of(end) for end in (w, b[0])]
    if (
        node._saved_transposed
        or len(shape) not in (3, 4)
        or ends[0] is None
        or (b[0] is not None and ends[1] is None)
    ):
        return []
    if any(p is not None and (p.dtype != dtype or not wanted(p)) for p in ends):
        return []
    groups, kernel = node._saved_groups, ends[0].shape[2:]
    like = torch.empty(shape[0], 0, dtype=dtype, device=ends[0].device)

    def patches(at: slice) -> Tensor:
        x = saved_x()[at]
        options = [
            tuple(value)
            for value in (kernel, node._saved_dilation, node._saved_padding, node._saved_stride)
        ]
        if len(kernel) == 1:  # as one row of an image
            x, options = (
                x[:, :, None],
                [(neutral, *value) for neutral, value in zip((1, 1, 0, 1), options, strict=True)],
            )
        result: Tensor = F.unfold(x, *options).unflatten(1, (groups, -1))
        return result

    found = [
        BareParameter(
            1,
            ends[0],
            PatchMatmul(patches, ends[0].shape, shape[1:], like, groups=groups, last=False),
        )
    ]
    if ends[1] is not None:
        found.append(BareParameter(2, ends[1], ScaleShift(shape[1:2], shape[1:], like, last=False)))
    return found


def _convolution_backward(node: Any, g: Tensor) -> Tensor:
    """Columns g of (K, N, O, *space) at the input of a convolution."""
    n, *shape = edge_shape(node.next_functions[0])
    like = g.new_empty(len(g) * n, *shape)  # of which only the shape is read
    found = torch.ops.aten.convolution_backward(
        g.flatten(0, 1),
        like,
        saved(node, "weight"),
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        False,
        node._saved_output_padding,
        node._saved_groups,
        [True, False, False],
    )
    result: Tensor = found[0].unflatten(0, (len(g), n))
    return result


def product_backward(node: Any, g: Tensor, out: Sequence[Edge | None]) -> list[Tensor | None]:
    """What a product sends to b and x, for columns g: g and g M^T; nothing to its weight.

    Args:
        out: the edges of its operands, None for those to which nothing is to be sent.
    """
    if node_name(node) == "Add":
        return [g, g]
    if node_name(node) == "Bmm":
        first = None if out[0] is None else g @ saved(node, "mat2").mT
        return [first, None if out[1] is None else saved(node, "self").mT @ g]
    if node_name(node) == "Convolution":
        return [
            None if node.next_functions[0][0] is None else _convolution_backward(node, g),
            None,
            None,
        ]
    x = FORMS[node_name(node)]
    back = None if node.next_functions[x][0] is None else g @ saved(node, "mat2").mT
    return [g, back, None] if x else [back, None]


def _whole(j: Jacobian, rows: tuple[int, int] | None, p: Tensor) -> Jacobian:
    """The Jacobian in a parameter, of which some rows have the Jacobian j."""
    if rows is None:
        return j
    view = View.rows((p.shape[0], *j.inputs[1:]), rows[0], rows[0] + j.inputs[0])
    return ViewJacobian(j, view)


class _End(NamedTuple):
    """The parameter where an edge ends.

    Attributes:
        transposed: whether a matrix M of y = x M is p itself, so that W of y = x W^T is its
            transpose.
        rows: start and stop of the rows of p that stand in M, where they are not all.
    """

    p: nn.Parameter
    transposed: bool
    rows: tuple[int, int] | None


def _end(edge: Edge, wanted: Callable[[Tensor], bool]) -> _End | None:
    """The wanted parameter to which an edge leads through transposes, casts and a chunk of rows
    alone.
    """
    node, number = edge
    transposed, rows = True, None
    while node is not None and leaf_of(node) is None:
        name, dims = node_name(node), len(node._input_metadata[number].shape)
        if name != "ToCopy":
            if rows is not None:
                return None
            if name == "T" or (dims == 2 and name in ("Transpose", "Permute")):
                transposed = transposed ^ (name == "T" or _swaps(node))
            else:
                rows = _chunk(node, number)
                if rows is None or (transposed and dims == 2):
                    return None
        if len(node.next_functions) != 1:
            return None
        node, number = node.next_functions[0]
    p: Any = None if node is None else leaf_of(node)
    if p is None or not wanted(p) or p.dim() not in (1, 2) or p.layout != torch.strided:
        return None
    return _End(p, transposed and p.dim() == 2, rows)


def _swaps(node: Any) -> bool:
    """Whether a transpose of a matrix, or a permutation of its axes, swaps them."""
    if node_name(node) == "Permute":
        return signed(node._saved_dims[0]) % 2 == 1
    result: bool = (node._saved_dim0 - node._saved_dim1) % 2 != 0
    return result


def _chunk(node: Any, nr: int) -> tuple[int, int] | None:
    """Start and stop of the rows of a node's operand that its output nr is, if it is that."""
    name = node_name(node)
    if name in ("Split", "SplitWithSizes", "UnsafeSplit") and node._saved_dim == 0:
        sizes: Sequence[int] = [m.shape[0] for m in node._input_metadata]
        return sum(sizes[:nr]), sum(sizes[: nr + 1])
    if name == "Slice" and node._saved_dim == 0 and node._saved_step == 1:
        count = node._input_metadata[0].shape[0]
        total = node._saved_self_sym_sizes[0]
        start = signed(node._saved_start)
        start = max(0, start + total if start < 0 else start)
        return start, start + count
    return None
