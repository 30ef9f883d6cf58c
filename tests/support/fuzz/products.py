"""The products of a model, in its weights and in its input, against its dense Jacobian."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import nnj
from tests.support.fuzz.case import Case
from tests.support.fuzz.compare import Outcome, asked, compare, largest
from tests.support.fuzz.truth import Truth


def check_products(true: Truth, model: nn.Module) -> dict[str, Outcome | None]:
    """The Jacobian and three other products in each slot, as the seed has it."""
    case, rng, found = true.case, random.Random(true.case.seed), {}
    x = case.data()[0]
    for wrt in ("weight", "input"):
        if wrt == "input" and case.kind == "tok":
            continue
        j = true.in_weight if wrt == "weight" else true.in_input
        torch.manual_seed(case.seed)
        table = table_of_products(model, x, j, wrt)
        for name in ("jacobian", *rng.sample(sorted(set(table) - {"jacobian"}), 3)):
            run, expected = table[name]
            found[f"{name}, {wrt}"] = asked(partial(check_product, case, name, run, expected))
    return found


def check_product(case: Case, name: str, run: Callable[[], Any], expected: Tensor) -> None:
    """Errors: `Wrong`."""
    compare(case, name, run(), expected, largest(expected))


def table_of_products(
    model: nn.Module, x: Tensor, j: Tensor, wrt: str
) -> dict[str, tuple[Callable[[], Any], Tensor]]:
    """Each call, and what it is to give."""
    n, out, d = j.shape
    draw = lambda *shape: torch.randn(shape)
    u, v, one, w, t = draw(n, out), draw(n, d), draw(d), draw(n, d, 2), draw(n, 2, out)
    m, diagonal, metric = draw(n, out, out), draw(n, d), draw(n, out)
    to = lambda s: s.to(next(model.parameters()).dtype)
    u64, v64, one64, w64, t64, m64, diagonal64, metric64 = (
        to(s).double() for s in (u, v, one, w, t, m, diagonal, metric)
    )
    joint = {"joint": True} if wrt == "weight" else {}
    shared = {
        "jvp, one for all": (
            lambda: nnj.jvp(model, x, to(one), wrt),
            torch.einsum("nod,d->no", j, one64),
        )
    }
    return (shared if wrt == "weight" else {}) | {
        "jacobian": (lambda: nnj.jacobian(model, x, wrt), j),
        "vjp": (lambda: nnj.vjp(model, x, to(u), wrt), torch.einsum("no,nod->nd", u64, j)),
        "jvp": (lambda: nnj.jvp(model, x, to(v), wrt), torch.einsum("nod,nd->no", j, v64)),
        "jmp": (lambda: nnj.jmp(model, x, to(w), wrt), j @ w64),
        "mjp": (lambda: nnj.mjp(model, x, to(t), wrt), t64 @ j),
        "jTmjp": (lambda: nnj.jTmjp(model, x, to(m), wrt, **joint), j.mT @ m64 @ j),
        "jTmjp, to_diag": (
            lambda: nnj.jTmjp(model, x, to(m), wrt, to_diag=True),
            (j * (m64 @ j)).sum(1),
        ),
        "jTmjp, from_diag": (
            lambda: nnj.jTmjp(model, x, to(metric), wrt, from_diag=True, to_diag=True),
            (j.square() * metric64[:, :, None]).sum(1),
        ),
        "jmjTp": (
            lambda: nnj.jmjTp(model, x, to(diagonal), wrt, from_diag=True),
            j * diagonal64[:, None] @ j.mT,
        ),
        "jmjTp, to_diag": (
            lambda: nnj.jmjTp(model, x, to(diagonal), wrt, from_diag=True, to_diag=True),
            (j.square() * diagonal64[:, None]).sum(2),
        ),
        "pair": (
            lambda: nnj.jTmjp_pair(model, x, x, None, wrt, to_diag=True)[1],
            j.square().sum(1),
        ),
    }
