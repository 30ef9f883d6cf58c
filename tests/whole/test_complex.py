"""Complex tensors inside a real model: exact in real parameters, whatever lies between; complex
parameters are refused.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import nnj
from nnj.testing import check_layer, check_model
from tests.support.cases.table import Do

N, COMPLEX = 4, torch.complex64


class Around(nn.Module):
    """A layer of complex tensors between real ones."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Linear(6, 6),
            middle.requires_grad_(False),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.last(torch.view_as_real(self.middle(torch.fft.fft(self.first(x)))).flatten(1))


def fourier(s, x):
    """A Fourier layer, its weights held as real numbers."""
    w = torch.view_as_complex(s.weight)
    return s.last(torch.relu(torch.fft.irfft(torch.fft.rfft(s.first(x)) * w, n=6)))


def products(s, x):
    """The same complex matrix in a linear map, behind an activation, and in a product."""
    w = torch.view_as_complex(s.weight)
    z = torch.tanh(F.linear(torch.fft.fft(s.first(x)), w)) * s.gate
    return s.last(torch.view_as_real(z @ w).flatten(1))


MODELS = {
    "linear": lambda: Around(nn.Linear(6, 6, dtype=COMPLEX)),
    "convolution": lambda: Around(
        Do(lambda s, z: s.conv(z[:, None])[:, 0], conv=nn.Conv1d(1, 1, 3, dtype=COMPLEX, padding=1))
    ),
    "tanh": lambda: Around(nn.Tanh()),
    "sigmoid": lambda: Around(nn.Sigmoid()),
    "flatten": lambda: Around(nn.Flatten()),
    "fourier": lambda: Do(
        fourier, first=nn.Linear(6, 6), weight=torch.randn(4, 2), last=nn.Linear(6, 3)
    ),
    "products": lambda: Do(
        products,
        first=nn.Linear(6, 6),
        weight=torch.randn(6, 6, 2),
        gate=torch.randn(6),
        last=nn.Linear(12, 3),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_in_real_parameters(name):
    """What autograd sends through a complex layer is J^H u, which a rule made for real tensors
    would get wrong.
    """
    torch.manual_seed(0)
    report = check_model(
        MODELS[name](), nn.CrossEntropyLoss(), torch.randn(N, 6), torch.randint(3, (N,))
    )
    assert not report.refused


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_products(name, wrt):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for p in model.parameters():
        p.data = p.data.to(torch.complex128) if p.is_complex() else p.data
    x = torch.randn(N, 6).double()
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    run = lambda p, row: functional_call(model, p, (row[None],))[0]
    if wrt == "input":
        dense = torch.stack([jacrev(run, argnums=1)(params, row) for row in x])
    else:
        dense = torch.stack(
            [torch.cat([j.flatten(1) for j in jacrev(run)(params, row).values()], 1) for row in x]
        )
    torch.testing.assert_close(nnj.jacobian(model, x, wrt), dense.detach())
    v = torch.randn(N, dense.shape[2]).double()
    torch.testing.assert_close(
        nnj.jvp(model, x, v, wrt), torch.einsum("noi,ni->no", dense, v).detach()
    )


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.last = (
            nn.Parameter(torch.randn(4, dtype=torch.complex64)),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))


def test_complex_parameters_are_refused_by_name():
    torch.manual_seed(0)
    model, loss = (
        nnj.extend(nn.Sequential(nn.Linear(6, 6), Spectral())),
        nnj.extend(nn.CrossEntropyLoss()),
    )
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    sentence = r"a parameter of '1' is complex, .*torch\.view_as_complex"
    for quantity in ("ggn_diag", "ggn_block", "ggn_diag_mc"):
        with (
            pytest.raises(nnj.NNJError, match=f"{quantity}: {sentence}"),
            nnj.collect("batch_grad", quantity),
        ):
            loss(model(x), y).backward()
    for call in (
        lambda: nnj.jacobian(model, x, "weight"),
        lambda: nnj.jTmjp(model, x, None, "weight", to_diag=True),
    ):
        with pytest.raises(nnj.NNJError, match=r"a parameter of Sequential is complex"):
            call()


def test_what_is_right_beside_complex_parameters():
    """Gradients of samples, and what is collected elsewhere."""
    torch.manual_seed(0)
    model, loss = (
        nnj.extend(nn.Sequential(nn.Linear(6, 6), Spectral())),
        nnj.extend(nn.CrossEntropyLoss()),
    )
    x, y = torch.randn(N, 6), torch.randint(3, (N,))
    with nnj.collect("batch_grad"):
        loss(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.batch_grad.sum(0), p.grad)
    with nnj.collect("ggn_diag", modules=[model[0]]):
        loss(model(x), y).backward()
    found = {name: p.ggn_diag for name, p in model[0].named_parameters()}
    model[1].weight.requires_grad_(False)
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    for name, p in model[0].named_parameters():
        torch.testing.assert_close(p.ggn_diag, found[name])


def test_complex_outputs_have_no_products():
    with pytest.raises(
        nnj.NNJError, match=r"gave torch\.complex64; products are those of a real output"
    ):
        nnj.jacobian(
            Do(lambda s, x: torch.fft.fft(s.one(x)), one=nn.Linear(6, 6)), torch.randn(N, 6)
        )


def test_check_layer_says_that_rules_are_real():
    with pytest.raises(
        AssertionError, match="its tensors are complex, and rules are those of real ones"
    ):
        check_layer(
            Do(lambda s, x: s.one(x), one=nn.Identity()).one,
            torch.randn(N, 6, dtype=torch.complex64),
        )
