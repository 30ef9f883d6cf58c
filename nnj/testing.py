"""Checks for plugin authors and users: a rule, a loss and a whole model against dense derivatives in float64."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from nnj.checking import ModelReport, check_model
from nnj.curvature import Curvature
from nnj.factors import Factor
from nnj.hessian import twice
from nnj.hooks import copied
from nnj.loss_hook import FunctionLoss, name_of
from nnj.operators import Jacobian
from nnj.owners import Owner
from nnj.plugins import manager
from nnj.rules import ask_rule, blame, checked, describes, find_rule

TOLERANCE: dict[str, Any] = dict(rtol=1e-8, atol=1e-9)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value.detach().clone()
    return value


def _same(name: str, found: Tensor, expected: Tensor) -> None:
    try:
        torch.testing.assert_close(found, expected, **TOLERANCE)
    except AssertionError as error:
        raise AssertionError(f"{name} is wrong: {error}") from None


def layer_jacobians(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The dense Jacobian of each slot by `torch.func.jacrev`, (N, out, in); the oracle of `check_layer`.

    Errors: AssertionError if one row's output depends on another row's input.
    """
    params = dict(module.named_parameters())
    run = lambda p, z: functional_call(module, p, (z.clone(),))
    y = run(params, x)
    n = y.shape[0]
    found = {}
    for name, p in params.items():
        j = jacrev(lambda q, name=name: run({**params, name: q}, x))(p)
        found[name] = j.reshape(n, -1, p.numel())
    if x.is_floating_point():
        j = jacrev(lambda z: run(params, z))(x).reshape(n, -1, n, x[0].numel())
        own = torch.stack([j[i, :, i] for i in range(n)])
        cross = torch.stack([j[i, :, m] for i in range(n) for m in range(n) if i != m]) if n > 1 else own[:0]
        assert not cross.any(), f"{type(module).__name__}: rows of the batch influence one another"
        found["input"] = own
    return {name: j.detach() for name, j in found.items()}


def check_layer(module: nn.Module, x: Tensor) -> None:
    """Check every slot and every product of the rule for `module` at `x` against a dense Jacobian, in float64.

    jvp, vjp, jmp, mjp, jmjTp and jTmjp (with metrics that are not symmetric), square, dense, the shared direction of a
    parameter, and what quantities ask: diagonal, block and per-sample gradient, with several rows for each sample in several
    orders. The module is copied, x is not changed. Any plugin author can call it in a test of one line.

    Errors: AssertionError naming the slot and the product; `UnsupportedLayer` if no rule describes the module.
    """
    module, x = copied(module).double(), _double(x)
    entry = find_rule(module)
    if entry is None:
        raise manager().unsupported(module, type(module).__name__)
    oracle = layer_jacobians(module, x)
    with torch.no_grad():
        point = x.clone()
        y = module(point)
        if "x" in entry.uses:
            point = x.clone()
        slots = ask_rule(entry, module, point, y.clone())
        assert not isinstance(slots, str), f"{type(module).__name__}: its rule declines it: {slots}"
        missing = set(oracle) - set(slots)
        assert not missing, f"{type(module).__name__}: its rule leaves out {sorted(missing)}"
        for slot in oracle:
            who = blame(entry, module, type(module).__name__)
            _check_products(who, slot, slots[slot], oracle[slot])
            _check_pullback(f"{who} '{slot}'", slots[slot], oracle[slot])


def _check_products(entry_layer: str, slot: str, j: Jacobian, dense: Tensor) -> None:
    n, out, into = dense.shape
    who = f"{entry_layer} '{slot}'"
    v = torch.randn(3, n, *j.inputs, dtype=dense.dtype)
    u = torch.randn(3, n, *j.outputs, dtype=dense.dtype)

    def jvp(t: Tensor) -> Tensor:
        whole = t.reshape(3, -1, into).expand(3, n, into)
        return torch.einsum("noi,kni->kno", dense, whole).reshape(3, n, *j.outputs)

    found = checked(f"vjp of '{slot}'", j.vjp(u), (3, n, *j.inputs), entry_layer)
    expected = torch.einsum("noi,kno->kni", dense, u.reshape(3, n, out)).reshape(3, n, *j.inputs)
    _same(f"{who}: vjp", found, expected)
    _same(f"{who}: jvp", checked(f"jvp of '{slot}'", j.jvp(v), (3, n, *j.outputs), entry_layer), jvp(v))
    if slot != "input":
        _same(f"{who}: jvp of a shared direction", j.jvp(v[:, :1]), jvp(v[:, :1]))
    _same(f"{who}: dense", j.dense(), dense)
    for name, op, matrix in (("", j, dense), ("square().", j.square(), dense.square())):
        a, b = (torch.randn(n, d, d, dtype=dense.dtype) for d in (into, out))
        _same(f"{who}: {name}jmp", op.jmp(a[..., :2]), matrix @ a[..., :2])
        _same(f"{who}: {name}mjp", op.mjp(b[:, :2]), b[:, :2] @ matrix)
        _same(f"{who}: {name}jmjTp", op.jmjTp(a), matrix @ a @ matrix.mT)
        _same(f"{who}: {name}jTmjp", op.jTmjp(b), matrix.mT @ b @ matrix)


def _owners(n: int, outputs: tuple[int, ...]) -> dict[str, tuple[Owner, Tensor]]:
    """Ways in which entries can belong to samples, each with the owner of every entry written out."""
    whole = lambda rows: rows.reshape(n, *[1] * len(outputs)).expand(n, *outputs)
    rows = {"one row a sample": (n, torch.arange(n))}
    if n % 2 == 0:
        rows["sample-major"] = (n // 2, torch.arange(n) // 2)
    ways = {name: (Owner(m), whole(of)) for name, (m, of) in rows.items()}
    m = max(1, n // 2)
    ways["token-major"] = (Owner(m, (torch.arange(n) % m).reshape(n, *[1] * len(outputs))), whole(torch.arange(n) % m))
    ragged = torch.randint(-1, 3, (n,))
    ways["any order"] = (Owner(3, ragged.reshape(n, *[1] * len(outputs))), whole(ragged))
    for axis in range(len(outputs)):
        shape = [1] * (len(outputs) + 1)
        shape[axis + 1] = outputs[axis]
        of = torch.randint(-1, 2, (outputs[axis],)).reshape(shape)
        ways[f"samples along axis {axis + 1}"] = (Owner(2, of), of.expand(n, *outputs))
    return ways


def _check_pullback(who: str, j: Jacobian, dense: Tensor) -> None:
    n = dense.shape[0]
    u = torch.randn(4, n, *j.outputs, dtype=dense.dtype)
    for way, (owner, of) in _owners(n, j.outputs).items():
        per = [torch.where(of == s, u, 0.0).reshape(4, n, -1) for s in range(owner.n)]
        expected = torch.stack([torch.einsum("noi,kno->ki", dense, p) for p in per], 1)
        name = f"{who}: pullback ({way})"
        factor = j.pullback(u, owner)
        _check_factor(name, factor, expected.reshape(4, owner.n, *j.inputs))
        split = torch.stack(per, 1).reshape(4 * owner.n, n, *j.outputs)
        _check_factor(f"{name}, explicit", j.pullback(split, Owner(owner.n, explicit=True)), expected.reshape(4, -1, *j.inputs))


def _check_factor(name: str, factor: Factor, expected: Tensor) -> None:
    flat = expected.reshape(-1, factor.dense()[0, 0].numel())
    _same(f"{name}, per sample", factor.dense(), expected)
    _same(f"{name}, diagonal", factor.square_sum(), expected.square().sum((0, 1)))
    _same(f"{name}, block", factor.gram(factor), flat.T @ flat)
    _same(f"{name}, some columns", factor.columns(slice(1, 3)).square_sum(), expected[1:3].square().sum((0, 1)))


def loss_curvature(loss: nn.Module, scale: Tensor, output: Tensor, *args: Any) -> Curvature:
    """What the rule for `loss` says, and what `nnj.twice` says where there is none that describes it or it declines."""
    entry = manager().find("loss", type(loss))
    if entry is not None and describes(entry, loss):
        try:
            return entry.rule(loss, scale, output, *args)
        except NotImplementedError:
            pass
    return twice(lambda y: (loss.forward(y, *args) * scale).sum(), (output,), name_of(loss))


def loss_reference(loss: Any) -> Callable[..., Tensor]:
    """What a loss is compared with, `reference(loss, output, *args)`: what its rule declares, by default its forward."""
    entry = manager().find("loss", type(loss)) if isinstance(loss, nn.Module) else None
    if entry is not None and entry.reference is not None and describes(entry, loss):
        return entry.reference
    return lambda loss, *given: loss.forward(*given) if isinstance(loss, nn.Module) else loss(*given)


def check_loss(loss: Callable[..., Tensor], output: Tensor, *args: Any, reference: Callable[..., Tensor] | None = None) -> None:
    """Check the rule for `loss` at `output`, args being its other arguments, against the dense Hessian, in float64.

    Mean, sum, none and the loss's own reduction, under the scale 1 and a random positive one: the factor, in one piece, in slices
    and in columns that are picked, with their square sums; where `place` puts it; diagonal, product, combinations of columns;
    samples, which must be the columns under the signs that the generator gives. Blocks must be all there is: the Hessian
    between rows, or places, must be zero. The loss is copied, so its reduction stays.

    Args:
        loss: a loss module, or a function as `nnj.extend` takes it (its reduction is its own).
        output: log probabilities must be such in float64.
        reference: `reference(loss, output, *args)` is what is differentiated twice, by default what the rule has registered
            (for NLLLoss the loss of `output.log_softmax(1)`), or the loss: for one that autograd cannot differentiate twice, or
            the rule of which takes in more than the loss. At `output` it must have the value of the loss.

    Errors: AssertionError naming the loss, its reduction and the product; `NNJError` for a loss that `nnj.collect` refuses, such
    as one that is not convex in `output`.
    """
    loss = loss if isinstance(loss, nn.Module) else FunctionLoss(loss)
    output, args = _double(output), tuple(map(_double, args))
    run = reference or loss_reference(loss)
    reductions = dict.fromkeys(["mean", "sum", "none", loss.reduction]) if hasattr(loss, "reduction") else [None]
    for reduction in reductions:
        module: Any = copy.deepcopy(loss).double()
        if reduction is not None:
            module.reduction = reduction
        who = f"{name_of(loss)}{f'(reduction={reduction!r})' if reduction else ''}"
        value = module.forward(output, *args).detach()
        _same(f"{who}: the value of the reference", run(module, output, *args).detach().nan_to_num(), value.nan_to_num())
        for scale in (torch.ones_like(value), torch.rand_like(value) + 0.5):
            dense = jacrev(jacrev(lambda y: (run(module, y, *args) * scale).sum()))(output)  # noqa: B023
            h = loss_curvature(module, scale, output, *args)
            _check_curvature(who, h, dense.detach().reshape(output.numel(), -1), output)


def _check_curvature(who: str, h: Curvature, dense: Tensor, output: Tensor) -> None:
    shape = (h.rows, h.places, h.block)
    assert h.rows * h.places * h.block == output.numel(), f"{who}: {shape} blocks for an output of {tuple(output.shape)}"
    s = checked("columns", h.columns(0, h.rank), (h.rank, *shape), who)
    assert s.dtype == output.dtype, f"{who}: columns are {s.dtype}, expected {output.dtype}"
    for a, b in ((0, 1), (h.rank // 2, h.rank), (0, h.rank // 2)):
        _same(f"{who}: columns({a}, {b})", h.columns(a, b), s[a:b])
    mine = torch.eye(h.rows * h.places, dtype=s.dtype).reshape(-1, 1, h.rows, h.places, 1)  # each block by itself
    (apart,) = h.place((mine * s).flatten(0, 1))
    checked("place", apart, (mine.shape[0] * h.rank, *output.shape), who)
    apart = apart.reshape(len(apart), -1)
    _same(f"{who}: S S^T", apart.T @ apart, dense)
    _same(f"{who}: norms", checked("norms", h.norms(), (h.rank, *shape[:2]), who), s.square().sum(-1))
    row, place, j = (torch.randint(size, (7,)) for size in (h.rows, h.places, h.rank))
    _same(f"{who}: pick", checked("pick", h.pick(row, place, j), (7, h.block), who), s[j, row, place])
    (diagonal,) = h.place(checked("diagonal", h.diagonal(), shape, who)[None])
    _same(f"{who}: diagonal", diagonal.flatten(), dense.diagonal())
    v = torch.randn(3, *shape, dtype=s.dtype)
    found = h.place(checked("product", h.product(v), v.shape, who))[0].reshape(3, -1)
    _same(f"{who}: product", found, h.place(v)[0].reshape(3, -1) @ dense)
    c = torch.randn(3, h.rank, *shape[:2], dtype=s.dtype)
    _same(f"{who}: combine", checked("combine", h.combine(c), v.shape, who), torch.einsum("kjrd,jrdb->krdb", c, s))
    signs = h.signs(5, torch.Generator().manual_seed(0))
    assert signs.shape == (5, *c.shape[1:]) and bool((signs.abs() == 1).all()), f"{who}: signs are not +1 or -1 for each column"
    drawn = checked("sample", h.sample(5, torch.Generator().manual_seed(0)), (5, *shape), who)
    _same(f"{who}: sample", drawn, torch.einsum("kjrd,jrdb->krdb", signs.to(s.dtype), s))


__all__ = ["ModelReport", "check_layer", "check_loss", "check_model", "layer_jacobians", "loss_curvature", "loss_reference"]
