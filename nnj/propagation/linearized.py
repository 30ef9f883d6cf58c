"""nnj.linearize: a model at a point, as a linear map of its parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.matrices.matrix import Dense, Matrix
from nnj.propagation.linearize import Forwarding, Linearization, Modules, linearization
from nnj.propagation.weight_contractions import kernel, pushed_forward
from nnj.propagation.weight_metrics import AnyMetric, DiagonalMetric, MatrixMetric


def linearize(
    model: nn.Module,
    x: Any,
    *,
    modules: Modules = None,
    forward: Forwarding | None = None,
    memory: int = 2**28,
) -> Linearized:
    """A model at x, as the linear map J = dy/dw of its parameters: one forward pass, of which all
    products are then made.

    >>> at = nnj.linearize(model, x)
    >>> mean, covariance = at.y, at.covariance(fit.matrix("kfac").inverse(prior))

    Args:
        model: extended or not; in the mode in which it is, and left as it was.
        x: a tensor, a tuple of arguments, or a dict of named ones.
        modules: J in the parameters of these modules alone.
        forward: `forward(model, x)` gives the output. By default it is what the model gives, or its
            `.logits`.
        memory: bytes that columns may take on their way back, with what is kept of them: where
            they are more, `covariance`, `variance` and `kernel` send them in chunks. Of the first
            and the last every two chunks meet, so that some go several times.

    Errors: as those of `nnj.jacobian`; `NNJError` for modules of another model.
    """
    return Linearized(linearization(model, x, "weight", modules, forward, memory))


class Linearized:
    """J = dy/dw of each sample, for N samples with C outputs each and P entries of all parameters
    that require grad, flattened one behind the other in the order of `parameters()`.

    J itself is formed by `jacobian` and `vjp` alone; all else takes thin factors of it. A metric M
    on the parameters is a vector (P,) for a diagonal, a matrix (P, P), or one of `nnj.matrices`
    over these parameters or more of the model's; None is the identity.

    Attributes:
        y: the output, (N, *outputs).
    """

    def __init__(self, at: Linearization[Any]):
        self._at = at
        names = {p: name for name, p in at.module.named_parameters()}
        self._names: dict[Tensor, str] = {p: names[p] for p in at.params}

    def __repr__(self) -> str:
        at = self._at
        return f"Linearized({at.n} samples, {at.out} outputs of each, {at.size} parameters)"

    @property
    def y(self) -> Tensor:
        return self._at.y

    @property
    def names(self) -> list[str]:
        """Of the parameters, in order."""
        return list(self._names.values())

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (N, *outputs), for v of (P,), or (N, P) with one for each sample."""
        at = self._at
        self._check("v", v, [(at.size,), (at.n, at.size)])
        found = at.jvp(v[None, None] if v.dim() == 1 else v[None])
        return found.reshape(at.n, *at.outputs)

    def vjp(self, u: Tensor) -> Tensor:
        """u J of each sample, (N, P), for u of the shape of y, or (N, C)."""
        at = self._at
        self._check("u", u, [(at.n, *at.outputs), (at.n, at.out)])
        return at.vjp(u.reshape(1, at.n, *at.outputs))[0]

    def jacobian(self) -> Tensor:
        """J, (N, C, P)."""
        return self._at.dense().contiguous()

    def covariance(self, M: Any = None, *, diag: Tensor | None = None) -> Tensor:
        """J M J^T of each sample, (N, C, C).

        Args:
            M: a metric.
            diag: (N, P) in its place, a diagonal for each sample.
        """
        return pushed_forward(self._at, self._metric(M, diag), to_diag=False)

    def variance(self, M: Any = None, *, diag: Tensor | None = None) -> Tensor:
        """The diagonal of `covariance`, (N, C), of which no more is formed."""
        return pushed_forward(self._at, self._metric(M, diag), to_diag=True)

    def kernel(self, other: Linearized | None = None, M: Any = None) -> Tensor:
        """J M J'^T between every two samples, (N, C, N', C'): of M = I the tangent kernel.

        Args:
            other: at other inputs, in the same parameters; by default this one.
            M: a metric.

        Errors: `NNJError` for another model's.
        """
        there = self if other is None else other
        if list(map(id, there._at.params)) != list(map(id, self._at.params)):
            raise NNJError(
                "a kernel is between a model at two inputs, in the same parameters. Linearise both "
                "with the same model and modules="
            )
        return kernel(self._at, there._at, self._metric(M, None))

    def _metric(self, m: Any, diag: Tensor | None) -> AnyMetric:
        at = self._at
        if diag is not None:
            if m is not None:
                raise NNJError("diag= takes the place of M. Give one of them")
            self._check("diag", diag, [(at.n, at.size)])
            return DiagonalMetric.of(at, diag)
        if m is None:
            return DiagonalMetric()
        if isinstance(m, Matrix):
            return self._of_matrix(m)
        self._check("M", m, [(at.size,), (at.size, at.size)])
        if m.dim() == 1:
            return DiagonalMetric.of(at, m.expand(at.n, -1))
        shapes = {name: tuple(p.shape) for p, name in self._names.items()}
        return MatrixMetric(Dense(shapes, m), self._names)

    def _of_matrix(self, m: Matrix) -> AnyMetric:
        mine = {name: tuple(p.shape) for p, name in self._names.items()}
        theirs = m.layout.shapes
        missing = [name for name, shape in mine.items() if theirs.get(name) != shape]
        if missing:
            raise NNJError(
                f"M says nothing of {', '.join(missing[:5])}, or is of other shapes there. Give a "
                "matrix over all parameters in which the model is linearised, or name modules="
            )
        self._check_like("M", m)
        if len(theirs) > len(mine):
            m = m.restricted(list(mine))
        return MatrixMetric(m, self._names)

    def _check(self, name: str, t: Any, shapes: list[tuple[int, ...]]) -> None:
        if not isinstance(t, Tensor):
            raise NNJError(f"{name} is {type(t).__name__}, expected a tensor")
        if tuple(t.shape) not in shapes:
            expected = " or ".join(str(s) for s in dict.fromkeys(shapes))
            raise NNJError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
        self._check_like(name, t)

    def _check_like(self, name: str, t: Tensor | Matrix) -> None:
        y = self._at.y
        if t.dtype != y.dtype or t.device != y.device:
            raise NNJError(f"{name} is {t.dtype} on {t.device}, expected {y.dtype} on {y.device}")
