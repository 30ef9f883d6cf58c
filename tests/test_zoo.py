"""Every quantity on every model of the table, against dense derivatives; and the gradient is what it is without nnj."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nnj
from tests.truth import Truth
from tests.zoo import CASES, Case

ALL = ("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad")


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return tuple(double(v) for v in value) if isinstance(value, tuple) else value


def setting(case: Case):
    torch.manual_seed(0)
    model = case.make().double()
    inputs, target = case.data()
    loss = case.loss()
    return model, double(inputs), double(target), loss


def scalar(loss, outputs, target):
    (f,) = outputs
    return loss(*f) if isinstance(f, tuple) else loss(f, target)


def flat(outputs):
    return [t for f in outputs for t in (f if isinstance(f, tuple) else (f,))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_quantities_are_exact(case):
    model, inputs, target, loss = setting(case)
    plain = copy.deepcopy(model)
    twin = copy.deepcopy(model) if case.twin is None else case.twin(copy.deepcopy(model))
    pair = loss if not isinstance(loss, nn.Module) else None
    regroup = (lambda f: [tuple(f)]) if target is None else (lambda f: f)
    truth = Truth(twin, lambda run: flat(case.outputs(run, *inputs)), lambda f: scalar(pair or loss, regroup(f), target))

    scalar(loss, case.outputs(plain, *inputs), target).backward()
    nnj.extend(model, batch_axis=case.axis)
    extended = nnj.extend(copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss)
    with nnj.collect(*ALL, samples=2):
        scalar(extended, case.outputs(model, *inputs), target).backward()

    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not p.requires_grad:
            assert p.grad is None and not any(hasattr(p, quantity) for quantity in ALL)
        elif q.grad is None:
            assert p.grad is None and p.ggn_diag is None and p.batch_grad is None
        else:
            assert torch.equal(p.grad, q.grad), "the gradient is not bit for bit what it is without nnj"
            close(p.ggn_diag, truth.diag(name), f"ggn_diag of {name}")
            close(p.batch_grad.sum(0), truth.grad(name), f"batch_grad of {name}, summed")
            assert p.ggn_diag_mc.shape == p.shape and bool((p.ggn_diag_mc >= 0).all())
    check_blocks(model, truth)
    if target is not None:
        check_samples(case, model, truth, case.outputs(model, *inputs)[0])


def check_blocks(model, truth):
    known = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        own = [p for _, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not own:
            assert not hasattr(module, "ggn_block")
        elif all(p.grad is None for p in own):
            assert module.ggn_block is None
        else:
            close(module.ggn_block, truth.block([known[id(p)] for p in own]), f"ggn_block of {type(module).__name__}")


def check_samples(case, model, truth, f):
    rows = f.shape[0]
    owner = torch.arange(rows) if case.owner is None else case.owner(rows)
    n = int(owner.max()) + 1
    each = owner.reshape(-1, *[1] * (f.dim() - 1)).expand(f.shape).reshape(-1)
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            close(p.batch_grad, truth.sample_grads(name, each, n), f"batch_grad of {name}")


def close(found, expected, what):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("memory", [1, 2**14], ids=["one column at a time", "some"])
def test_memory_does_not_change_results(memory):
    case = next(c for c in CASES if c.name == "transformer")
    model, inputs, target, loss = setting(case)
    nnj.extend(model)
    nnj.extend(loss)
    with nnj.collect(*ALL[:2]):
        loss(model(*inputs), target).backward()
    before = [p.ggn_diag for p in model.parameters()], [m.ggn_block for m in model.modules() if hasattr(m, "ggn_block")]
    with nnj.collect(*ALL[:2], memory=memory):
        loss(model(*inputs), target).backward()
    for p, d in zip(model.parameters(), before[0], strict=True):
        close(p.ggn_diag, d, "ggn_diag")
    for m, b in zip([m for m in model.modules() if hasattr(m, "ggn_block")], before[1], strict=True):
        close(m.ggn_block, b, "ggn_block")


def test_training_dropout_uses_the_mask_of_the_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(5, 6).double(), 0.5)

    class Masked(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m

        def forward(self, x):
            return self.m[3](self.m[2](self.m[0](x) * mask))

    loss = nn.CrossEntropyLoss()
    truth = Truth(Masked(copy.deepcopy(model)), lambda run: [run(x)], lambda f: loss(f[0], y))
    nnj.extend(model)
    nnj.extend(loss)
    with nnj.collect("ggn_diag"):
        torch.manual_seed(1)
        loss(model(x), y).backward()
    for name, p in model.named_parameters():
        close(p.ggn_diag, truth.diag(f"m.{name}"), name)


def test_monte_carlo_has_the_right_mean_and_variance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, y = torch.randn(6, 3).double(), torch.randint(0, 5, (6,))
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    generator = torch.Generator().manual_seed(2)
    draws = []
    for _ in range(400):
        with nnj.collect("ggn_diag", "ggn_diag_mc", samples=3, generator=generator):
            loss(model(x), y).backward()
        draws.append(torch.cat([p.ggn_diag_mc.reshape(-1) for p in model.parameters()]))
    exact = torch.cat([p.ggn_diag.reshape(-1) for p in model.parameters()])
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / 20 + 1e-12)
    assert bool((error.abs() < 5).all()), "biased"
    # (sum_k e_k b_k)^2 has the variance 2 ((sum b^2)^2 - sum b^4) for each sample; samples are independent, draws divide it
    j = torch.func.jacrev(lambda p: torch.func.functional_call(copy.deepcopy(model), p, (x,)))(
        {n: p.detach() for n, p in model.named_parameters()})
    j = torch.cat([t.reshape(6, 5, -1) for t in j.values()], -1)
    s = nnj.SoftmaxCurvature(model(x).detach(), 1 / 6).columns(0, 4)[:, :, 0]
    b = torch.einsum("knc,ncp->knp", s, j)
    variance = (2 * (b.square().sum(0).square() - b.pow(4).sum(0))).sum(0) / 3
    ratio = draws.var(0).sum() / variance.sum()
    assert 0.8 < float(ratio) < 1.25
