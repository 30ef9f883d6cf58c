"""The products over the table of models (cases.py), where a row is one tensor in and one out:
exact, or refused in a sentence.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nnj
from tests.support.cases import CASES, EITHER, Case, plain
from tests.support.oracle import build, close, data_of
from tests.support.products import block_index, dense_jacobian
from tests.support.slow import few

# The samples of these are not in axis 0 of x and y alike, or what one sample is given depends on
# others.
REFUSED = {
    "weight": set(),
    "input": {
        "permuted-in-model",
        "shuffled-before-the-first-layer",
        "shuffled-and-scaled-before-the-first-layer",
    },
}
# torch.func cannot tell: its twin draws other random numbers; its parameter is a number, of which
# jacrev makes a vector.
UNTOLD = {"transformer-encoder-norm-first-dropout", "lambda-scalars"}


def rows() -> list[str]:
    return [
        name
        for name, case in (CASES | EITHER).items()
        if case.run is plain
        and not case.batch_axis
        and isinstance(case.data()[0], Tensor)
        and name not in UNTOLD
    ]


def products(case: Case, wrt: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What nnj says and what is true, by name; each call draws the same random numbers."""
    model, twin, x = build(case), build(case, twin=True), data_of(case)[0]

    def seeded(run, *args, **flags):
        torch.manual_seed(2)
        return run(model, *args, **flags)

    torch.manual_seed(2)
    j = dense_jacobian(twin, x, wrt)
    n, out, d = j.shape
    torch.manual_seed(4)
    shapes = (n, out), (n, d), (n, out, out), (n, d), (n, d, 2), (n, 2, out)
    u, v, m, metric, w, t = (torch.randn(*s, dtype=j.dtype) for s in shapes)
    found = {
        "jacobian": (seeded(nnj.jacobian, x, wrt), j),
        "vjp": (seeded(nnj.vjp, x, u, wrt), torch.einsum("no,nod->nd", u, j)),
        "jvp": (seeded(nnj.jvp, x, v, wrt), torch.einsum("nod,nd->no", j, v)),
        "jmp": (seeded(nnj.jmp, x, w, wrt), j @ w),
        "mjp": (seeded(nnj.mjp, x, t, wrt), t @ j),
        "jTmjp, full": (seeded(nnj.jTmjp, x, m, wrt, joint=wrt == "weight"), j.mT @ m @ j),
        "jmjTp, to_diag": (
            seeded(nnj.jmjTp, x, metric, wrt, from_diag=True, to_diag=True),
            (j.square() * metric[:, None]).sum(2),
        ),
        "jTmjp": (seeded(nnj.jTmjp, x, m, wrt, to_diag=True), (j * (m @ j)).sum(1)),
        "jmjTp": (seeded(nnj.jmjTp, x, metric, wrt, from_diag=True), j * metric[:, None] @ j.mT),
    }
    if wrt == "weight":
        found |= block_products(model, seeded, x, j, m)
    if model(x).equal(model(x)):  # else another call is another draw
        found["pair"] = seeded(nnj.jTmjp_pair, x, x, None, wrt, to_diag=True)[1], j.square().sum(1)
    return found


def block_products(
    model, seeded, x: Tensor, j: Tensor, m: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """The blocks of modules, in the order of modules(), and a metric given as such blocks; a shared
    parameter counts once.
    """
    index = block_index(model)
    blocks = seeded(nnj.jTmjp, x, m, "weight")
    blocks = blocks if isinstance(blocks, list) else [blocks]
    assert len(blocks) == len(index)
    true = [j[..., i].mT @ m @ j[..., i] for i in index]
    found = {f"block {number}": pair for number, pair in enumerate(zip(blocks, true, strict=True))}
    forward = sum(j[..., i] @ b @ j[..., i].mT for i, b in zip(index, true, strict=True))
    found["jmjTp of blocks"] = seeded(nnj.jmjTp, x, [b.detach() for b in true], "weight"), forward
    return found


@pytest.mark.parametrize("wrt", ("weight", "input"))
@pytest.mark.parametrize("name", few(rows()))
def test_products(name, wrt):
    case = (CASES | EITHER)[name]
    x = data_of(case)[0]
    torch.manual_seed(2)
    y = build(case)(x)
    one = isinstance(y, Tensor) and y.dim() > 0 and len(y) == len(x)
    if not one or name in REFUSED[wrt] or (wrt == "input" and not x.is_floating_point()):
        with pytest.raises(
            nnj.NNJError,
            match=r"influence one another|in axis 0|products need one tensor|has no derivative",
        ):
            nnj.jacobian(build(case), x, wrt)
        return
    wrong = {key: fault for key, pair in products(case, wrt).items() if (fault := close(*pair))}
    assert not wrong


@pytest.mark.parametrize("wrt", ("weight", "input"))
@pytest.mark.parametrize("name", few(rows()))
def test_diag_backprop_goes_on_or_names_the_operation(name, wrt):
    """With diagonals the way forward is the transpose of the way back, which two independent walks
    must agree on.
    """
    case = (CASES | EITHER)[name]
    model, x = build(case), data_of(case)[0]
    try:
        torch.manual_seed(2)
        back = nnj.jTmjp(model, x, None, wrt, to_diag=True, diag_backprop=True)
        v = torch.rand_like(back)
        torch.manual_seed(2)
        there = nnj.jmjTp(model, x, v, wrt, from_diag=True, to_diag=True, diag_backprop=True)
    except nnj.NNJError as error:
        assert any(
            part in str(error)
            for part in (
                "diag_backprop cannot go on at",
                "influence one another",
                "in axis 0",
                "products need one tensor",
                "has no derivative",
            )
        ), error
        return
    assert not close((back * v).sum(1), there.sum(1))
    assert bool((back >= 0).all())
