"""jacobian, jvp, vjp, jmp, mjp, jmjTp, jTmjp of any module: a layer or a whole model, exact, per
sample.

With J = dy/dx or dy/dw of each sample, over flattened axes; P counts the parameters that require
grad, in the order of `parameters()`. A metric is (N, d, d), symmetric or not, or its diagonal
(N, d); without the sample axis it serves all samples; None is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.products.diagonal_backward import DiagonalSweep, backward
from nnj.products.diagonal_forward import forward
from nnj.products.metrics import (
    Metric,
    _apply,
    _block_metric,
    _blocks,
    _given,
    _metric,
    _rows,
    _take,
    slot_of,
)
from nnj.propagation.backward import Sweep
from nnj.propagation.linearize import Linearization

ENTRIES = 1 << 24  # of J that stand in memory at once where J need not stand as a whole


def jacobian(module: nn.Module, x: Tensor, wrt: str = "input") -> Tensor:
    """J: (N, out, in), or (N, out, P) with wrt="weight"."""
    return Linearization(module, x, slot_of(wrt)).dense()


def jvp(module: nn.Module, x: Tensor, vector: Tensor, wrt: str = "input") -> Tensor:
    """J v: (N, out), for a vector (N, in) or of x's shape; or (N, P), or one (P,) for all
    samples.
    """
    at = Linearization(module, x, slot_of(wrt))
    shapes = (
        [(at.n, *at.inputs), (at.n, at.size)]
        if at.wrt == "input"
        else [(at.n, at.size), (at.size,)]
    )
    v = _given("vector", vector, at, shapes)
    v = v.reshape(1, at.n, -1) if v.dim() > 1 else v[None, None]
    return at.jvp(v).reshape(at.n, at.out)


def vjp(module: nn.Module, x: Tensor, vector: Tensor, wrt: str = "input") -> Tensor:
    """v J: (N, in) or (N, P), for a vector (N, out) or of the output's shape."""
    at = Linearization(module, x, slot_of(wrt))
    u = _given("vector", vector, at, [(at.n, *at.outputs), (at.n, at.out)])
    return at.vjp(u.reshape(1, at.n, *at.outputs))[0]


def jmp(module: nn.Module, x: Tensor, matrix: Tensor | None, wrt: str = "input") -> Tensor:
    """J M: (N, out, K), for M of (N, in, K) or (N, P, K), or without the sample axis."""
    at = Linearization(module, x, slot_of(wrt))
    if matrix is None:
        return at.dense()
    k = matrix.shape[-1] if isinstance(matrix, Tensor) and matrix.dim() else 0
    m = _given("matrix", matrix, at, [(at.n, at.size, k), (at.size, k)])
    m = m.expand(at.n, -1, -1) if m.dim() == 2 else m
    return at.jvp(m.permute(2, 0, 1)).reshape(k, at.n, at.out).permute(1, 2, 0)


def mjp(module: nn.Module, x: Tensor, matrix: Tensor | None, wrt: str = "input") -> Tensor:
    """M J: (N, K, in) or (N, K, P), for M of (N, K, out), or without the sample axis."""
    at = Linearization(module, x, slot_of(wrt))
    if matrix is None:
        return at.dense()
    k = matrix.shape[-2] if isinstance(matrix, Tensor) and matrix.dim() > 1 else 0
    m = _given("matrix", matrix, at, [(at.n, k, at.out), (k, at.out)])
    m = m.expand(at.n, -1, -1) if m.dim() == 2 else m
    return at.vjp(m.transpose(0, 1).reshape(k, at.n, *at.outputs)).transpose(0, 1)


def _columns(at: Linearization) -> list[Tensor]:
    """The unit cotangents in groups so small that J of a group may stand in memory."""
    step = max(1, ENTRIES // max(1, at.n * at.size))
    return list(at.basis().split(step))


def jTmjp(
    module: nn.Module,
    x: Tensor,
    matrix: Tensor | None = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
    joint: bool = False,
) -> Any:
    """J^T M J: a metric on the output pulled back to the input, (N, in, in), or to the parameters.

    With respect to the parameters: the list of the blocks (N, P_l, P_l) of the modules that own
    parameters, in the order of `modules()`; a bare tensor for a single one; (N, P, P) with `joint`.

    Args:
        matrix: (N, out, out), need not be symmetric; (N, out) with from_diag; None is the identity.
        to_diag: the diagonal alone, (N, in) or (N, P); exact, and no full matrix is made.
        diag_backprop: an approximation: between layers only the diagonal of the metric is kept, so
            that one backward pass does. It neglects how the inputs of a layer vary together, and
            where a tensor is used twice, how its uses do: (J2 J1)o2 is not J2o2 J1o2. The metric
            enters the last layer exactly; blocks of parameters, and the matrix on the input, are
            exact within the layer.

    Errors: `NNJError` for shapes that do not fit; for diag_backprop at an operation through which
    no diagonal can pass."""
    at = Linearization(module, x, slot_of(wrt), DiagonalSweep if diag_backprop else Sweep)
    if joint and (to_diag or at.wrt == "input"):
        raise NNJError(
            "joint asks for the full matrix on all parameters, so it is for wrt='weight' without "
            "to_diag"
        )
    m = _metric(matrix, at, at.out, from_diag)
    if diag_backprop:
        if joint:
            raise NNJError(
                "diag_backprop keeps only the diagonal between layers, so there is no full matrix "
                "on all parameters. Leave out joint, or diag_backprop"
            )
        return backward(at, m, to_diag)
    if to_diag:
        total = at.y.new_zeros(at.n, at.size)
        for u in _columns(at):
            left = at.vjp(u)
            if m is None or m.dim() == 2:
                weights = (
                    1.0 if m is None else (u.reshape(*u.shape[:2], -1) * m).sum(-1, keepdim=True)
                )
                total += (left.square() * weights).sum(0)
            else:
                total += (left * at.vjp(_rows(at, m, u))).sum(0)
        return total
    j = at.dense()
    mj = j if m is None else m[..., None] * j if m.dim() == 2 else m @ j
    if at.wrt == "input":
        return j.mT @ mj
    found = [_take(j, index).mT @ _take(mj, index) for index in _blocks(at, joint)]
    return found[0] if len(found) == 1 else found


def jmjTp(
    module: nn.Module,
    x: Tensor,
    matrix: Metric = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
) -> Tensor:
    """J M J^T: a metric on the input or the parameters pushed forward to the output, (N, out, out).

    Args:
        matrix: on the input (N, in, in); on the parameters (N, P, P), or the list of the blocks of
            modules as `jTmjp` gives them; (N, in) or (N, P) with from_diag; None is the identity.
            All of it is used.
        to_diag: the diagonal alone, (N, out), without the full matrix.
        diag_backprop: an approximation, as in `jTmjp`: between layers only the diagonal of the
            metric is kept. It enters the first layer and each layer's own parameters exactly,
            without what lies between layers, and leaves the last exactly.

    A posterior variance on the parameters gives the linearised predictive variance of the outputs,
    without sampling.

    Errors: `NNJError` for shapes that do not fit.
    """
    at = Linearization(module, x, slot_of(wrt), DiagonalSweep if diag_backprop else Sweep)
    blocks = _block_metric(matrix, at, from_diag)
    if diag_backprop:
        return forward(at, blocks, to_diag)
    if to_diag:
        parts = []
        for u in _columns(at):
            j = at.vjp(u).transpose(0, 1)
            parts.append((_apply(j, blocks) * j).sum(-1))
        return torch.cat(parts, 1)
    j = at.dense()
    return _apply(j, blocks) @ j.mT


def jTmjp_pair(
    module: nn.Module,
    x1: Tensor,
    x2: Tensor,
    matrices: Sequence[Tensor] | None = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
) -> tuple[Any, Any, Any]:
    """(J1^T M11 J1, J1^T M12 J2, J2^T M22 J2) with J1 at x1 and J2 at x2: a metric on pairs of
    outputs, pulled back.

    Args:
        matrices: (M11, M12, M22), each as in `jTmjp`; None is the identity for each of them.
        from_diag, to_diag, diag_backprop: as in `jTmjp`; each result has the form that `jTmjp`
            gives.

    Errors: `NNJError` for shapes that do not fit; for diag_backprop where `jTmjp` refuses it, or
    where the model does other operations at x1 than at x2."""
    if matrices is not None and (not isinstance(matrices, (list, tuple)) or len(matrices) != 3):
        raise NNJError("matrices is (M11, M12, M22) or None")
    walk = DiagonalSweep if diag_backprop else Sweep
    one, two = (
        Linearization(module, x1, slot_of(wrt), walk),
        Linearization(module, x2, slot_of(wrt), walk),
    )
    if one.n != two.n or one.size != two.size or one.out != two.out:
        raise NNJError(
            f"x1 and x2 are pairs of samples; found {one.n} and {two.n} samples of {one.size} and "
            f"{two.size} numbers"
        )
    metrics = [_metric(m, one, one.out, from_diag) for m in matrices or (None,) * 3]
    if diag_backprop:
        return (
            backward(one, metrics[0], to_diag),
            backward(one, metrics[1], to_diag, two),
            backward(two, metrics[2], to_diag),
        )
    js = [(one, one), (one, two), (two, two)]
    dense = {id(one): one.dense(), id(two): two.dense()}
    results: list[Any] = []
    for (a, b), metric in zip(js, metrics, strict=True):
        j, k = dense[id(a)], dense[id(b)]
        mk = k if metric is None else metric[..., None] * k if metric.dim() == 2 else metric @ k
        if to_diag:
            results.append((j * mk).sum(1))
        elif one.wrt == "input":
            results.append(j.mT @ mk)
        else:
            found = [_take(j, i).mT @ _take(mk, i) for i in _blocks(one, joint=False)]
            results.append(found[0] if len(found) == 1 else found)
    return results[0], results[1], results[2]
