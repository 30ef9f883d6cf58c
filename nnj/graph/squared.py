"""(J o J')^T m of autograd's own nodes: the squares of a Jacobian's entries, or their products at
two points.

J' is J at another point of the same model (`other`), or J itself. What no formula here covers is
refused by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnj.errors import NNJError
from nnj.graph.attention import attention_squares, fused_attention
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import signed
from nnj.graph.op_names import ELEMENTWISE
from nnj.graph.step import Step, describe

# Jacobians of zeros and ones are their own squares: the same ones at every point, or (choices)
# chosen by the numbers.
_COPIES = set(
    """
    View UnsafeView ReshapeAlias Permute Transpose T Swapaxes Unsqueeze Squeeze Select Slice
    Split SplitWithSizes UnsafeSplit Unbind Cat Stack ConstantPadNd Expand Flip Roll Repeat
    AsStrided CopySlices Clone Alias UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    PixelShuffle PixelUnshuffle
    """.split()
)
_CHOICES = set("MaxPool2DWithIndices Max Min Index IndexSelect Gather Embedding".split())
# Each operand's entry feeds one entry of the result: the square is the factor that it is sent back
# with, twice.
_SINGLE = ELEMENTWISE | {"Sum", "Mean"}


def squared_backward(
    step: Step, m: list[Tensor | None], k: int, paths: dict[int, str], other: Step | None = None
) -> list[Tensor | None]:
    """(J o J')^T m of a raw node. Errors: `NNJError` with the name of an operation whose squares
    nnj does not know.
    """
    node, name = step.node, step.name
    pair = node if other is None else other.node
    if name in _COPIES or (name in _CHOICES and other is None):
        return call_node(node, m, k)
    if name in _SINGLE:
        ones = [None if t is None else torch.ones_like(t[:1]) for t in m]
        if other is None:  # in one call: what a checkpoint has kept can be asked for once
            both = call_node(
                node,
                [
                    None if t is None or one is None else torch.cat([one, t])
                    for t, one in zip(m, ones, strict=True)
                ],
                k + 1,
            )
            return [None if b is None else b[1:] * b[:1].detach() for b in both]
        factors, back = call_node(pair, ones, 1), call_node(node, m, k)
        return [
            None if c is None or b is None else b * c.detach()
            for b, c in zip(back, factors, strict=True)
        ]
    (first, *_) = m
    if first is None:
        raise _refusal(step, paths)
    if name == "MaxPool2DWithIndices":
        return call_node(node, [first * (node._saved_result1 == pair._saved_result1)], k)
    if name in ("Mm", "Bmm"):
        return _products(
            first, (node._saved_self, node._saved_mat2), (pair._saved_self, pair._saved_mat2)
        )
    if name == "Addmm":
        alpha, beta = node._saved_alpha, node._saved_beta
        products = _products(
            first, (node._saved_mat1, node._saved_mat2), (pair._saved_mat1, pair._saved_mat2)
        )
        return [first * beta**2, *(None if t is None else t * alpha**2 for t in products)]
    if name == "Softmax":
        p, q = node._saved_result, pair._saved_result
        both, axis = p * q, _axis(node._saved_dim, p.dim())
        return [both * ((both * first).sum(axis, keepdim=True) + (1 - p - q) * first)]
    if name == "LogSoftmax":
        p, q = node._saved_result.exp(), pair._saved_result.exp()
        return [
            (1 - p - q) * first + p * q * first.sum(_axis(node._saved_dim, p.dim()), keepdim=True)
        ]
    if fused_attention(node):
        found = attention_squares(node, first, pair)
        if found is not None:
            return found
    raise _refusal(step, paths)


def _refusal(step: Step, paths: dict[int, str]) -> NNJError:
    return NNJError(
        f"diag_backprop cannot go on at {describe(step, paths)}: no rule says what the squares of "
        "its Jacobian are. Put the operation into a module with a rule, or leave out diag_backprop"
    )


def _axis(saved: int, dims: int) -> int:
    """An axis of a node, counted from the end."""
    return signed(saved) % dims - dims


def _products(m: Tensor, one: tuple[Any, Any], two: tuple[Any, Any]) -> list[Tensor | None]:
    """y = a b: dy_ij = sum_k da_ik b_kj + a_ik db_kj."""
    (a, b), (c, d) = one, two
    return [None if b is None else m @ (b * d).mT, None if a is None else (a * c).mT @ m]
