"""Float32, half precision and autocast: the numbers of float64, to the precision of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, Case
from tests.support.collecting import X, Y, extended, net
from tests.support.oracle import Truth, data_of, dense, truth


@pytest.mark.parametrize(
    "name", ["mlp", "lm-tied", "residual-inplace", "dropout-train", "experts-for-tokens"]
)
def test_in_float32(name):
    """The numbers of float64, to the precision of float32."""
    case = CASES[name]
    torch.manual_seed(0)
    model, losses = extended(case)
    model.float()
    data = tuple(
        t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in data_of(case)
    )
    if name == "dropout-train":
        model.eval()
        case = Case("", lambda: build_eval(name), case.data)
    with nnj.collect("ggn_diag", "batch_grad"):
        case.run(model, losses[0].float(), *data).backward()
    expected = truth(name) if name != "dropout-train" else Truth(case)
    for n, p in model.named_parameters():
        want = expected.diag(n)
        torch.testing.assert_close(
            p.ggn_diag.double(), want, rtol=2e-3, atol=1e-4 * float(want.abs().max())
        )


def build_eval(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().eval()


def diagonals(model=None, x=X, y=Y, scale=1.0, loss=F.cross_entropy):
    model = net() if model is None else model
    found = dense(model, lambda run: [run(x)], lambda f: scale * loss(f[0], y))
    return {name: found.diag(name) for name in found.jacobian}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_the_dtype_of_the_parameter(dtype):
    model, loss = nnj.extend(net().to(dtype)), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad", "ggn_diag_mc"):
        loss(model(X.to(dtype)), Y).backward()
    expected = diagonals(net().to(dtype).double())
    for name, p in model.named_parameters():
        assert p.ggn_diag.dtype == dtype
        torch.testing.assert_close(p.ggn_diag.double(), expected[name], rtol=0.1, atol=2e-3)


def test_autocast():
    model, loss = nnj.extend(net().float()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(X.float()), Y)
        value.backward()
    for name, expected in diagonals().items():
        torch.testing.assert_close(
            model.get_parameter(name).ggn_diag.double(), expected, rtol=0.1, atol=2e-3
        )
