"""A symmetric matrix over the parameters of a model, as the sum of products over the batches of a
data set.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from nnj.collecting.batches import length, moved, read, scalar
from nnj.collecting.fit import in_eval_mode
from nnj.collecting.fit_over_ranks import unwrapped
from nnj.collecting.loss_reduction import GivenLoss, SummedLoss, reduced
from nnj.distributed.ranks import Ranks
from nnj.errors import NNJError
from nnj.operators.krylov import conjugate_gradients, hutch_plus_plus
from nnj.propagation.called import call, logits_of
from nnj.propagation.linearize import Forwarding, Modules, parameters, parameters_inside
from nnj.recording.extend import batch_axis_of
from nnj.recording.replicas import check_replicas
from nnj.recording.tensor_parallel import check_whole
from nnj.recording.wrappers import check_not_flat


class Given(NamedTuple):
    """A batch: all of it, the target, and what makes the loss of it a part of the data set's."""

    batch: Any
    inputs: Any
    target: Any
    n: int
    loss: SummedLoss | GivenLoss


class DataOperator:
    """A (P, P), symmetric, over the parameters that require grad, flattened one behind the other in
    the order of `parameters()`. Each product reads all data once, in eval mode, and leaves the
    model as it was.

    A subclass must define `products`.

    Args:
        model: any model.
        loss: as `nnj.fit` takes it.
        data: batches as `nnj.fit` takes them, which can be read again and again.
        modules: the parameters of these modules alone.
        scale: "sum" or "mean", as of `nnj.fit`.
        reduction, forward, target: as of `nnj.fit`.
        check: whether the data are read twice at first, to see whether they are the same.
        group: a process group whose ranks each give a part of the data: products are those of all
            of it, on all ranks, with one reduction each. All ranks multiply the same vectors.

    Attributes:
        shape: (P, P).
        dtype, device: of the parameters.

    Errors: `NNJError` for data that can be read once only, or are others the second time (shuffled
    batches are the same but for rounding), and as `nnj.fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Iterable[Any],
        *,
        modules: Modules = None,
        scale: str = "sum",
        reduction: str | None = None,
        forward: Forwarding | None = None,
        target: str | Callable[[Any], Any] | None = None,
        check: bool = True,
        group: Any = None,
    ):
        if scale not in ("sum", "mean"):
            raise NNJError(f"scale={scale!r}, expected 'sum' or 'mean'")
        if isinstance(data, Iterator):
            raise NNJError(
                "an operator reads its data for each product, and an iterator can be read only "
                "once. Give a list of batches or a DataLoader"
            )
        self.loss, self.data, self.scale = loss, data, scale
        self.how = reduction, forward, target
        check_not_flat(model.modules())
        self.model, group = unwrapped(model, group)
        model = self.model
        self.group = group
        self.ranks = None if group is None else Ranks(group, f"nnj.{type(self).__name__}")
        self.modules = None if modules is None else _listed(modules)
        inside = None if self.modules is None else parameters_inside(model, self.modules)
        self.params = [p for p in parameters(model) if inside is None or p in inside]
        if not self.params:
            raise NNJError("no parameter of the model (or of modules=) requires grad")
        check_whole(f"nnj.{type(self).__name__}", self.params)
        first = self.params[0]
        if any(p.dtype != first.dtype or p.device != first.device for p in self.params):
            raise NNJError("an operator is over parameters of one dtype on one device")
        self.dtype, self.device = first.dtype, first.device
        self.sizes = [p.numel() for p in self.params]
        self.shape = sum(self.sizes), sum(self.sizes)
        self.total = 1.0
        if self.ranks is not None:
            check_replicas(self.ranks, model)
        if check or scale == "mean":
            self._check_data(check)

    # -- must be defined ---------------------------------------------------------------------------

    def products(self, given: Given, v: Tensor) -> Tensor:
        """The share of a batch in A v, (k, P), for v of (k, P)."""
        raise NotImplementedError(f"{type(self).__name__} must define products")

    # -- what it is --------------------------------------------------------------------------------

    @property
    def T(self) -> Self:
        """Itself: it is symmetric."""
        return self

    def __matmul__(self, v: Tensor) -> Tensor:
        """A v for v of (P,) or (P, k): one reading of the data."""
        size = self.shape[0]
        if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != size:
            what = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise NNJError(f"{what} is no vector of this operator: give (P,) or (P, k), P = {size}")
        if v.dtype != self.dtype or v.device != self.device:
            raise NNJError(f"v is {v.dtype} on {v.device}, expected {self.dtype} on {self.device}")
        columns = (v[None] if v.dim() == 1 else v.mT).contiguous()
        found = self._over_ranks(lambda: self._product(columns), v).mT
        found = found if self.total == 1 else found / self.total
        return found[:, 0] if v.dim() == 1 else found

    def _product(self, v: Tensor) -> Tensor:
        """That of the data that are here, (k, P)."""
        total: Tensor | None = None
        for batch in self._batches() if len(v) else ():
            share = self.products(batch, v)
            total = share if total is None else total.add_(share)
        return torch.zeros_like(v) if total is None else total

    def at_parameters(self, v: Tensor) -> list[Tensor]:
        """v of (P,), as it is at each parameter."""
        parts = zip(v.split(self.sizes), self.params, strict=True)
        return [t.reshape(p.shape) for t, p in parts]

    def flat(self, grads: Sequence[Tensor | None], out: Tensor) -> None:
        """Write what stands at parameters into out, of (P,); zeros for None."""
        for g, t in zip(grads, out.split(self.sizes), strict=True):
            t.zero_() if g is None else t.copy_(g.flatten())

    def _over_ranks(self, product: Callable[[], Tensor], v: Tensor) -> Tensor:
        """The sum over ranks of the products of each one's data with v.

        Errors: `NNJError`, on all ranks, for that of any, and where they multiply other vectors.
        """
        if self.ranks is None:
            return product()
        print_of = [*v.shape, float(v.sum()), float(v.abs().sum())]
        found, notes = self.ranks.agreed(product, lambda _: print_of)
        near = 1e-4 * print_of[-1]  # ranks may have rounded in other ways
        for rank, note in enumerate(notes):
            same = [abs(a - b) <= near for a, b in zip(note, notes[0], strict=False)]
            if len(note) != len(notes[0]) or not all(same):
                raise NNJError(
                    f"rank {rank} multiplies another vector than rank 0: all ranks of a group give "
                    "the same (draw it with the same seed, or broadcast it)"
                )
        return self.ranks.sums([found])[0]

    def trace(self, samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The sum of the diagonal, (): exact, or with `samples` an unbiased estimate from as many
        products (Hutch++).
        """
        if samples is None:
            return self.diagonal().sum()
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise NNJError(f"samples={samples!r}: the number of products is at least 1")
        generator = self._same_on_ranks(generator)
        like = torch.zeros(0, dtype=self.dtype, device=self.device)
        return hutch_plus_plus(self.__matmul__, like, self.shape[0], samples, generator)

    def diagonal(self) -> Tensor:
        """diag(A), (P,), by P products."""
        size, found = self.shape[0], []
        for start in range(0, size, _COLUMNS):
            k = min(_COLUMNS, size - start)
            unit = torch.zeros(size, k, dtype=self.dtype, device=self.device)
            unit.diagonal(-start).fill_(1)
            found.append((self @ unit)[start : start + k].diagonal())
        return torch.cat(found)

    def solve(
        self,
        v: Tensor,
        damping: float = 0.0,
        tolerance: float = 1e-5,
        iterations: int = 1000,
    ) -> Tensor:
        """(A + damping I)^-1 v for v of (P,) or (P, k), by conjugate gradients.

        Errors: `NNJError` where A + damping I is not positive definite, or has not converged.
        """
        product = lambda x: self @ x + damping * x
        b = v[:, None] if v.dim() == 1 else v
        found, _ = conjugate_gradients(product, b, tolerance, iterations)
        return found[:, 0] if v.dim() == 1 else found

    # -- through SciPy -----------------------------------------------------------------------------

    def scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` of it, on arrays of numpy in its dtype.

        Errors: `NNJError` if SciPy is not installed (the extra "scipy").
        """
        linalg = _scipy("scipy.sparse.linalg")
        numpy = importlib.import_module("numpy")
        dtype = numpy.dtype(str(self.dtype).removeprefix("torch."))

        def product(v: Any) -> Any:
            t = torch.from_numpy(numpy.ascontiguousarray(v, dtype=dtype)).to(self.device)
            return (self @ t).cpu().numpy()

        flat = lambda v: product(v.reshape(-1))
        return linalg.LinearOperator(
            self.shape, dtype=dtype, matvec=flat, rmatvec=flat, matmat=product, rmatmat=product
        )

    def eigsh(self, k: int = 6, which: str = "LA", **options: Any) -> tuple[Tensor, Tensor]:
        """k eigenvalues (k,), ascending, and eigenvectors (P, k), by `scipy.sparse.linalg.eigsh`;
        "LA" are the largest.
        """
        if self.ranks is not None:  # all of them begin at the same vector
            begin = torch.randn(self.shape[0], generator=self._same_on_ranks(None))
            options.setdefault("v0", begin.numpy())
        found = _scipy("scipy.sparse.linalg").eigsh(self.scipy(), k=k, which=which, **options)
        values, vectors = (torch.from_numpy(t).to(self.device) for t in found)
        order = values.argsort()
        return values[order], vectors[:, order]

    def spectral_density(
        self,
        points: Tensor,
        *,
        width: float | None = None,
        steps: int = 50,
        samples: int = 5,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The density of the eigenvalues at `points`, which integrates to one, smoothed by a
        Gaussian of `width` (by default a hundredth of the range of points): stochastic Lanczos
        quadrature (Ghorbani et al. 2019), of `steps` products for each of `samples` draws.
        """
        linalg, generator = _scipy("scipy.linalg"), self._same_on_ranks(generator)
        width = float(points.max() - points.min()) / 100 if width is None else width
        density = torch.zeros_like(points, dtype=torch.float64)
        for _ in range(samples):
            alpha, beta = self._lanczos(min(steps, self.shape[0]), generator)
            nodes, vectors = linalg.eigh_tridiagonal(alpha.numpy(), beta.numpy())
            away = points.double().cpu()[:, None] - torch.from_numpy(nodes)
            bell = torch.exp(-((away / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
            density += (bell @ torch.from_numpy(vectors[0] ** 2)).to(density.device)
        return (density / samples).to(points.dtype)

    def _same_on_ranks(self, generator: torch.Generator | None) -> torch.Generator | None:
        """A generator that draws the same on all ranks, where none is given."""
        if self.ranks is None or generator is not None:
            return generator
        self.ranks.meet()
        seeds = self.ranks.notes(int(torch.randint(2**62, ())))
        return torch.Generator().manual_seed(seeds[0])

    def _lanczos(self, steps: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The diagonal and the one beside it of A in a Krylov space, orthogonalised fully."""
        device = self.device if generator is None else generator.device
        v = torch.randn(self.shape[0], generator=generator, dtype=self.dtype, device=device)
        v = (v / v.norm()).to(self.device)
        basis, alpha, beta = [v], list[float](), list[float]()
        for _ in range(steps):
            w = self @ basis[-1]
            alpha.append(float(w @ basis[-1]))
            space = torch.stack(basis, 1)
            for _ in range(2):
                w = w - space @ (space.mT @ w)
            size = float(w.norm())
            if size <= 1e-6 * max(map(abs, alpha)) or len(alpha) == steps:
                break
            beta.append(size)
            basis.append(w / size)
        return torch.tensor(alpha).double(), torch.tensor(beta[: len(alpha) - 1]).double()

    # -- the data ----------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Given]:
        reduction, forward, target = self.how
        axis = batch_axis_of(self.model)
        if axis != 0:
            raise NNJError("an operator is of models with their samples in axis 0")
        with (
            in_eval_mode(self.model),
            reduced(self.loss, reduction, self.device, axis) as loss,
            torch.enable_grad(),
        ):
            for batch in self.data:
                batch = moved(batch, self.device)
                inputs, wanted = read(batch, forward, target)
                n = length(inputs, axis)
                if n:
                    yield Given(batch, inputs, wanted, n, loss)

    def output(self, given: Given) -> Tensor:
        """Of the model."""
        forward = self.how[1]
        if forward is not None:
            found = forward(self.model, given.batch)
        else:
            found = logits_of(call(self.model, given.inputs))
        result: Tensor = found
        return result

    def value(self, given: Given, output: Tensor) -> Tensor:
        """The loss of a batch, of which the sum over batches is that of the data set."""
        found = scalar(given.loss.module(output, given.target), given.loss.name)
        return given.loss.factor(given.n) * found

    def _check_data(self, twice: bool) -> None:
        """Read the data, for what a mean divides by; and again, whether they are the same.

        Errors: `NNJError` for no data, or others the second time.
        """
        first = self._read_by_all()
        if first[2] == 0:
            raise NNJError("the data have no samples")
        if self.scale == "mean":
            if not first[1] > 0:
                raise NNJError(f"the mean over this data set divides by {first[1]:g}")
            self.total = first[1]
        if not twice:
            return
        again = self._read_by_all()
        tolerance = math.sqrt(torch.finfo(self.dtype).eps)
        same = torch.allclose(first[0], again[0], rtol=tolerance, atol=tolerance * _size(first[0]))
        if not same or first[1:] != again[1:]:
            raise NNJError(
                "the data, or the model, are others when they are read again (the loss, the "
                "gradient, or the number of samples differs), so that products are not those of "
                "one matrix. Give the same batches each time, without random augmentation, or "
                "check=False"
            )

    def _read_by_all(self) -> tuple[Tensor, float, int]:
        """The same over all ranks."""
        if self.ranks is None:
            return self._read()
        mine, notes = self.ranks.agreed(self._read, lambda found: found[1:])
        (flat,) = self.ranks.sums([mine[0]])
        return flat, sum(total for total, _ in notes), sum(samples for _, samples in notes)

    def _read(self) -> tuple[Tensor, float, int]:
        """The loss with its gradient, what a mean divides by, and the number of samples."""
        value = torch.zeros((), dtype=self.dtype, device=self.device)
        grads = [torch.zeros_like(p) for p in self.params]
        total, samples = 0.0, 0
        for given in self._batches():
            output = self.output(given)
            given.loss.weight(output, given.target, given.n)
            share = self.value(given, output)
            found = torch.autograd.grad(share, self.params, allow_unused=True)
            value = value + share.detach()
            grads = [g if f is None else g + f for g, f in zip(grads, found, strict=True)]
            if self.scale == "mean":
                total += float(given.loss.total(output.detach(), given.target, given.n))
            samples += given.n
        return torch.cat([value[None], *(g.flatten() for g in grads)]), total, samples

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, scale={self.scale!r})"


_COLUMNS = 64  # of the identity at a time


def _size(t: Tensor) -> float:
    return float(t.abs().max())


def _listed(modules: Any) -> list[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else list(modules)


def _scipy(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NNJError(
            "this goes through SciPy, which is not installed. Install the extra: "
            "pip install 'nnj[scipy]'"
        ) from error
