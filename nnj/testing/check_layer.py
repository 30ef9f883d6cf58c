"""check_layer: the rule of a layer against dense Jacobians, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from nnj.errors import NNJError
from nnj.jacobians.factor import Factor
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.recording.extend import copied
from nnj.registry.blame import blame
from nnj.registry.claim import Entry
from nnj.registry.layer_rules import Declined, ask_rule, checked, find_rule
from nnj.registry.manager import manager
from nnj.testing.compare import double, same, sample_indices


def layer_jacobians(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The dense Jacobian of each slot by `torch.func.jacrev`, (N, out, in); the oracle of
    `check_layer`.

    Errors: AssertionError if one row's output depends on another row's input.
    """
    params: dict[str, Tensor] = dict(module.named_parameters())

    def run(params: dict[str, Tensor], z: Tensor) -> Tensor:
        y: Tensor = functional_call(module, params, (z.clone(),))
        return y

    y = run(params, x)
    n = y.shape[0]
    found = {}
    for name, p in params.items():
        j = jacrev(lambda q, name=name: run({**params, name: q}, x))(p)
        found[name] = j.reshape(n, -1, p.numel())
    if x.is_floating_point():
        j = jacrev(lambda z: run(params, z))(x).reshape(n, -1, n, x[0].numel())
        own = torch.stack([j[i, :, i] for i in range(n)])
        coupled = any(bool(j[i, :, m].any()) for i in range(n) for m in range(n) if i != m)
        assert not coupled, f"{type(module).__name__}: rows of the batch influence one another"
        found["input"] = own
    return {name: j.detach() for name, j in found.items()}


def check_layer(module: nn.Module, x: Tensor, *, fallback: bool = False) -> None:
    """Check every slot and every product of the rule for `module` at `x` against a dense Jacobian,
    in float64.

    jvp, vjp, jmp, mjp, jmjTp and jTmjp (with metrics that are not symmetric), square, dense, the
    shared direction of a parameter, and what quantities ask: diagonal, block and per-sample
    gradient, with several rows for each sample in several orders. The module is copied, x is not
    changed. Any plugin author can call it in a test of one line.

    Args:
        fallback: whether to check what is said of each module that has no rule of its own
            (`torch.func`, for each sample), where that speaks for this one.

    Errors: AssertionError naming the slot and the product; `NNJError` if no rule describes the
    module, or the fallback alone, and that was not asked for."""
    module, x = copied(module).double(), double(x)
    entry = find_rule(module)
    if entry is None:
        raise _unsupported(module)
    if entry.is_fallback and not fallback:
        raise _only_fallback(module, entry)
    oracle = layer_jacobians(module, x)
    with torch.no_grad():
        point = x.clone()
        y = module(point)
        if "x" in entry.uses:
            point = x.clone()  # the module may have overwritten the other one
        said = ask_rule(entry, module, point, y.clone())
        assert not isinstance(said, Declined), (
            f"{type(module).__name__}: its rule declines it: {said.reason}"
        )
        slots = said.jacobians
        missing = set(oracle) - set(slots)
        assert not missing, f"{type(module).__name__}: its rule leaves out {sorted(missing)}"
        for slot in oracle:
            who = blame(entry, module, type(module).__name__)
            _check_products(who, slot, slots[slot], oracle[slot])
            _check_claims(f"{who} '{slot}'", slots[slot], oracle[slot])
            _check_pullback(f"{who} '{slot}'", slots[slot], oracle[slot])


def _unsupported(module: nn.Module) -> NNJError:
    """The error for a layer that no rule describes."""
    known, name = manager(), type(module).__name__
    plugins = ", ".join(sorted({entry.source.plugin for entry in known.entries("layer")})) or "none"
    off = f" (disabled: {', '.join(known.disabled)})" if known.disabled else ""
    enable = "Enable what is disabled, or write" if known.disabled else "Write"
    return NNJError(
        f"no plugin knows {name} ('{name}'). Installed: {plugins}{off}. "
        f"{enable} a rule for it (see nnj.registry.hookspecs)"
    )


def _only_fallback(module: nn.Module, entry: Entry) -> NNJError:
    """The error for a layer of which the fallback alone would be checked."""
    name, off = type(module).__name__, manager().disabled
    disabled = f" or is disabled ({', '.join(off)})" if off else ""
    return NNJError(
        f"no rule is registered for {name}: check_layer would check the fallback of plugin "
        f"{entry.source}, which is taken for every module. Register a rule for {name} (if there is "
        f"one, its plugin is not installed{disabled}), or say check_layer(..., fallback=True)"
    )


def _check_products(entry_layer: str, slot: str, j: Jacobian, dense: Tensor) -> None:
    """Its products with tangents, cotangents, matrices and metrics, and those of its square."""
    n, out, into = dense.shape
    who = f"{entry_layer} '{slot}'"
    v = torch.randn(3, n, *j.inputs, dtype=dense.dtype).to(dense)
    u = torch.randn(3, n, *j.outputs, dtype=dense.dtype).to(dense)

    def jvp(t: Tensor) -> Tensor:
        whole = t.reshape(3, -1, into).expand(3, n, into)
        return torch.einsum("noi,kni->kno", dense, whole).reshape(3, n, *j.outputs)

    found = checked(f"vjp of '{slot}'", j.vjp(u), (3, n, *j.inputs), entry_layer)
    expected = torch.einsum("noi,kno->kni", dense, u.reshape(3, n, out)).reshape(3, n, *j.inputs)
    same(f"{who}: vjp", found, expected)
    same(
        f"{who}: jvp",
        checked(f"jvp of '{slot}'", j.jvp(v), (3, n, *j.outputs), entry_layer),
        jvp(v),
    )
    if slot != "input":
        same(f"{who}: jvp of a shared direction", j.jvp(v[:, :1]), jvp(v[:, :1]))
    same(f"{who}: dense", j.dense(), dense)
    for name, op, matrix in (("", j, dense), ("square().", j.square(), dense.square())):
        a, b = (torch.randn(n, d, d, dtype=dense.dtype).to(dense) for d in (into, out))
        same(f"{who}: {name}jmp", _jmp(op, a[..., :2]), matrix @ a[..., :2])
        same(f"{who}: {name}mjp", _mjp(op, b[:, :2]), b[:, :2] @ matrix)
        same(f"{who}: {name}jmjTp", _jmp(op, _jmp(op, a).mT).mT, matrix @ a @ matrix.mT)
        same(f"{who}: {name}jTmjp", _mjp(op, _mjp(op, b).mT).mT, matrix.mT @ b @ matrix)


def _check_claims(who: str, j: Jacobian, dense: Tensor) -> None:
    """What it says of which entries depend on which, and of whose memory a result is."""
    if j.makes_new:
        u = torch.randn(2, dense.shape[0], *j.outputs, dtype=dense.dtype).to(dense)
        kept, found = u.clone(), j.vjp(u)
        expected = found.clone()
        found += 1
        same(f"{who}: makes_new, the cotangent", u, kept)
        same(f"{who}: makes_new, its entries", found, expected + 1)
        same(f"{who}: makes_new, called again", j.vjp(u), expected)
        same(f"{who}: vjp_over", j.vjp_over(u), expected)
    if j.entrywise:
        same(f"{who}: entrywise", torch.diag_embed(dense.diagonal(dim1=1, dim2=2)), dense)
    if j.spreads:
        n, channels, _ = dense.shape
        own = torch.eye(channels, dtype=torch.bool, device=dense.device)[:, :, None]
        apart = dense.reshape(n, channels, channels, -1) * own
        same(f"{who}: spreads, channel by channel", apart.reshape(dense.shape), dense)


def _jmp(j: Jacobian, m: Tensor) -> Tensor:
    """J M by columns of M: (N, in, c) -> (N, out, c)."""
    columns = m.permute(2, 0, 1).reshape(m.shape[2], m.shape[0], *j.inputs)
    return j.jvp(columns).reshape(m.shape[2], j.n, -1).permute(1, 2, 0)


def _mjp(j: Jacobian, m: Tensor) -> Tensor:
    """M J by rows of M: (N, r, out) -> (N, r, in)."""
    rows = m.transpose(0, 1).reshape(m.shape[1], m.shape[0], *j.outputs)
    return j.vjp(rows).reshape(m.shape[1], j.n, -1).transpose(0, 1)


def _check_pullback(who: str, j: Jacobian, dense: Tensor) -> None:
    """B = V J under every sample index, and with a column for each sample."""
    n = dense.shape[0]
    u = torch.randn(4, n, *j.outputs, dtype=dense.dtype).to(dense)
    for way, (sample_index, of) in sample_indices(n, j.outputs, dense.device).items():
        per = [torch.where(of == s, u, 0.0).reshape(4, n, -1) for s in range(sample_index.n)]
        expected = torch.stack([torch.einsum("noi,kno->ki", dense, p) for p in per], 1)
        name = f"{who}: pullback ({way})"
        factor = j.pullback(u, sample_index)
        _check_factor(name, factor, expected.reshape(4, sample_index.n, *j.inputs))
        split = torch.stack(per, 1).reshape(4 * sample_index.n, n, *j.outputs)
        _check_factor(
            f"{name}, by column",
            j.pullback(split, SampleIndex(sample_index.n, by_column=True)),
            expected.reshape(4, -1, *j.inputs),
        )


def _check_factor(name: str, factor: Factor, expected: Tensor) -> None:
    """What quantities ask of a factor, whose dense form is expected."""
    flat = expected.reshape(-1, factor.dense()[0, 0].numel())
    same(f"{name}, per sample", factor.dense(), expected)
    same(f"{name}, diagonal", factor.square_sum(), expected.square().sum((0, 1)))
    same(f"{name}, block", factor.gram(factor), flat.T @ flat)
    same(
        f"{name}, some columns",
        factor.columns(slice(1, 3)).square_sum(),
        expected[1:3].square().sum((0, 1)),
    )
