"""d² loss / d output², of any loss, by differentiating it twice with autograd, and verifying that
rows are independent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.loss_hessian.base import (
    WRITE_A_RULE,
    LossHessian,
    check_outputs,
    infinite,
    per_row,
    rows_of,
)
from nnj.loss_hessian.finite_difference import HookWatch, has_foreign_node, is_differentiated
from nnj.loss_hessian.structured import BlockHessian, DiagonalHessian, SoftmaxHessian, largest_of

LIMIT = 4096  # entries of a row, above which no block is built
ENTRIES = 2**29  # of all blocks together, above which none is built


def autodiff_hessian(
    call: Callable[..., Tensor], outputs: Sequence[Tensor], name: str = "the loss", sign: int = 0
) -> LossHessian:
    """The Hessian of any loss, differentiated twice by autograd, in float64 where the loss can be.

    It is diagonal where the loss works on each entry for itself; a (diag(p) - p p^T) where it is
    cross entropy along an axis of the output; else a block for each whole row over all outputs, by
    as many Hessian-vector products as a row has entries. Random vectors verify which it is, and
    that rows do not influence one another.

    Args:
        call: `call(*outputs)` is the scalar that is differentiated, all factors included.
        outputs: detached. Rows are axis 0 where all share it; otherwise, and for a 0-d output,
            there is one row.
        name: of the loss, for errors.
        sign: 1 or -1 for the part of that sign alone, H_+ or H_- of H = H_+ - H_-, both positive
            semi-definite.

    Errors: `NNJError` for outputs that are not real or finite; a loss that is not convex in the
    outputs, couples rows of the batch, draws random numbers, cannot be differentiated twice,
    couples more than 4096 entries in a row, or is linear in log probabilities."""
    outputs = tuple(outputs)
    check_outputs(name, outputs)
    shapes = [t.shape for t in outputs]
    own = functools.reduce(torch.promote_types, [t.dtype for t in outputs], torch.float32)
    n = rows_of(shapes)
    size = sum(per_row(shape, n) for shape in shapes)
    if n * size == 0:
        nothing = torch.zeros(n, size, dtype=own, device=outputs[0].device)
        return DiagonalHessian(nothing, shapes, name)
    asked = _Asked(call, outputs, own, name, (n, size))
    found = _diagonal(asked, sign)
    if found is None:
        found = _cross_entropy(asked, sign)
    return _blocks(asked, sign) if found is None else found


class _Asked:
    """A loss at its outputs, and what random vectors have said of its Hessian: z and H z, with the
    size of the terms from which H z is summed.

    Errors: `NNJError` where the Hessian is not finite, cannot be had, or is zero although that in
    log probabilities is not.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        outputs: Sequence[Tensor],
        own: torch.dtype,
        name: str,
        shape: tuple[int, int],
    ):
        self.outputs, self.own, self.name, self.shape = outputs, own, name, shape
        # its own, and the same on every device
        self.generator = OwnGenerator.seeded(0)
        z = self._normal()
        self.hessian, self.hz = _differentiate(call, outputs, own, name, z)
        if not bool(torch.isfinite(self.hz).all()):
            raise NNJError(infinite(name))
        self.z = z.to(self.hz)
        self.moderate = _moderate(call, outputs, self.hessian)
        _check_log_probabilities(outputs, self.hessian, self.moderate, self.z, name)
        self.scale = torch.maximum(largest_of(self.hz), _size(self.moderate, self.z).to(self.hz))
        double = self.hz.dtype == torch.float64
        self.strict, self.loose = (1e-9, 1e-6) if double else (2e-5, 2e-4)
        bits = torch.randint(0, 2, shape, generator=self.generator, device="cpu")
        self.signs = bits.to(self.z) * 2 - 1

    @property
    def shapes(self) -> list[torch.Size]:
        return [t.shape for t in self.outputs]

    def _normal(self) -> Tensor:
        return torch.randn(*self.shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def another(self) -> tuple[Tensor, Tensor]:
        """Another random vector, and H times it."""
        v = self._normal().to(self.z)
        return v, self.hessian.product(v[None])[0]


def _diagonal(asked: _Asked, sign: int) -> LossHessian | None:
    """H if it is diagonal: with signs s, s * (H s) is its diagonal, which H z verifies."""
    h = asked.signs * asked.hessian.product(asked.signs[None])[0]
    if not _agree(h * asked.z, asked.hz, asked.scale, asked.strict):
        return None
    return DiagonalHessian(_part(h, sign).to(asked.own), asked.shapes, asked.name, asked.scale)


def _cross_entropy(asked: _Asked, sign: int) -> LossHessian | None:
    """H if it is a (diag(p) - p p^T), with p the softmax of the only output along an axis.

    For cross entropy a, the weight of the targets, is the same for any output, so it is found where
    no p vanishes, from H z there; another random vector verifies it at the output itself.
    """
    if len(asked.outputs) > 1 or asked.moderate is None or asked.outputs[0].dim() < 2:
        return None
    v, hv = asked.another()
    output, there = asked.outputs[0].to(v), asked.moderate.leaves[0].detach()
    hz = asked.moderate.product(asked.z[None])[0]
    z, hz, v, hv = (t.reshape(output.shape) for t in (asked.z, hz, v, hv))
    for axis in range(1, output.dim()):
        u = _softmax_product(there, z, axis)
        a = (hz * u).sum(axis, keepdim=True) / u.square().sum(axis, keepdim=True)
        if all(
            _agree(found.flatten(1), expected.flatten(1), asked.scale, asked.strict)
            for found, expected in ((a * u, hz), (a * _softmax_product(output, v, axis), hv))
        ):
            a = _part(a.squeeze(axis), sign).to(asked.own)
            return SoftmaxHessian(asked.outputs[0], a, asked.name, axis)
    return None


def _softmax_product(t: Tensor, v: Tensor, axis: int) -> Tensor:
    """(diag(p) - p p^T) v with p = softmax(t) along an axis."""
    p = t.softmax(axis)
    return p * (v - (p * v).sum(axis, keepdim=True))


def _blocks(asked: _Asked, sign: int) -> LossHessian:
    """H as a block for each row, by as many products as a row has entries. Errors: `NNJError` if
    that is too many, or if rows influence one another.
    """
    n, size = asked.shape
    if size > LIMIT or n * size * size > ENTRIES:
        raise NNJError(
            f"{asked.name}: its Hessian has {n} blocks of {size} x {size}. Differentiated twice, a "
            f"row may have {LIMIT} entries, and all blocks {ENTRIES}. Take a smaller batch, or "
            f"{WRITE_A_RULE} that gives a structure"
        )
    # rows are asked together, each under a sign of its own: H z shows if they are coupled
    matrix = asked.hessian.blocks(asked.signs[:, :1])
    if not _agree((matrix @ asked.z[..., None])[..., 0], asked.hz, asked.scale, asked.loose):
        raise NNJError(
            f"{asked.name} couples rows of the batch: its Hessian has entries between outputs of "
            "different rows, so that no row has a curvature of its own. Use a loss that is a sum "
            "over rows"
        )
    matrix = _part_of_blocks(matrix, sign)[:, None]
    return BlockHessian(matrix, asked.shapes, asked.name, asked.scale, asked.own)


def _part(values: Tensor, sign: int) -> Tensor:
    return (sign * values).clamp(min=0) if sign else values


def _part_of_blocks(matrix: Tensor, sign: int) -> Tensor:
    """Eigenvalues of the other sign are left out, and with them those that are rounding noise."""
    if not sign:
        return matrix
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    noise = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values.abs().amax(-1, keepdim=True)
    kept = torch.where(values.abs() > noise, _part(values, sign), 0.0)
    result: Tensor = (vectors * kept[..., None, :]) @ vectors.mT
    return result


class _Hessian:
    """Hessian-vector products of `call` at outputs of `dtype`; tangents are
    (k, rows, entries of a row).
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        outputs: Sequence[Tensor],
        dtype: torch.dtype,
        n: int,
        everything: bool,
    ):
        mode = _Cast(dtype) if everything else HookWatch()
        with torch.enable_grad(), mode:
            self.leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in outputs]
            self.value, again = (call(*[t.clone() for t in self.leaves]) for _ in range(2))
        # whether a second derivative is known to be that of the first
        self.trusted = not mode.hooked and not has_foreign_node(self.value)
        self.same = torch.allclose(self.value, again, rtol=1e-3, equal_nan=True)
        self.n, self.batched = n, True
        with torch.enable_grad():
            self.gradient = self._flat(self._grad(self.value, None, create_graph=True), ())

    def _grad(self, of: Tensor, v: Tensor | None, **options: bool) -> Sequence[Tensor | None]:
        if not of.requires_grad:
            return [None] * len(self.leaves)
        return torch.autograd.grad(of, self.leaves, v, allow_unused=True, **options)

    def _flat(self, parts: Sequence[Tensor | None], k: tuple[int, ...]) -> Tensor:
        full = [
            t.new_zeros(*k, *t.shape) if g is None else g
            for g, t in zip(parts, self.leaves, strict=True)
        ]
        return torch.cat([g.reshape(*k, self.n, -1) for g in full], -1)

    def product(self, v: Tensor) -> Tensor:
        """H v, all at once; one after the other where torch.vmap cannot."""
        k, v = (v.shape[0],), v.to(self.gradient)
        if self.batched and len(v) > 1:
            try:
                return self._flat(
                    self._grad(self.gradient, v, retain_graph=True, is_grads_batched=True), k
                )
            except RuntimeError:
                self.batched = False
        return torch.stack(
            [self._flat(self._grad(self.gradient, t, retain_graph=True), ()) for t in v]
        )

    def blocks(self, signs: Tensor) -> Tensor:
        """H[r, :, r, :] for each row, (n, size, size): rows are asked together, each under its
        sign.
        """
        n, size = self.gradient.shape
        eye = torch.eye(size, dtype=signs.dtype, device=signs.device)
        parts = eye[:, None].split(max(1, 2**22 // (n * size)))
        return torch.cat([self.product(part * signs) * signs for part in parts]).movedim(0, -1)


class _Cast(HookWatch):
    """Every real tensor that a function is given is cast to a dtype: a loss has targets, weights
    and constants of its own.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        self.hooked = self.hooked or name == "register_hook"
        in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or name.startswith("__i")
            or name == "__setitem__"
        )
        if in_place or name in ("__get__", "__set__") or (kwargs and "out" in kwargs):
            return function(*args, **(kwargs or {}))
        cast = lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
        args, kwargs = tree_map(cast, (args, kwargs or {}))
        return function(*args, **kwargs)


def _differentiate(
    call: Callable[..., Tensor], outputs: Sequence[Tensor], own: torch.dtype, name: str, z: Tensor
) -> tuple[_Hessian, Tensor]:
    """The Hessian and H z in the widest dtype in which the loss can be had, and is what it was."""
    n, failure = z.shape[0], None
    with torch.enable_grad():  # a loss may put hooks on its tensors
        value = call(*[t.detach().requires_grad_().clone() for t in outputs]).detach()
    for dtype, everything in dict.fromkeys([(torch.float64, True), (own, True), (own, False)]):
        try:
            hessian = _Hessian(call, outputs, dtype, n, everything)
            if everything and not _same_value(hessian.value, value):
                continue
            hz = hessian.product(z.to(outputs[0].device, dtype)[None])[0]
        except NNJError:
            raise
        except Exception as error:
            failure = error
            continue
        if not hessian.same:
            raise NNJError(
                f"{name} gives another value each time it is called, so the call that was made has "
                "no Hessian that nnj could compute. Draw random numbers outside of the loss, and "
                "give them as an argument"
            )
        if not hessian.trusted:
            _check_twice(call, hessian, dtype, everything, name)
        return hessian, hz
    raise NNJError(
        f"{name} cannot be differentiated twice by autograd: {type(failure).__name__}: {failure}. "
        f"Remedy: {WRITE_A_RULE}"
    ) from failure


def _check_twice(
    call: Callable[..., Tensor], hessian: _Hessian, dtype: torch.dtype, everything: bool, name: str
) -> None:
    """Errors: `NNJError` if the Hessian is not the derivative of the gradient."""

    def at(outputs: list[Tensor]) -> _Hessian:
        return _Hessian(call, outputs, dtype, hessian.n, everything)

    if not is_differentiated(at, [t.detach() for t in hessian.leaves]):
        raise NNJError(
            f"{name}: differentiating its gradient once more does not give the change of the "
            "gradient that is seen where outputs are moved: a function, a compiled part or a hook "
            "inside detaches it, or computes something else. Compute constants outside of the loss "
            "and give them as arguments; do not put the loss under torch.compile; or "
            f"{WRITE_A_RULE}"
        )


def _same_value(found: Tensor, value: Tensor) -> bool:
    rtol = 4 * torch.finfo(value.dtype).eps ** 0.5
    return not bool(torch.isfinite(value)) or torch.allclose(
        found, value.to(found.dtype), rtol=rtol, atol=0.0
    )


def _moderate(
    call: Callable[..., Tensor], outputs: Sequence[Tensor], hessian: _Hessian
) -> _Hessian | None:
    """The Hessian where outputs are at most 1: a saturated loss is the rounding of terms as large
    as those there.
    """
    largest = torch.stack([largest_of(t) for t in outputs]).max()
    if bool(largest <= 1):
        return hessian
    try:
        return _Hessian(
            call, [t / largest for t in outputs], hessian.gradient.dtype, hessian.n, True
        )
    except Exception:
        return None


def _check_log_probabilities(
    outputs: Sequence[Tensor], hessian: _Hessian, moderate: _Hessian | None, z: Tensor, name: str
) -> None:
    """Errors: `NNJError` if the loss is linear in an output of log probabilities, also where
    outputs are small.
    """
    sizes = [per_row(t.shape, len(z)) for t in outputs]
    for i, t in enumerate(outputs):
        if not any(t.shape[axis] > 1 for axis in SoftmaxHessian.axes(t)):
            continue
        part = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        v = torch.zeros_like(z)
        v[:, part] = z[:, part]
        if bool(hessian.gradient[:, part].any()) and all(
            bool(_size(h, v, part) == 0) for h in (hessian, moderate)
        ):
            raise NNJError(
                f"{name} is linear in log probabilities: its Hessian there is zero, though in what "
                "log_softmax was given it is not. Extend NLLLoss, KLDivLoss or their functions, or "
                "a function of the logits; each term of a sum may be a loss of its own"
            )


def _size(hessian: _Hessian | None, z: Tensor, part: slice = slice(None)) -> Tensor:
    """How large H z is; of an output's part of it. 0 where that is not known, or not finite."""
    if hessian is None:
        return z.new_zeros(())
    try:
        size = largest_of(hessian.product(z[None])[..., part])
    except Exception:
        return z.new_zeros(())
    return torch.where(size.isfinite(), size, 0.0)


def _agree(found: Tensor, expected: Tensor, scale: Tensor, tolerance: float) -> bool:
    """Whether rows are equal, up to `tolerance` of each row and to the rounding of terms as large
    as `scale`.
    """
    floor = 1e3 * torch.finfo(expected.dtype).eps * scale
    return bool(
        (
            (found - expected).abs() <= tolerance * expected.abs().amax(-1, keepdim=True) + floor
        ).all()
    )
