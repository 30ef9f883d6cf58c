"""jacobian, jvp, vjp, jmp, mjp, jmjTp, jTmjp of any module: a layer or a whole model, exact, per
sample.

J = dy/dx (wrt="input") or dy/dw (wrt="weight") of each sample, over flattened axes: `in` and `out`
are the numbers of entries of one sample's input and output, and P counts the parameters that
require grad, in the order of `parameters()`. A metric is (N, d, d), symmetric or not, or with
`from_diag` its diagonal (N, d); without the sample axis it serves all samples; None is the
identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.matrices.matrix import Matrix
from nnj.products.diagonal_backward import pull_back
from nnj.products.diagonal_forward import push_forward
from nnj.products.diagonal_steps import linearize_diagonal
from nnj.products.differentiable import differentiable_jacobian, differentiable_vjp
from nnj.products.metrics import (
    Metric,
    given,
    metric_on_inputs,
    metric_on_outputs,
    positions_by_module,
    slot_of,
    take,
    times,
    times_transposed,
)
from nnj.propagation.linearize import Linearization, Modules, Slot, linearization
from nnj.propagation.linearized import Linearized
from nnj.propagation.weight_contractions import diagonal_pulled_back, pushed_forward
from nnj.propagation.weight_metrics import DiagonalMetric


def jacobian(
    module: nn.Module,
    x: Any,
    wrt: str = "input",
    *,
    modules: Modules = None,
    differentiable: bool = False,
) -> Tensor:
    """J: (N, out, in), or (N, out, P) with wrt="weight", dense and contiguous.

    The `out` cotangents go through the model together, so memory is that of the result and of
    `out` times the largest activation.

    Args:
        module: a layer or a whole model, extended or not. It is called once, in the mode in which
            it is (dropout in training is that of this one call), and left as it was. It must give
            one real tensor (N, ...), of which row n is that of sample n.
        x: (N, ...), one tensor; of floating point with wrt="input". With wrt="weight" also a tuple
            of arguments, or a dict of named ones.
        wrt: "input", or "weight" for the parameters that require grad.
        modules: with wrt="weight" the parameters of these modules alone, in all products: P is
            theirs.
        differentiable: with a graph of its own, in x and in all parameters, by torch.func: to
            propagate gradients through J. The module must be one that `torch.func.vmap` takes.

    Common to all products: nothing is summed or averaged over samples, and results have no graph
    of their own. What no rule describes (a class that overrides the `forward` of a layer, hooks,
    parametrizations, parameters without a layer) goes through autograd, which is as exact and
    mostly slower. The first time that a model's graph has a structure it is compared with autograd
    as in `nnj.collect` (verify=): wrong rules, and all hooks that change gradients, are refused.
    Under autocast results are as precise as the forward pass.

    Errors: `NNJError` where samples influence one another (BatchNorm in training: use
    `model.eval()`), for complex parameters, a reentrant checkpoint, a model under `torch.compile`,
    one that is sharded or distributed or on the device "meta", nested tensors, and arguments of
    another shape, dtype or device than they should have; `PluginError` with the name of the plugin
    whose rule is broken; `TypeError` for what is no module.
    """
    if differentiable:
        return differentiable_jacobian(module, x, slot_of(wrt), modules)
    return linearization(module, x, slot_of(wrt), modules).dense().contiguous()


def jvp(
    module: nn.Module, x: Any, vector: Tensor, wrt: str = "input", *, modules: Modules = None
) -> Tensor:
    """J v: (N, out), one tangent forward.

    Args:
        vector: (N, in) or of x's shape; with wrt="weight" (N, P), or one (P,) for all samples.

    Errors: `NNJError` for shapes that do not fit, and as `jacobian`.
    """
    at = linearization(module, x, slot_of(wrt), modules)
    shapes = (
        [(at.n, *at.inputs), (at.n, at.size)]
        if at.wrt == "input"
        else [(at.n, at.size), (at.size,)]
    )
    v = given("vector", vector, at, shapes)
    v = v.reshape(1, at.n, -1) if v.dim() > 1 else v[None, None]
    return at.jvp(v).reshape(at.n, at.out)


def vjp(
    module: nn.Module,
    x: Any,
    vector: Tensor,
    wrt: str = "input",
    *,
    modules: Modules = None,
    differentiable: bool = False,
) -> Tensor:
    """v^T J: (N, in) or (N, P), of each sample: unlike a gradient it is not summed over them.

    Args:
        vector: (N, out) or of the output's shape.
        differentiable: as in `jacobian`.

    Errors: `NNJError` for shapes that do not fit, and as `jacobian`.
    """
    if differentiable:
        return differentiable_vjp(module, x, vector, slot_of(wrt), modules)
    at = linearization(module, x, slot_of(wrt), modules)
    u = given("vector", vector, at, [(at.n, *at.outputs), (at.n, at.out)])
    return at.vjp(u.reshape(1, at.n, *at.outputs))[0]


def jmp(
    module: nn.Module, x: Any, matrix: Tensor | None, wrt: str = "input", *, modules: Modules = None
) -> Tensor:
    """J M: (N, out, K), K tangents forward together.

    Args:
        matrix: (N, in, K) or (N, P, K), or without the sample axis one for all; None is the
            identity, which gives J.

    Errors: `NNJError` for shapes that do not fit, and as `jacobian`.
    """
    at = linearization(module, x, slot_of(wrt), modules)
    if matrix is None:
        return at.dense()
    k = matrix.shape[-1] if isinstance(matrix, Tensor) and matrix.dim() else 0
    m = given("matrix", matrix, at, [(at.n, at.size, k), (at.size, k)])
    m = m.expand(at.n, -1, -1) if m.dim() == 2 else m
    return at.jvp(m.permute(2, 0, 1)).reshape(k, at.n, at.out).permute(1, 2, 0)


def mjp(
    module: nn.Module, x: Any, matrix: Tensor | None, wrt: str = "input", *, modules: Modules = None
) -> Tensor:
    """M J: (N, K, in) or (N, K, P), K cotangents backward together.

    Args:
        matrix: (N, K, out), or without the sample axis one for all; None is the identity, which
            gives J.

    Errors: `NNJError` for shapes that do not fit, and as `jacobian`.
    """
    at = linearization(module, x, slot_of(wrt), modules)
    if matrix is None:
        return at.dense()
    k = matrix.shape[-2] if isinstance(matrix, Tensor) and matrix.dim() > 1 else 0
    m = given("matrix", matrix, at, [(at.n, k, at.out), (k, at.out)])
    m = m.expand(at.n, -1, -1) if m.dim() == 2 else m
    return at.vjp(m.transpose(0, 1).reshape(k, at.n, *at.outputs)).transpose(0, 1)


def jTmjp(
    module: nn.Module,
    x: Any,
    matrix: Tensor | None = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
    joint: bool = False,
    modules: Modules = None,
    memory: int = 2**28,
) -> Any:
    """J^T M J: a metric on the output pulled back to the input, (N, in, in), or to the parameters.

    Of each sample by itself: a GGN is the sum over axis 0. With respect to the parameters: the list
    of the blocks (N, P_l, P_l) of the modules that own parameters, in the order of `modules()`, a
    shared parameter in the first of its modules; a bare tensor for a single one; (N, P, P) with
    `joint`. J stands in memory as a whole, but with to_diag or diag_backprop.

    Args:
        matrix: (N, out, out), need not be symmetric; (N, out) with from_diag; without the sample
            axis one for all; None is the identity.
        to_diag: the diagonal alone, (N, in) or (N, P); exact, and no full matrix is made, nor J:
            thin factors of it at each parameter are contracted.
        diag_backprop: an approximation: between layers only the diagonal of the metric is kept, so
            that one backward pass does, whatever the number of outputs. It neglects how the inputs
            of a layer vary together, and where a tensor is used twice, how its uses do: of the
            chain (J2 J1)o2 it takes J2o2 J1o2. Exact are the last layer, which the metric enters
            whole; within each layer the blocks of its parameters, and the matrix on the input
            within the first. Verified is J of the same steps, so wrong rules and hooks that change
            gradients are refused; the squares of J, by a rule's `square` or of an operation, are
            compared with nothing.
        joint: one matrix on all parameters in place of the blocks.
        memory: with to_diag, bytes that cotangents may take on their way back; where they are
            more, they go in chunks.

    Errors: `NNJError` for shapes that do not fit; for `joint` with wrt="input", to_diag or
    diag_backprop. With diag_backprop for an operation of whose Jacobian nnj does not know the
    squares, at a checkpoint, and, without to_diag, where a layer has not one row for each sample or
    where no layer with a rule owns a parameter; else as `jacobian`."""
    slot = slot_of(wrt)
    if joint:
        _check_joint(slot, to_diag, diag_backprop)
    if diag_backprop:
        _check_all(modules)
        point = linearize_diagonal(module, x, slot)
        return pull_back(point, metric_on_outputs(matrix, point, from_diag), to_diag)
    at = linearization(module, x, slot, modules, memory=memory)
    m = metric_on_outputs(matrix, at, from_diag)
    if to_diag:
        return diagonal_pulled_back(at, m)
    j = at.dense()
    return _pulled_back(at, j, m, j, joint)


def jmjTp(
    module: nn.Module,
    x: Any,
    matrix: Metric | Matrix = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
    modules: Modules = None,
    memory: int = 2**28,
) -> Tensor:
    """J M J^T: a metric on the input or the parameters pushed forward to the output, (N, out, out).

    A posterior variance on the parameters gives the linearised predictive variance of the outputs,
    without sampling: `jmjTp(model, x, variance, "weight", from_diag=True)`. It takes thin factors
    of J, and one product for each layer.

    Args:
        matrix: on the input (N, in, in); on the parameters (N, P, P), a matrix of `nnj.matrices`,
            or the list of the blocks of modules as `jTmjp` gives them; (N, in) or (N, P) with
            from_diag; without the sample axis one for all; None is the identity. All of it is used.
        to_diag: the diagonal alone, (N, out), without the full matrix; exact, and J stands in
            memory a few rows at a time, or not at all with a diagonal metric on the parameters.
        diag_backprop: an approximation, as in `jTmjp`: between layers only the diagonal of the
            metric is kept. It enters the first layer and each layer's own parameters exactly,
            without what lies between layers, and leaves the last exactly.
        memory: where J is not formed, or a few rows at a time, bytes that these and the cotangents
            may take, as in `nnj.linearize`.

    Errors: `NNJError` for shapes that do not fit, and for blocks with wrt="input" or from_diag;
    with diag_backprop as in `jTmjp`; else as `jacobian`.
    """
    slot = slot_of(wrt)
    if isinstance(matrix, Matrix):
        _check_of_parameters(slot, from_diag or diag_backprop)
        found = Linearized(linearization(module, x, slot, modules, memory=memory))
        return found.variance(matrix) if to_diag else found.covariance(matrix)
    if diag_backprop:
        _check_all(modules)
        point = linearize_diagonal(module, x, slot)
        return push_forward(point, metric_on_inputs(matrix, point, from_diag), to_diag)
    at = linearization(module, x, slot, modules, memory=memory)
    m = metric_on_inputs(matrix, at, from_diag)
    if slot == "weight" and not isinstance(m, list) and (m is None or from_diag):
        return pushed_forward(at, DiagonalMetric.of(at, m), to_diag)
    if to_diag:
        parts = []
        for u in _unit_cotangents(at):
            j = at.vjp(u).transpose(0, 1)
            parts.append((times_transposed(j, m) * j).sum(-1))
        return torch.cat(parts, 1)
    j = at.dense()
    return times_transposed(j, m) @ j.mT


def jTmjp_pair(
    module: nn.Module,
    x1: Any,
    x2: Any,
    matrices: Sequence[Tensor] | None = None,
    wrt: str = "input",
    from_diag: bool = False,
    to_diag: bool = False,
    diag_backprop: bool = False,
    modules: Modules = None,
    memory: int = 2**28,
) -> tuple[Any, Any, Any]:
    """(J1^T M11 J1, J1^T M12 J2, J2^T M22 J2) with J1 at x1 and J2 at x2: a metric on pairs of
    outputs, pulled back.

    The module is called once at each of them; both J stand in memory, but with diag_backprop.

    Args:
        x2: as many samples as x1, of the same size.
        matrices: (M11, M12, M22), each as in `jTmjp`; None is the identity for each of them.
        from_diag, to_diag, diag_backprop, memory: as in `jTmjp`; each result has the form that
            `jTmjp` gives.

    Errors: `NNJError` for shapes that do not fit; for diag_backprop where `jTmjp` refuses it, or
    where the model does other operations at x1 than at x2; else as `jacobian`."""
    if matrices is not None and (not isinstance(matrices, (list, tuple)) or len(matrices) != 3):
        raise NNJError("matrices is (M11, M12, M22) or None")
    slot, given_ones = slot_of(wrt), (None, None, None) if matrices is None else matrices
    if diag_backprop:
        _check_all(modules)
        p1, p2 = linearize_diagonal(module, x1, slot), linearize_diagonal(module, x2, slot)
        _check_pairs(p1, p2)
        m11, m12, m22 = (metric_on_outputs(m, p1, from_diag) for m in given_ones)
        return (
            pull_back(p1, m11, to_diag),
            pull_back(p1, m12, to_diag, p2),
            pull_back(p2, m22, to_diag),
        )
    tops = modules if modules is None or isinstance(modules, nn.Module) else list(modules)
    one, two = (linearization(module, x, slot, tops, memory=memory) for x in (x1, x2))
    _check_pairs(one, two)
    m11, m12, m22 = (metric_on_outputs(m, one, from_diag) for m in given_ones)
    if to_diag:
        return (
            diagonal_pulled_back(one, m11),
            diagonal_pulled_back(one, m12, two),
            diagonal_pulled_back(two, m22),
        )
    j1, j2 = one.dense(), two.dense()

    def sandwich(left: Tensor, m: Tensor | None, right: Tensor) -> Any:
        return _pulled_back(one, left, m, right)

    return sandwich(j1, m11, j1), sandwich(j1, m12, j2), sandwich(j2, m22, j2)


def _check_joint(slot: Slot, to_diag: bool, diag_backprop: bool) -> None:
    if to_diag or slot == "input":
        raise NNJError(
            "joint asks for the full matrix on all parameters, so it is for wrt='weight' without "
            "to_diag"
        )
    if diag_backprop:
        raise NNJError(
            "diag_backprop keeps only the diagonal between layers, so there is no full matrix "
            "on all parameters. Leave out joint, or diag_backprop"
        )


def _check_all(modules: Modules) -> None:
    if modules is not None:
        raise NNJError("diag_backprop is of all parameters. Leave out modules=, or diag_backprop")


def _check_of_parameters(slot: Slot, other_form: bool) -> None:
    if slot == "input" or other_form:
        raise NNJError(
            "a matrix of nnj.matrices is one on parameters: it is for wrt='weight' without "
            "from_diag and diag_backprop"
        )


def _check_pairs(one: Linearization[Any], two: Linearization[Any]) -> None:
    if one.n != two.n or one.size != two.size or one.out != two.out:
        raise NNJError(
            f"x1 and x2 are pairs of samples; found {one.n} and {two.n} samples of {one.size} and "
            f"{two.size} numbers"
        )


def _unit_cotangents(at: Linearization) -> Iterator[Tensor]:
    """In groups so small that J of a group may stand in memory."""
    of_one = 2 * at.n * at.size * max(4, at.y.dtype.itemsize)  # with M J
    yield from at.basis().split(max(1, at.memory // max(1, of_one)))


def _pulled_back(
    at: Linearization, left: Tensor, m: Tensor | None, right: Tensor, joint: bool = False
) -> Any:
    """J^T M J' for dense J and J', (N, out, in or P): a matrix, or one for each block of
    parameters.
    """
    m_right = times(m, right)
    if at.wrt == "input" or joint:
        return left.mT @ m_right
    blocks = [take(left, index).mT @ take(m_right, index) for index in positions_by_module(at)]
    return blocks[0] if len(blocks) == 1 else blocks
