"""Models that no one here wrote, exactly: against one backward pass of autograd for each output, and the Hessian of the loss."""
from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.oracle import close
from tests.real_models import REAL, N, Real


def built(real: Real) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """The model in eval mode, in float64, with parameters that are neither zero nor one; its inputs; the loss."""
    torch.manual_seed(0)
    model = real.make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for b in model.modules():
            if isinstance(b, nn.modules.batchnorm._BatchNorm):
                b.running_mean.normal_(std=0.1)
                b.running_var.uniform_(0.5, 2.0)
    torch.manual_seed(1)
    return model, real.inputs(), real.criterion()


def scalar(real: Real, model: nn.Module, inputs: dict[str, Any], criterion: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """What a user writes; where a norm or a softmax casts to float32, whatever it is given, it stays in float64."""
    with mock.patch("torch.float32", torch.float64), mock.patch.object(Tensor, "float", Tensor.double):
        output, target = real.loss(getattr(model(**inputs), real.output), inputs)
    return criterion(output, target), output, target


def truth(real: Real) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each parameter that is reached its gradient, the diagonal of J^T H J, and the share of each sample in the gradient."""
    model, inputs, criterion = built(real)
    value, output, target = scalar(real, model, inputs, criterion)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(o, list(names.values()), retain_graph=True, allow_unused=True) for o in output.flatten()]
    of = lambda z: criterion(z.reshape(output.shape), target)
    z = output.detach().flatten()
    h, g = torch.func.hessian(of)(z), torch.func.grad(of)(z)
    owner = torch.arange(len(z)) // (len(z) // N)
    found = {}
    for i, (name, p) in enumerate(names.items()):
        if all(row[i] is None for row in rows):
            continue
        j = torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows]).flatten(1)
        shares = torch.zeros(N, j.shape[1], dtype=j.dtype).index_add_(0, owner, g[:, None] * j)
        found[name] = (g @ j).reshape(p.shape), ((h @ j) * j).sum(0).reshape(p.shape), shares.reshape(N, *p.shape)
    value.backward()
    for name, (grad, _, _) in found.items():
        assert torch.allclose(grad, names[name].grad, rtol=1e-9, atol=1e-12), name
    return found


@pytest.mark.parametrize("name", REAL)
def test_exact(name):
    real = REAL[name]
    if importlib.util.find_spec(real.package) is None:
        pytest.skip(f"{real.package} is not installed: pip install -e '.[real]'")
    expected, faults = truth(real), []
    plain, inputs, criterion = built(real)
    scalar(real, plain, inputs, criterion)[0].backward()
    model, inputs, criterion = built(real)
    nnj.extend(model)
    with nnj.collect("ggn_diag", "batch_grad"):
        scalar(real, model, inputs, nnj.extend(criterion))[0].backward()
    for (name, p), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not p.requires_grad:
            continue
        if name not in expected:
            faults += [f"{name} was not reached"] * (p.ggn_diag is not None or p.batch_grad is not None or p.grad is not None)
            continue
        faults += [f"grad of {name} differs"] * (not torch.equal(p.grad, before.grad))
        for quantity, value in (("ggn_diag", expected[name][1]), ("batch_grad", expected[name][2])):
            fault = close(getattr(p, quantity), value)
            faults += [f"{quantity} of {name} {fault}"] if fault else []
    assert faults == []
