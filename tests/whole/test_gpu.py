"""The table of models, the layers, the products and fit on a GPU: what is exact on a CPU is exact
there.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import nnj
from nnj.testing import check_layer
from tests.support.cases import CASES, Case
from tests.support.collecting import gradients, wrong
from tests.support.fitting import CLASSES, LOADER, C, X, agree, expected, mlp
from tests.support.layers import CASES as LAYERS
from tests.support.oracle import build, data_of, losses_of, run, truth
from tests.support.products import MODELS, SLOTS, case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
EXACT = ("ggn_diag", "ggn_block", "batch_grad")


@pytest.fixture(autouse=True)
def seeded():
    """A fixed seed."""
    torch.manual_seed(0)


def there(value: Any) -> Any:
    """Tensors and modules on the GPU, in any container."""
    move = lambda t: t.to(DEVICE) if isinstance(t, Tensor | nn.Module) else t
    return tree_map(move, value)


def ran(case: Case, model: nn.Module, losses: tuple[Any, ...]) -> Tensor:
    """The user's code on the GPU; skipped where that is written for a CPU, or draws other random
    numbers there.
    """
    try:
        value = run(case, model, losses, there(data_of(case)))
    except (RuntimeError, TypeError) as error:
        if "same device" in str(error) or "numpy" in str(error):
            pytest.skip("its code makes tensors on the CPU")
        raise
    if not torch.allclose(value.detach().cpu(), truth(case.name).value, rtol=1e-6):
        pytest.skip("it draws other random numbers on a GPU")
    return value


def check_torch(case: Case, model: nn.Module) -> None:
    """Skips a case of which torch's own gradient on a GPU is not as exact as the comparison (the
    norm of weight_norm is summed in float32).
    """
    _, grads = gradients(case)
    for name, p in model.named_parameters():
        expected = grads[name]
        if expected is not None and p.grad is not None:
            largest = float(expected.abs().max())
            if not torch.allclose(p.grad.cpu(), expected, rtol=1e-9, atol=1e-12 * largest):
                pytest.skip("torch's own gradient is another on a GPU")


@pytest.mark.parametrize("name", CASES)
def test_every_model(name):
    case = CASES[name]
    plain, losses = there(build(case)), there(losses_of(case))
    ran(case, plain, losses).backward()
    check_torch(case, plain)
    model = nnj.extend(there(build(case)), batch_axis=case.batch_axis)
    with nnj.collect(*EXACT):
        ran(case, model, tuple(nnj.extend(l) for l in there(losses_of(case)))).backward()
    grads = {n: None if p.grad is None else p.grad.cpu() for n, p in plain.named_parameters()}
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert wrong(case, on_cpu(model), EXACT, grads) == []


def on_cpu(model: nn.Module) -> nn.Module:
    """Its results where those of the table are."""
    for holder in [*model.modules(), *model.parameters()]:
        for name in EXACT:
            found = getattr(holder, name, None)
            if isinstance(found, Tensor):
                assert found.device.type == DEVICE
                setattr(holder, name, found.cpu())
    return model


@pytest.mark.parametrize("name, module, x", [pytest.param(*case, id=case[0]) for case in LAYERS])
def test_every_layer(name, module, x):
    check_layer(module().to(DEVICE), x().to(DEVICE), fallback=name.startswith("fallback"))


@pytest.mark.parametrize("backend", ["aot", "cudagraphs"])
@pytest.mark.parametrize("quantity", ["ggn_diag", "batch_grad"])
def test_compiled(backend, quantity):
    model, loss = nnj.extend(mlp().eval().to(DEVICE)), nn.CrossEntropyLoss()
    step = nnj.compile(model, loss, quantity, backend=backend)
    x, y = X.to(DEVICE), CLASSES.to(DEVICE)
    for _ in range(6):
        model.zero_grad()
        step(x.flip(0), y)
        step(x, y)
    assert not step.reasons
    found = [(p.grad, getattr(p, quantity)) for p in model.parameters()]
    model.zero_grad()
    loss = nnj.extend(loss)
    loss(model(x.flip(0)), y).backward()
    with nnj.collect(quantity):
        loss(model(x), y).backward()
    for p, (grad, value) in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(getattr(p, quantity), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrt", SLOTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_product(name, wrt):
    on_cpu, x, j = case(name, wrt)
    model, x = copy.deepcopy(on_cpu).to(DEVICE), x.to(DEVICE)
    n, out, d = j.shape
    u, v, w = (torch.randn(*s).double() for s in ((n, out), (n, d), (n, d, d)))
    j, u, v, w = j.to(DEVICE), u.to(DEVICE), v.to(DEVICE), w.to(DEVICE)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    close(nnj.jacobian(model, x, wrt), j)
    close(nnj.vjp(model, x, u, wrt), torch.einsum("no,nod->nd", u, j))
    close(nnj.jvp(model, x, v, wrt), torch.einsum("nod,nd->no", j, v))
    close(nnj.jmjTp(model, x, w, wrt), j @ w @ j.mT)


def test_draws_and_truncated_columns():
    """Estimates have the right mean, and what `tol` cuts off is a lower bound."""
    model, loss = nnj.extend(mlp().eval().to(DEVICE)), nnj.extend(nn.CrossEntropyLoss())
    x, y = X.to(DEVICE), CLASSES.to(DEVICE)

    def collected(name: str, **options: Any) -> list[Tensor]:
        with nnj.collect(name, **options):
            loss(model(x), y).backward()
        return [getattr(p, name) for p in model.parameters()]

    exact = collected("ggn_diag")
    draws = collected("ggn_diag_mc", samples=4000, generator=torch.Generator(DEVICE))
    lower = collected("ggn_diag", tol=0.5)
    for e, m, b in zip(exact, draws, lower, strict=True):
        torch.testing.assert_close(m, e, rtol=0.2, atol=0.05 * float(e.max()))
        assert bool((b <= e * (1 + 1e-9)).all())


def test_fit_and_mixed_precision():
    fit = nnj.fit(
        mlp().to(DEVICE), nn.CrossEntropyLoss(weight=torch.ones(C).double()), LOADER, "ggn_diag"
    )
    agree({name: t.cpu() for name, t in fit["ggn_diag"].items()}, expected())
    model, loss = nnj.extend(mlp().eval().float().to(DEVICE)), nnj.extend(nn.CrossEntropyLoss())
    x, y = X.float().to(DEVICE), CLASSES.to(DEVICE)
    with nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    full = [p.ggn_diag.clone() for p in model.parameters()]
    with nnj.collect("ggn_diag"), torch.autocast(DEVICE, torch.bfloat16):
        loss(model(x), y).backward()
    for p, f in zip(model.parameters(), full, strict=True):
        assert p.ggn_diag.dtype == p.dtype
        torch.testing.assert_close(p.ggn_diag, f, rtol=0.1, atol=0.05 * float(f.max()))


QUANTITIES = (
    "batch_ggn_diag",
    "batch_grad_sq_norm",
    "batch_grad_dot",
    "ggn_diag_empirical",
    "grad_variance",
    "ggn",
    "kfac",
    "ekfac",
    "input_moment",
)
SOME = ("mlp", "cnn-pooling", "transformer", "embedding-bag", "lora", "bare-used-twice-transposed")


def flat_results(model: nn.Module, context: Any) -> dict[str, Tensor]:
    """All quantities as tensors on the CPU, matrices entry by entry."""
    found = {key: getattr(context, key) for key in ("ggn", "noise_terms", "batch_grad_dot")}
    for path, holder in [*model.named_modules(), *model.named_parameters()]:
        for name in QUANTITIES:
            value = vars(holder).get(name)
            if value is not None:
                dense = value if isinstance(value, Tensor) else value.dense()
                found[f"{name} of {path}"] = dense
    return {key: value.cpu() for key, value in found.items()}


@pytest.mark.parametrize("name", SOME)
def test_every_quantity_as_on_a_cpu(name):
    case, found = CASES[name], []
    for move in (lambda value: value, there):
        model = nnj.extend(move(build(case)), batch_axis=case.batch_axis)
        losses = tuple(nnj.extend(loss) for loss in move(losses_of(case)))
        with nnj.collect(*QUANTITIES) as context:
            run(case, model, losses, move(data_of(case))).backward()
        found.append(flat_results(model, context))
        m = context.matrix("kfac")
        v = torch.linspace(0, 1, m.shape[0], dtype=m.dtype, device=m.device)
        found[-1]["solution"] = m.solve(v, 0.1).cpu()
    on_cpu, on_gpu = found
    assert on_gpu.keys() == on_cpu.keys()
    for key, value in on_cpu.items():
        if "ekfac" in key:  # eigenvectors of equal eigenvalues may be others
            torch.testing.assert_close(on_gpu[key].trace(), value.trace())
            continue
        scale = 1e-9 * float(value.abs().max())
        torch.testing.assert_close(
            on_gpu[key], value, rtol=1e-7, atol=scale, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_linear_map_and_operators_as_on_a_cpu():
    model, x = mlp().eval(), X
    fit = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "kfac")
    expected = nnj.linearize(model, x).covariance(fit.matrix("kfac").inverse(1.0))
    kernel = nnj.ntk(model, x, x[:3])
    v = torch.linspace(-1, 1, 43).double()
    ggn = nnj.GGN(model, nn.CrossEntropyLoss(), LOADER) @ v
    hessian = nnj.HessianOperator(model, nn.CrossEntropyLoss(), LOADER) @ v
    model, x, v = there(model), there(x), there(v)
    matrix = nnj.fit(model, nn.CrossEntropyLoss(), LOADER, "kfac").matrix("kfac").inverse(1.0)
    assert matrix.device.type == DEVICE
    torch.testing.assert_close(nnj.linearize(model, x).covariance(matrix).cpu(), expected)
    torch.testing.assert_close(nnj.ntk(model, x, x[:3]).cpu(), kernel)
    found = nnj.GGN(model, nn.CrossEntropyLoss(), LOADER)
    torch.testing.assert_close((found @ v).cpu(), ggn)
    assert found.solve(v, 1.0, 1e-12).device.type == DEVICE
    found = nnj.HessianOperator(model, nn.CrossEntropyLoss(), LOADER)
    torch.testing.assert_close((found @ v).cpu(), hessian)
