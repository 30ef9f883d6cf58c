"""check_model: what nnj collects at a user's model, beside brute force by autograd in float64; and
which rules took part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnj.collecting.collect import collect
from nnj.errors import NNJError
from nnj.loss_hessian.base import LossHessian
from nnj.matrices.matrix import Matrix
from nnj.recording.extend import batch_axis_of, copied, extend
from nnj.recording.tensor_parallel import check_whole
from nnj.recording.wrappers import check_not_flat, inside_wrapper
from nnj.registry.loss_rules import hessian_of_loss, reference_of_loss
from nnj.testing.check_layer import check_layer
from nnj.testing.compare import double
from nnj.testing.describe import Line, call_with, lines, text
from nnj.testing.sample_order import NEAR, samples_of_entries

DRAWS = 2
LARGEST_BLOCK = 2000  # parameters of a module whose full block is compared
EXACT = 1e-8  # of the entry; NEAR of the largest one
# what may be left of a zero, of the largest entry anywhere; where J is squared, so is this
ROUNDING = 1e-13
Row = tuple[str, str, Any, Tensor]  # quantity, path, parameter or module, brute force


@dataclass
class ModelReport:
    """What `check_model` has found; `print` it.

    Attributes:
        samples: the number of samples.
        errors: the largest error of each quantity, relative to the largest entry at its parameter
            or module.
        rules: a line for each module: path, class, rule, plugin, and why a rule was not taken, as
            `python -m nnj MODEL` has them.
        left_out: modules whose `ggn_block` was too large to be compared.
        refused: quantities that nnj refuses on this model, with its reason.
        kfac_errors: by module how far `kfac` is from `ggn_block` on this batch, |G - KFAC| / |G| in
            the Frobenius norm. It is an approximation, and this is no fault.
    """

    samples: int
    errors: dict[str, float] = field(default_factory=dict)
    rules: list[Line] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    kfac_errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        told = [
            f"{self.samples} samples, independent of one another. What was collected agrees with "
            "brute force:"
        ]
        told += [
            f"  {name:12} largest relative error {error:.0e}" for name, error in self.errors.items()
        ]
        told += [
            f"  (the ggn_block of '{path}' is too large to be compared)" for path in self.left_out
        ]
        told += [f"  {name:12} refused: {reason}" for name, reason in self.refused.items()]
        if self.kfac_errors:
            told.append("How far kfac, an approximation, is from ggn_block, |G - KFAC| / |G|:")
            told += [f"  {path or '(model)':12} {e:.2g}" for path, e in self.kfac_errors.items()]
        return "\n".join([*told, "", text(self.rules)])


def check_model(
    model: nn.Module,
    loss_func: Any,
    x: Any,
    *targets: Any,
    reference: Callable[..., Tensor] | None = None,
) -> ModelReport:
    """Check every quantity of nnj on *this* model at `x` against J^T H J from dense derivatives by
    autograd, in float64.

    `ggn_diag`, `ggn_block` and `batch_grad` exactly; `ggn_diag_mc` under the signs that a generator
    gives. Each sample is also run through the model alone, which must give what it gives among the
    others. Model and loss are copied. The model (without DistributedDataParallel around it) takes
    x (a tensor; a tuple of arguments; a dict of named ones) and gives one tensor, the loss takes
    (output, *targets) and gives a scalar. The dense Jacobian has (entries of the output) x (number
    of parameters) entries: take a small batch.

    Args:
        reference: `reference(loss, output, *targets)` is what is differentiated twice, by default
            the loss: see `check_loss`.

    Returns: a report with the rule of each module, to be printed.

    Errors: AssertionError naming the quantity, the parameter or module, the size of the error, and
    each layer whose rule does not pass `check_layer`; or samples that influence one another, or
    that the model gives in another order.
    `NNJError` where nnj refuses the model (`ggn_diag`; what else it refuses is in the report)."""

    axis = batch_axis_of(model)
    model = inside_wrapper(model)
    check_not_flat(model.modules())
    check_whole("nnj.testing.check_model", model.parameters())
    model, x, targets = _doubled(model), double(x), double(targets)
    loss = _doubled(loss_func) if isinstance(loss_func, nn.Module) else loss_func
    found = extend(copied(model), batch_axis=axis)
    extended = extend(copied(loss) if isinstance(loss, nn.Module) else loss, loss=True)
    run = reference or reference_of_loss(extended)
    truth = _BruteForce(model, lambda z: run(extended, z, *targets), x, axis)
    value = extended.forward(truth.output, *targets).detach()
    assert torch.allclose(truth.value, value), (
        f"the reference is {float(truth.value):.6g} where the loss is {float(value):.6g}"
    )
    blocks = [path for path, m in found.named_modules() if path in truth.own and not _large(m)]
    report = ModelReport(truth.n, left_out=[path for path in truth.own if path not in blocks])
    report.rules = lines(model, x)

    options: dict[str, dict[str, Any]] = {
        "ggn_diag": {},
        "batch_grad": {},
        "ggn_diag_mc": {"samples": DRAWS, "generator": torch.Generator().manual_seed(0)},
    }
    if blocks:
        tops = [found.get_submodule(path) for path in blocks]
        options |= {"ggn_block": {"modules": tops}, "kfac": {"modules": tops}}
    _collect(report, found, x, lambda out: extended(out, *targets), options)
    hessian = hessian_of_loss(extended, torch.ones_like(truth.value), truth.output, *targets)
    points = list(_points(truth, found, hessian))
    true_blocks = list(_blocks(truth, found, blocks))
    wrong = _wrong(report, points, true_blocks, truth.rounding)
    report.kfac_errors = _kfac_errors(true_blocks)
    if wrong:
        raise AssertionError("\n".join(wrong + _faults(found, x, report.rules)))
    return report


def _wrong(
    report: ModelReport, points: list[Row], blocks: Iterable[Row], rounding: float
) -> list[str]:
    """What differs from brute force by more than rounding; the errors are written into the
    report.
    """
    wrong = []
    exact, near = max(EXACT, rounding), max(NEAR, rounding)
    largest: dict[str, float] = {}
    for quantity, _, _, expected in points:
        largest[quantity] = max(largest.get(quantity, 0.0), float(expected.abs().max()))
    # no entry of a positive semi-definite matrix is beyond its diagonal
    largest["ggn_block"] = largest.get("ggn_diag", 0.0)
    for quantity, path, holder, expected in itertools.chain(points, blocks):
        if quantity in report.refused:
            continue
        value = getattr(holder, quantity, None)
        value = torch.zeros_like(expected) if value is None else value
        off, size = (value - expected).abs(), float(expected.abs().max())
        zero = largest[quantity] * (ROUNDING if quantity == "batch_grad" else ROUNDING**2)
        report.errors[quantity] = max(
            report.errors.get(quantity, 0.0), float(off.max()) / max(size, NEAR)
        )
        if not bool((off <= exact * expected.abs() + near * max(size, NEAR) + zero).all()):
            wrong.append(
                f"{quantity} of '{path}' is wrong: off by {float(off.max()):.3g}, where the "
                f"largest entry is {size:.3g}"
            )
    return wrong


def _collect(
    report: ModelReport,
    found: nn.Module,
    x: Any,
    loss: Callable[[Any], Tensor],
    options: dict[str, dict[str, Any]],
) -> None:
    """Each quantity by itself, so that one that is refused does not take the others with it."""
    for quantity, given in options.items():
        try:
            with collect(quantity, **{"verify": False, **given}):  # this is the comparison
                loss(call_with(found, x)).backward()
        except NNJError as error:
            if quantity == "ggn_diag":
                raise
            report.refused[quantity] = str(error)
    if "batch_grad" in report.refused:
        report.refused["ggn_diag_mc"] = (
            "not compared, since draws are summed over rows that nnj cannot tell apart"
        )


class _BruteForce:
    """Dense derivatives by autograd, with the sample to which each entry of the output belongs.

    Attributes:
        j: {name of a parameter: the Jacobian of all entries of the output, (D, P)}.
        g, h: the gradient (D,) and the Hessian (D, D) of the loss in these entries.
        rounding: by what results may differ, where the model gives less than double precision.
        sample: (D,), the sample of each of them; n: how many samples there are.
        own: {path of a module: the names of its own parameters}, where it has some.
    """

    def __init__(self, model: nn.Module, scalar_of: Callable[[Tensor], Tensor], x: Any, axis: int):
        out = call_with(model, x)
        if not isinstance(out, Tensor):
            raise TypeError(
                "check_model takes a model that gives one tensor, and this one gives "
                f"{type(out).__name__}. Wrap it in a module that gives the tensor which the loss "
                "takes"
            )
        self.output = out.detach()
        single = out.dtype != torch.float64
        self.rounding = torch.finfo(out.dtype).eps ** 0.5 if single else 0.0
        self.n, self.sample = samples_of_entries(model, x, self.output, axis)
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.j = _jacobian(out, params)
        self._differentiate(lambda z: scalar_of(z.reshape(out.shape)))
        # a parameter that is shared has its first name
        names = {p: name for name, p in params.items()}
        own = {
            path: [names[p] for p in m.parameters(recurse=False) if p in names]
            for path, m in model.named_modules()
        }
        self.own = {path: found for path, found in own.items() if found}

    def _differentiate(self, scalar: Callable[[Tensor], Tensor]) -> None:
        z = self.output.flatten().clone().requires_grad_()
        value = scalar(z)
        if value.dim() > 0:
            raise TypeError(
                f"check_model takes a loss that gives a scalar, and this one gives "
                f"{tuple(value.shape)}"
            )
        self.value, self.g = value.detach(), torch.autograd.grad(value, z)[0].double()
        self.h: Tensor = torch.autograd.functional.hessian(scalar, z.detach()).double()
        apart = self.h * (self.sample[:, None] != self.sample)
        assert float(apart.abs().max()) <= max(NEAR, self.rounding) * float(self.h.abs().max()), (
            "the loss couples samples: its Hessian between them is up to "
            f"{float(apart.abs().max()):.3g}"
        )

    def per_sample(self, v: Tensor, j: Tensor) -> Tensor:
        """v^T J with the rows of each sample apart: (N, P)."""
        share = v.new_zeros(self.n, len(v))
        share[self.sample, torch.arange(len(v))] = v
        return share @ j


def _jacobian(out: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """(D, P) for each parameter, a row for each entry of the output."""
    rows = [
        torch.autograd.grad(entry, list(params.values()), retain_graph=True, materialize_grads=True)
        for entry in out.flatten()
    ]
    parts = zip(*rows, strict=True)
    return {
        name: torch.stack(part).reshape(len(rows), -1)
        for name, part in zip(params, parts, strict=True)
    }


def _points(truth: _BruteForce, found: nn.Module, hessian: LossHessian) -> Iterator[Row]:
    """What stands on parameters."""
    (drawn,) = hessian.to_outputs(hessian.sample(DRAWS, torch.Generator().manual_seed(0)))
    for name, p in found.named_parameters():
        if name in truth.j:
            j = truth.j[name]
            yield "ggn_diag", name, p, ((truth.h @ j) * j).sum(0).reshape(p.shape)
            yield "batch_grad", name, p, truth.per_sample(truth.g, j).reshape(truth.n, *p.shape)
            rows = [truth.per_sample(v.flatten().to(j.dtype), j) for v in drawn]
            squares = sum(row.square().sum(0) for row in rows) / DRAWS
            yield "ggn_diag_mc", name, p, squares.reshape(p.shape)  # type: ignore[union-attr]


def _blocks(truth: _BruteForce, found: nn.Module, blocks: list[str]) -> Iterator[Row]:
    """What stands on modules."""
    for path in blocks:
        j = torch.cat([truth.j[name] for name in truth.own[path]], 1)
        yield "ggn_block", path, found.get_submodule(path), j.T @ truth.h @ j


def _kfac_errors(blocks: list[Row]) -> dict[str, float]:
    """The Frobenius norm of G - KFAC as a part of that of G, for each module that has both."""
    errors = {}
    for _, path, module, block in blocks:
        kfac = getattr(module, "kfac", None)
        if isinstance(kfac, Matrix) and bool(block.any()):
            errors[path] = float((kfac.dense() - block).norm() / block.norm())
    return errors


def _large(module: nn.Module) -> bool:
    """Whether a block in it would be too large to be compared."""
    return any(
        sum(p.numel() for p in m.parameters(recurse=False)) > LARGEST_BLOCK
        for m in module.modules()
    )


def _faults(found: nn.Module, x: Any, rules: list[Line]) -> list[str]:
    """What `check_layer` says of the layers that rules took."""
    points: dict[str, Tensor] = {}

    def noting(path: str) -> Any:
        return lambda m, args: points.setdefault(path, args[0].detach().clone())

    handles = [
        found.get_submodule(line.path).register_forward_pre_hook(noting(line.path))
        for line in rules
        if line.plugin
    ]
    call_with(found, x)
    for handle in handles:
        handle.remove()
    said = []
    for path, point in points.items():
        try:
            check_layer(copied(found.get_submodule(path)), point, fallback=True)
        except AssertionError as error:
            said.append(f"layer '{path}': {error}")
    return said or ["check_layer finds no fault in the rules of its layers: please report this"]


def _doubled(module: nn.Module) -> nn.Module:
    """A copy in float64; `Module.double` would leave complex tensors as they are."""
    module = copied(module).double()
    for t in [*module.parameters(), *module.buffers()]:
        t.data = double(t)
    return module
