"""y = w z + b, z = (x - mean) / sqrt(var + eps): a diagonal if the statistics are fixed, a
projection if they are x's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nnj


class Standardize(nnj.Jacobian):
    """J = diag(w) r (I - 1 1^T / d - z z^T / d) in each group of d entries,
    r = 1 / sqrt(var + eps), z = (x - mean) r.

    Without `centred`, mean = 0 and the middle term is absent (the root mean square norm).

    Args:
        x: (N, *shape), of which the groups are contiguous.
        groups: the number of groups in one row.
        w: what broadcasts against (N, *shape), or None.
    """

    def __init__(self, x: Tensor, groups: int, eps: float, w: Tensor | None, centred: bool = True):
        super().__init__(x.shape[1:], x.shape[1:], x)
        self.x, self.groups, self.eps, self.w, self.centred = x, groups, eps, w, centred

    @functools.cached_property
    def _point(self) -> tuple[Tensor, Tensor]:
        x = self.x.reshape(self.n, self.groups, -1)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        r = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * r, r

    def z(self) -> Tensor:
        """The standardized input, (N, *shape)."""
        return self._point[0].reshape(self.x.shape)

    def _project(self, t: Tensor) -> Tensor:
        z, r = self._point
        flat = t.reshape(len(t), *z.shape)
        out = torch.addcmul(flat, z, (z * flat).mean(-1, keepdim=True), value=-1)
        if self.centred:
            out -= flat.mean(-1, keepdim=True)
        out *= r
        return out.reshape(t.shape)

    def jvp(self, v: Tensor) -> Tensor:
        return self._project(v) if self.w is None else self._project(v) * self.w

    def vjp(self, u: Tensor) -> Tensor:
        return self._project(u if self.w is None else u * self.w)


def affine(
    m: nn.Module, x: Tensor, z: Callable[[], Tensor], *, last: bool
) -> dict[str, nnj.Jacobian]:
    """dy = dw z;  dy = db at every place."""
    slots: dict[str, nnj.Jacobian] = {}
    for name, by in (("weight", z), ("bias", None)):
        p = getattr(m, name, None)
        if p is not None:
            slots[name] = nnj.ScaleShift(p.shape, x.shape[1:], x, m=by, last=last)
    return slots


def per_channel(p: Any, x: Tensor) -> Any:
    """One number for each channel, shaped to meet (N, C, *places)."""
    return None if p is None else p.detach().reshape(-1, *[1] * (x.dim() - 2))


def fixed(m: Any, x: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = w r dx;  dy = dw z;  dy = db: the statistics are those that the module has stored."""
    mean, r = per_channel(m.running_mean, x), per_channel((m.running_var + m.eps).rsqrt(), x)
    d = r if m.weight is None else r * per_channel(m.weight, x)
    return {
        "input": nnj.Diagonal(d.expand(x.shape)),
        **affine(m, x, lambda: (x - mean) * r, last=False),
    }


def batch_norm(m: nn.BatchNorm2d, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """dy = w r dx, a diagonal, if the statistics are fixed."""
    if m.training or m.running_mean is None or m.running_var is None:
        why = "in training mode" if m.training else "without running statistics"
        remedy = (
            "call model.eval(), or freeze this layer with module.eval()"
            if m.running_mean is not None
            else "use track_running_stats=True and model.eval(), or another norm"
        )
        raise nnj.NNJError(
            f"{type(m).__name__} {why} makes the samples of a batch influence one another, so no "
            f"sample has a Jacobian of its own; {remedy}"
        )
    return fixed(m, x)


def own(
    m: nn.Module,
    x: Tensor,
    groups: int,
    w: Tensor | None,
    *,
    last: bool,
    eps: float,
    centred: bool = True,
) -> dict[str, nnj.Jacobian]:
    """dy = w (I - 1 1^T / d - z z^T / d) r dx;  dy = dw z;  dy = db: the statistics are those of
    each sample.
    """
    j = Standardize(x, groups, eps, w, centred)
    return {"input": j, **affine(m, x, j.z, last=last)}


def trailing(shape: Sequence[int], x: Tensor) -> int:
    """The number of groups in one row if the last axes, of `shape`, are normalized."""
    if len(shape) >= x.dim():
        raise NotImplementedError("it normalizes over the batch axis")
    return x.shape[1 : x.dim() - len(shape)].numel()


def layer_norm(m: nn.LayerNorm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """A group is what the last axes hold."""
    w = None if m.weight is None else m.weight.detach()
    return own(m, x, trailing(m.normalized_shape, x), w, last=True, eps=m.eps)


def rms_norm(m: nn.RMSNorm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """A group is what the last axes hold, and its mean is taken to be zero."""
    w = None if m.weight is None else m.weight.detach()
    eps = torch.finfo(x.dtype).eps if m.eps is None else m.eps
    return own(m, x, trailing(m.normalized_shape, x), w, last=True, eps=eps, centred=False)


def group_norm(m: nn.GroupNorm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """A group is C / G channels with all their places."""
    return own(m, x, m.num_groups, per_channel(m.weight, x), last=False, eps=m.eps)


def instance_norm(m: nn.InstanceNorm2d, x: Tensor, y: Tensor, axes: int) -> dict[str, nnj.Jacobian]:
    """A group is one channel with all its places; in eval with stored statistics it is BatchNorm's
    diagonal.
    """
    if x.dim() != axes + 2:
        raise NotImplementedError("a norm of one sample without a batch axis")
    if m.track_running_stats and not m.training:
        return fixed(m, x)
    return own(m, x, x.shape[1], per_channel(m.weight, x), last=False, eps=m.eps)


def local_response(m: nn.LocalResponseNorm, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    """y = x q^-b, q = k + a (A x^2) with A the mean over a window of channels: dy = q^-b dx - 2 a b
    x q^(-b - 1) A (x dx).
    """
    if x.dim() < 3:
        raise NotImplementedError("a norm of one sample without a batch axis")
    c = torch.arange(x.shape[1], device=x.device)
    ahead = c - c[:, None]  # entry (c, c'): how far channel c' is ahead of c
    mean = ((ahead >= -(m.size // 2)) & (ahead <= (m.size - 1) // 2)).to(x.dtype) / m.size

    def along(a: Tensor, v: Tensor) -> Tensor:
        """A v on the axis of channels."""
        return (v.movedim(-x.dim() + 1, -1) @ a.mT).movedim(-1, -x.dim() + 1)

    q = m.k + m.alpha * along(mean, x.square())
    near, far = q.pow(-m.beta), 2 * m.alpha * m.beta * x * q.pow(-m.beta - 1)
    forward = lambda v: near * v - far * along(mean, x * v)
    adjoint = lambda u: near * u - x * along(mean.mT, far * u)
    return {"input": nnj.LinearMap(forward, adjoint, x.shape[1:], y.shape[1:], x, per_row=True)}


@nnj.hookimpl
def nnj_register_layers(register: nnj.RegisterLayer) -> None:
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        register(cls, batch_norm, uses="x")
    for axes, instance in enumerate(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), start=1
    ):
        register(instance, functools.partial(instance_norm, axes=axes), uses="x")
    register(nn.LayerNorm, layer_norm, uses="x")
    register(nn.RMSNorm, rms_norm, uses="x")
    register(nn.GroupNorm, group_norm, uses="x")
    register(nn.LocalResponseNorm, local_response, uses="x")
