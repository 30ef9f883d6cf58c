"""Models that no one here wrote, exactly: against the pullback of each entry of the output, and the
Hessian of the loss.
"""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vjp

import nnj
from nnj.registry.loss_rules import hessian_of_loss
from tests.support.oracle import Dense, close
from tests.support.real_models import REAL, N, Real

DRAWS = 2
LARGEST_BLOCK = 300  # parameters of a module whose block is compared


def built(real: Real) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """The model in float64, with parameters that are neither zero nor one; its inputs; the loss."""
    torch.manual_seed(0)
    model = real.make().double().train(real.train)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for b in model.modules():
            if isinstance(b, nn.modules.batchnorm._BatchNorm):
                b.eval()
                b.running_mean.normal_(std=0.1)
                b.running_var.uniform_(0.5, 2.0)
    torch.manual_seed(1)
    return model, real.inputs(), real.criterion()


def run(real: Real, model: Any, inputs: dict[str, Any], seed: int = 2) -> tuple[Tensor, Tensor]:
    """(output, target), as a user has them."""
    torch.manual_seed(seed)
    made = model(**inputs)
    return real.loss(getattr(made, real.output) if real.output else made, inputs)


@pytest.fixture(autouse=True)
def in_float64():
    """Where a norm or a softmax casts to float32, whatever it is given, it stays in float64."""
    with (
        mock.patch("torch.float32", torch.float64),
        mock.patch.object(Tensor, "float", Tensor.double),
    ):
        yield


def rows(real: Real, output: Tensor, wanted: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """The gradients of each entry of the output, by torch.func; in training by autograd, as
    torch.func may draw other masks.

    (Its convolutions lay out their outputs otherwise, and masks are drawn in the order of memory.)
    """
    units = torch.eye(output.numel(), dtype=output.dtype).reshape(-1, *output.shape)
    if real.train:
        return [
            torch.autograd.grad(
                output, list(wanted.values()), e, retain_graph=True, materialize_grads=True
            )
            for e in units
        ]
    model, inputs, _ = built(real)
    of = lambda p: run(real, lambda **given: functional_call(model, p, (), given), inputs)[0]
    again, pull = vjp(of, {name: p.detach() for name, p in wanted.items()})
    assert torch.allclose(again, output, rtol=1e-12, atol=1e-14)
    return [tuple(pull(e)[0].values()) for e in units]


def truth(real: Real) -> tuple[Dense, dict[str, Tensor]]:
    """Dense derivatives in the parameters that are reached, and the gradients of these."""
    model, inputs, criterion = built(real)
    output, target = run(real, model, inputs)
    criterion(output, target).backward(retain_graph=True)
    wanted = {name: p for name, p in model.named_parameters() if p.grad is not None}
    parts = zip(*rows(real, output, wanted), strict=True)
    j = {name: torch.stack(part) for name, part in zip(wanted, parts, strict=True)}
    of, z = lambda z: criterion(z.reshape(output.shape), target), output.detach().flatten()
    gradient = {name: p.grad.clone() for name, p in wanted.items()}
    samples = torch.arange(len(z)) // (len(z) // N)
    found = Dense(j, hessian(of)(z), torch.func.grad(of)(z), samples, N)
    for name, grad in gradient.items():
        assert torch.allclose(found.batch_grad(name).sum(0), grad, rtol=1e-9, atol=1e-12), name
    if real.train:
        assert not torch.allclose(output, run(real, model, inputs, seed=3)[0]), (
            "nothing was dropped"
        )
    return found, gradient


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[real]'")


@pytest.mark.parametrize("name", REAL)
def test_exact(name):
    real = REAL[name]
    needs(real.package)
    expected, gradients = truth(real)
    model, inputs, criterion = built(real)
    loss = nnj.extend(criterion)
    nnj.extend(model)
    small = [
        m
        for m in model.modules()
        if 0 < sum(p.numel() for p in m.parameters(recurse=False)) <= LARGEST_BLOCK
    ]
    with (
        nnj.collect(
            "ggn_diag",
            "batch_grad",
            "ggn_diag_mc",
            samples=DRAWS,
            generator=torch.Generator().manual_seed(0),
        ),
        nnj.collect("ggn_block", modules=small, memory=1),
    ):
        output, target = run(real, model, inputs)
        value = loss(output, target)
        value.backward()
    curvature = hessian_of_loss(loss, torch.ones_like(value), output.detach(), target)
    (drawn,) = curvature.to_outputs(curvature.sample(DRAWS, torch.Generator().manual_seed(0)))
    faults: list[str] = []
    for name, p in model.named_parameters():
        if name not in gradients:
            there = [
                getattr(p, quantity, None)
                for quantity in ("ggn_diag", "batch_grad", "ggn_diag_mc", "grad")
            ]
            faults += [f"{name} was not reached"] * any(t is not None for t in there)
            continue
        faults += [f"grad of {name} differs"] * (not torch.equal(p.grad, gradients[name]))
        mc = sum(expected.shares(v.flatten(), name).square().sum(0) for v in drawn) / DRAWS
        for quantity, right in (
            ("ggn_diag", expected.diag(name)),
            ("batch_grad", expected.batch_grad(name)),
            ("ggn_diag_mc", mc),
        ):
            fault = close(getattr(p, quantity), right)
            faults += [f"{quantity} of {name} {fault}"] if fault else []
    faults += blocks(model, small, expected)
    assert faults == []


def blocks(model: nn.Module, small: list[nn.Module], expected: Dense) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    faults, compared = [], 0
    for m in small:
        own = [names[id(p)] for p in m.parameters(recurse=False) if p.requires_grad]
        if not own or any(name not in expected.jacobian for name in own):
            continue
        fault = close(m.ggn_block, expected.block(own))
        faults += [f"ggn_block of {own} {fault}"] if fault else []
        compared += 1
    assert compared
    return faults


@pytest.mark.parametrize("name", ["resnet", "mobilenet v2", "segformer"])
def test_batch_norm_in_training_is_refused(name):
    """It couples samples; the gradients are intact."""
    real = REAL[name]
    needs(real.package)
    plain, inputs, criterion = built(real)
    criterion(*run(real, plain.train(), inputs)).backward()
    model, inputs, criterion = built(real)
    loss = nnj.extend(criterion)
    with (
        nnj.collect("ggn_diag"),
        pytest.raises(nnj.NNJError, match=r"BatchNorm2d in training mode .* call model\.eval\(\)"),
    ):
        loss(*run(real, nnj.extend(model).train(), inputs)).backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    )


def test_the_loss_of_the_model_itself_is_refused():
    """Given labels, a model of transformers calls a function of torch, which nobody has
    extended.
    """
    needs("transformers")
    model, inputs, _ = built(REAL["gpt2"])
    with pytest.raises(nnj.NNJError, match="no extended loss took part"), nnj.collect("ggn_diag"):
        nnj.extend(model)(**inputs, labels=inputs["input_ids"]).loss.backward()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_checkpoints(name):
    """Layers that are run again in the backward pass, with the masks of dropout that they had."""
    real = REAL[f"{name}, sdpa, dropout"]
    needs(real.package)
    diagonals = []
    for checkpoints in (False, True):
        model, inputs, criterion = built(real)
        if checkpoints:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        nnj.extend(model)
        loss = nnj.extend(criterion)
        with nnj.collect("ggn_diag", "batch_grad"):
            loss(*run(real, model, inputs)).backward()
        diagonals.append(
            {
                name: (p.ggn_diag, p.batch_grad)
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )
    for name, (diag, shares) in diagonals[0].items():
        assert close(diagonals[1][name][0], diag) == close(diagonals[1][name][1], shares) == "", (
            name
        )
