"""(J o J')^T m of autograd's own nodes: the squares of a Jacobian's entries, or their products at
two points.

J' is J at another point of the same model (`other`), or J itself. What no formula here covers is
refused with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.graph.attention import attention_squares, fused_attention
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import signed
from nnj.graph.op_names import CHOICES, COPIES, ELEMENTWISE
from nnj.graph.step import Step, describe

Columns = list[Tensor | None]  # one tensor (K, ...) for each edge; None where nothing arrives

# Each entry of an operand feeds one entry of the result, so its square is the factor with which the
# node sends it back, twice.
_SINGLE = ELEMENTWISE | {"Sum", "Mean"}


def squared_backward(
    step: Step, m: Columns, k: int, paths: Mapping[nn.Module, str], other: Step | None = None
) -> Columns:
    """(J o J')^T m of a node. Errors: `NNJError` with the name of an operation whose squares nnj
    does not know.
    """
    node, name = step.node, step.name
    pair = node if other is None else other.node
    if name in COPIES or (name in CHOICES and other is None):
        return call_node(node, m, k)
    if name in _SINGLE:
        return _single(node, m, k) if other is None else _single_pair(node, pair, m, k)
    first = m[0]
    formula = _attention if fused_attention(node) else _FORMULAS.get(name)
    found = None if formula is None or first is None else formula(node, pair, first, k)
    if found is None:
        raise NNJError(
            f"diag_backprop cannot go on at {describe(step, paths)}: no rule says what the squares "
            "of its Jacobian are. Put the operation into a module with a rule, or leave out "
            "diag_backprop"
        )
    return found


def _single(node: Any, m: Columns, k: int) -> Columns:
    """The factors are what the node makes of ones. They are asked for together with the columns:
    what a checkpoint has kept can be had once.
    """
    with_ones = [None if t is None else torch.cat([torch.ones_like(t[:1]), t]) for t in m]
    both = call_node(node, with_ones, k + 1)
    return [None if b is None else b[1:] * b[:1].detach() for b in both]


def _single_pair(node: Any, pair: Any, m: Columns, k: int) -> Columns:
    """One of the two factors is the other point's."""
    ones = [None if t is None else torch.ones_like(t[:1]) for t in m]
    factors, back = call_node(pair, ones, 1), call_node(node, m, k)
    return [
        None if c is None or b is None else b * c.detach()
        for b, c in zip(back, factors, strict=True)
    ]


# -- formulas for one result: `node` has J, `pair` has J' ------------------------------------------


def _max_pool(node: Any, pair: Any, m: Tensor, k: int) -> Columns:
    """Where both have chosen the same entry."""
    return call_node(node, [m * (node._saved_result1 == pair._saved_result1)], k)


def _product(node: Any, pair: Any, m: Tensor, k: int) -> Columns:
    """y = a b."""
    return _factors(m, (node._saved_self, node._saved_mat2), (pair._saved_self, pair._saved_mat2))


def _sum_with_product(node: Any, pair: Any, m: Tensor, k: int) -> Columns:
    """y = beta c + alpha a b."""
    alpha, beta = node._saved_alpha, node._saved_beta
    found = _factors(m, (node._saved_mat1, node._saved_mat2), (pair._saved_mat1, pair._saved_mat2))
    return [m * beta**2, *(None if t is None else t * alpha**2 for t in found)]


def _factors(m: Tensor, one: tuple[Any, Any], two: tuple[Any, Any]) -> Columns:
    """y = a b: dy_ij = sum_k da_ik b_kj + a_ik db_kj, at (a, b) and (c, d)."""
    (a, b), (c, d) = one, two
    return [None if b is None else m @ (b * d).mT, None if a is None else (a * c).mT @ m]


def _softmax(node: Any, pair: Any, m: Tensor, k: int) -> Columns:
    """J = diag(p) - p p^T, J' that of q."""
    p, q = node._saved_result, pair._saved_result
    both, axis = p * q, _axis(node._saved_dim, p.dim())
    return [both * ((both * m).sum(axis, keepdim=True) + (1 - p - q) * m)]


def _log_softmax(node: Any, pair: Any, m: Tensor, k: int) -> Columns:
    """J = 1 - 1 p^T, J' that of q."""
    p, q = node._saved_result.exp(), pair._saved_result.exp()
    axis = _axis(node._saved_dim, p.dim())
    return [(1 - p - q) * m + p * q * m.sum(axis, keepdim=True)]


def _attention(node: Any, pair: Any, m: Tensor, k: int) -> Columns | None:
    return attention_squares(node, m, pair)


def _axis(saved: int, dims: int) -> int:
    """An axis of a node, counted from the end."""
    return signed(saved) % dims - dims


_FORMULAS: dict[str, Callable[[Any, Any, Tensor, int], Columns]] = {
    "MaxPool2DWithIndices": _max_pool,
    "Mm": _product,
    "Bmm": _product,
    "Addmm": _sum_with_product,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
}
