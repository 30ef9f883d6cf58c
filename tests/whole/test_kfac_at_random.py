"""KFAC of layers at random against sums over places that are formed one by one, from torch.func.

Of one module, with u[w] the derivative of output channel o(w) in entry w of a parameter,

    expand   G[w, w'] = (sum_{n,l} H_y[(n,l,o), (n,l,o')]) (mean_{n,l} u[w] u[w'])
    reduce   the same with a sum of both over l in H_y, and the mean of u over l

where o and o' are of one group, and H_y is the GGN in the output of that module.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import nnj
from tests.support.oracle import close
from tests.support.slow import few

SEEDS = 30
MATRIX_PRODUCTS = nn.Linear, nn.Embedding, nn.modules.conv._ConvNd


class Draft(NamedTuple):
    """A module in a model: what it is given by a stem and what a head makes of it.

    Attributes:
        make: the module.
        x: makes so many samples.
        channel: the axis of channels of its output.
        groups: of channels.
        twice: whether it is called twice, one time after the other.
    """

    make: Callable[[], nn.Module]
    x: Callable[[int], Tensor]
    channel: int = 1
    groups: int = 1
    twice: bool = False


def drafts(r: random.Random) -> Draft:
    """One at random."""
    kinds = ["linear", "conv", "transposed", "embedding", "tied", "norm"]
    bias, kind = r.random() < 0.8, r.choice(kinds)
    if kind == "norm":
        return norms(r)
    if kind in ("linear", "tied"):
        axes, i = [r.randint(1, 3) for _ in range(r.randint(0, 2))], r.randint(1, 4)
        o = i if kind == "tied" else r.randint(1, 4)
        make = lambda: nn.Linear(i, o, bias=bias)
        return Draft(make, lambda n: torch.randn(n, *axes, i), -1, twice=kind == "tied")
    if kind == "embedding":
        rows, axes = r.randint(2, 5), [r.randint(1, 3) for _ in range(r.randint(0, 1))]
        make = lambda: nn.Embedding(rows, 3, padding_idx=r.choice([None, 0]))
        return Draft(make, lambda n: torch.randint(rows, (n, *axes)), -1)
    dims, groups = r.randint(1, 3), r.choice([1, 1, 2])
    i, o, size = groups * r.randint(1, 2), groups * r.randint(1, 2), 5 if dims < 3 else 4
    kernel, stride, dilation = r.randint(1, 3), r.randint(1, 2), r.randint(1, 2 if dims < 3 else 1)
    options: dict[str, Any] = dict(groups=groups, bias=bias, stride=stride, dilation=dilation)
    if kind == "transposed":
        cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        size, options["padding"] = 3, r.randint(0, kernel // 2)
    else:
        cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        modes = ["zeros", "circular", "reflect", "replicate"]
        options["padding_mode"] = r.choice(modes)
        options["padding"] = r.choice([0, 1, "same"] if stride == 1 else [0, 1])
    return Draft(
        lambda: cls(i, o, kernel, **options),
        lambda n: torch.randn(n, i, *[size] * dims),
        groups=groups,
    )


def norms(r: random.Random) -> Draft:
    """A norm, once or twice."""
    axes, twice = [r.randint(2, 3) for _ in range(r.randint(1, 2))], r.random() < 0.3
    last: Any = r.choice([nn.LayerNorm, nn.RMSNorm])
    size = r.randint(1, len(axes))
    made = {
        "last": lambda: last(axes[-size:]),
        "groups": lambda: nn.GroupNorm(2, 4),
        "instances": lambda: nn.InstanceNorm1d(4, affine=True),
        "batch": lambda: nn.BatchNorm1d(4, affine=True).eval(),
    }
    name = r.choice(list(made))
    shape = axes if name == "last" else [4, 3]

    def make() -> nn.Module:
        m = made[name]()
        for p in m.parameters():
            nn.init.normal_(p)
        return m

    return Draft(make, lambda n: torch.randn(n, *shape), -1 if name == "last" else 1, twice=twice)


class Model(nn.Module):
    """A stem, the module, and a head, with what was given and made of each call."""

    def __init__(self, draft: Draft, classes: int, padded: bool):
        super().__init__()
        self.axis = -1 if draft.channel == 1 else 1
        self.layer, self.calls = draft.make(), 2 if draft.twice else 1
        some = draft.x(2)
        self.stem = nn.Identity() if not some.is_floating_point() else nn.Softsign()
        with torch.no_grad():
            out = self.layer(self.stem(some))
        self.padded = padded and out.dim() > 2
        width = out.flatten(1).shape[1]
        self.head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(width, classes))

    def _mask(self, x: Tensor) -> Tensor:
        """Zero at the last place of an axis: padding."""
        size = x.shape[self.axis]
        there = (torch.arange(size) < max(size - 1, 1)).to(x.dtype)
        return there if self.axis == -1 else there.reshape(size, *[1] * (x.dim() - 2))

    def forward(self, x: Tensor, shifts: list[Tensor] | None = None) -> Tensor:
        x = self.stem(x)
        for k in range(self.calls):
            x = self.layer(x.tanh() if k else x)
            x = x if shifts is None else x + shifts[k]
            x = x * self._mask(x) if self.padded else x
        return self.head(x)


class Truth:
    """H_y and u of one batch, place by place."""

    def __init__(self, model: Model, draft: Draft, loss: Any, x: Tensor, y: Tensor, fisher: str):
        self.draft, self.layer = draft, model.layer
        given = list[Tensor]()
        hook = model.layer.register_forward_pre_hook(lambda m, a: given.append(a[0].detach()))
        outputs = [t.detach() for t in self._outputs(model, x, given)]
        hook.remove()
        zeros = [torch.zeros_like(t) for t in outputs]
        z = model(x).detach()
        jac = jacrev(lambda shifts: model(x, shifts))(zeros)  # (N, C, N, ...) of each call
        j = torch.cat([self.places(t.flatten(0, 1)) for t in jac], -1)
        if fisher == "empirical":
            g = torch.func.grad(lambda z: loss(z, y))(z)
            rows = torch.einsum("nc,ncmol->nmol", g, j.unflatten(0, z.shape))
            # (1, N, O, L)
            self.columns = rows.diagonal(dim1=0, dim2=1).movedim(-1, 0)[None].detach()
        else:
            h = torch.func.hessian(lambda z: loss(z, y))(z).reshape(z.numel(), z.numel())
            values, vectors = torch.linalg.eigh(h)
            root = vectors * values.clamp(min=0).sqrt()
            self.columns = torch.einsum("dk,dmol->kmol", root, j).detach()
        self.inputs = {}
        for name, p in model.layer.named_parameters():
            if p.requires_grad:
                self.inputs[name] = torch.cat([self._inputs(name, x) for x in given], -1).detach()

    def _outputs(self, model: Model, x: Tensor, given: list[Tensor]) -> list[Tensor]:
        found = list[Tensor]()
        hook = model.layer.register_forward_hook(lambda m, a, y: found.append(y))
        model(x)
        hook.remove()
        return found

    def places(self, t: Tensor, lead: int = 1) -> Tensor:
        """(..., N, *outputs) -> (..., N, O, L)."""
        axis = lead + 1 if self.draft.channel == 1 else -1
        return t.movedim(axis, lead + 1).flatten(lead + 2) if t.dim() > lead + 2 else t[..., None]

    def _inputs(self, name: str, x: Tensor) -> Tensor:
        """u, (N, O, P, L): the derivative of each channel in each entry."""
        others = {k: p.detach() for k, p in self.layer.named_parameters()}
        of = lambda w: self.places(functional_call(self.layer, {**others, name: w}, (x,)), 0)
        found = jacrev(of)(others[name])  # (N, O, L, *shape)
        return found.flatten(3).movedim(2, -1)


def block(truths: list[Truth]) -> Tensor:
    """The GGN over the module's parameters, of all batches."""
    found: Any = 0
    for truth in truths:
        u = torch.cat(list(truth.inputs.values()), 2)
        rows = torch.einsum("knol,nopl->knp", truth.columns, u).flatten(0, 1)
        found = found + rows.mT @ rows
    return torch.as_tensor(found)


def expected(
    truths: list[Truth], approx: str, fisher: str, bias: str, places: str = "all"
) -> Tensor:
    """The matrix over the module's parameters, of all batches."""
    groups, names = truths[0].draft.groups, list(truths[0].inputs)
    exact = names == ["bias"] or not isinstance(truths[0].layer, MATRIX_PRODUCTS)
    table = isinstance(truths[0].layer, nn.Embedding)
    left: Any = 0
    moment: Any = 0
    count, outputs = 0, []
    for truth in truths:
        v = truth.columns
        u = torch.cat([truth.inputs[name] for name in names], 2)  # (N, O, P, L)
        outputs.append(torch.einsum("nopl,noql->pq", u, u))
        there = torch.ones_like(u[:, 0, 0], dtype=torch.bool)
        if table:
            there = (u != 0).flatten(1, 2).any(1)  # padding is no place
        alive = (v != 0).any(0).any(1) if places == "alive" else there
        v, there = v * there[None, :, None], there & alive
        u = u * there[:, None, None]
        if approx == "reduce":
            u = (u.sum(-1) / there.sum(-1).clamp(min=1)[:, None, None])[..., None]
            v = v.sum(-1, keepdim=True)
        left = left + torch.einsum("knol,knql->oq", v, v)
        if approx == "reduce":
            count += int(there.any(1).sum()) if places == "alive" else len(there)
        else:
            count += int(there.sum())
        moment = moment + torch.einsum("nopl,nqrl->opqr", u, u)
    whole = torch.as_tensor(sum(outputs)) if fisher == "forward" else block(truths)
    if exact:
        return whole
    if fisher == "forward":
        left = torch.eye(len(left), dtype=left.dtype) * count
    group = torch.arange(len(left)) * groups // max(len(left), 1)
    left = left * (group[:, None] == group)
    found = torch.einsum("oq,opqr->pr", left, moment / max(count, 1))
    if table:  # A is diagonal
        row = torch.arange(len(found)) // len(left)
        found = found * (row[:, None] == row)
    return _apart(found, whole, truths[0].inputs) if bias == "separate" else found


def _apart(found: Tensor, whole: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """With the exact block of the bias."""
    at = 0
    for name, u in inputs.items():
        size = u.shape[2]
        if name == "bias":
            rows = slice(at, at + size)
            found[rows], found[:, rows] = 0, 0
            found[rows, rows] = whole[rows, rows]
        at += size
    return found


def check(seed: int) -> str:
    """What is wrong, or nothing."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    draft, classes = drafts(r), r.randint(2, 3)
    model = Model(draft, classes, r.random() < 0.5).double()
    frozen = r.choice(["weight", "bias", "", ""])
    if len(list(model.layer.parameters())) == 2 and frozen:
        getattr(model.layer, frozen).requires_grad_(False)
    approx, fisher = r.choice(["expand", "reduce"]), r.choice(["exact", "empirical", "forward"])
    bias = r.choice(["joint", "separate"])
    reduction, factor = r.choice(["mean", "sum"]), r.choice([1.0, 0.5])
    plain: Any = r.choice([nn.CrossEntropyLoss, nn.MSELoss])(reduction=reduction)
    is_class = isinstance(plain, nn.CrossEntropyLoss)
    double = lambda t: t.double() if t.is_floating_point() else t
    target = lambda n: (
        torch.randint(classes, (n,)) if is_class else torch.randn(n, classes).double()
    )
    batches = [(double(draft.x(n)), target(n)) for n in r.choices([1, 2, 4], k=r.randint(1, 3))]
    options = dict(approx=approx, fisher=fisher, bias=bias, places=r.choice(["all", "alive"]))
    whole = lambda z, y: factor * plain(z, y)
    truths = [Truth(model, draft, whole, x, y, fisher) for x, y in batches]
    nnj.extend(model)
    loss = nnj.extend(plain)
    memory = r.choice([1, 2**28])
    with nnj.collect("kfac", modules=[model.layer], memory=memory, **options):
        for x, y in batches:
            (factor * loss(model(x), y)).backward()
    fault = close(model.layer.kfac.dense(), expected(truths, **options))
    if fault:
        return f"{model.layer}, {options}, {reduction}, {batches[0][0].shape}: {fault}"
    summed = type(plain)(reduction="sum")
    fit = nnj.fit(model, plain, batches, "kfac", modules=[model.layer], memory=memory, **options)
    truths = [Truth(model, draft, summed, x, y, fisher) for x, y in batches]
    (found,) = fit["kfac"].values()
    fault = close(found.dense(), expected(truths, **options))
    if not fault and fisher != "forward":
        truth = block(truths)
        both = nnj.fit(model, plain, batches, "ekfac", modules=[model.layer], **options)
        (better,) = both["ekfac"].values()
        fault = close(better.trace(), truth.trace()) and "the trace of ekfac"
        errors = [float((m.dense() - truth).norm()) for m in (better, found)]
        fault = fault or (errors[0] > errors[1] + 1e-10) * f"ekfac is off by {errors}"
    return f"fit of {model.layer}, {options}: {fault}" if fault else ""


@pytest.mark.parametrize("seed", few(range(SEEDS)))
def test_seed(seed: int) -> None:
    assert check(seed) == ""
