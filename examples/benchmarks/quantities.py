"""Other quantities than the diagonal, by every tool that has them: `prepare(model, x, y)` gives
`run()`, as in tools.py.

    batch_grad            (N, *p) for each parameter, of the mean loss
    batch_grad_sq_norm    (N,) for each parameter
    kfac                  diag(S) (x) diag(A) of each weight, of its shape, of exact columns (KFLR,
                          expand), which all tools scale in ways of their own: see coming_from.md
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tools import TOOLS, Run, gradient
from torch import Tensor, nn

Prepare = Callable[[nn.Module, Tensor, Tensor], Run]
Read = Callable[[nn.Module], list[Tensor]]


def weights(model: nn.Module) -> list[nn.Module]:
    """The modules that have Kronecker factors in every tool."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def diagonal_of(left: Tensor, right: Tensor, m: nn.Module) -> Tensor:
    """diag(S) (x) diag(A) as the weight is laid out."""
    return torch.outer(left.diagonal(), right.diagonal()).reshape(m.weight.shape)


def of_parameters(name: str) -> Read:
    return lambda model: [getattr(p, name) for p in model.parameters()]


def of_factors(model: nn.Module) -> list[Tensor]:
    kfacs = [(m, m.kfac.block("weight")) for m in weights(model)]
    return [diagonal_of(k.left[0], k.right[0], m) for m, k in kfacs]


def eager(quantity: str, read: Read, **options: Any) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        import nnj

        nnj.extend(model)
        loss_func = nnj.extend(nn.CrossEntropyLoss())

        def run() -> list[Tensor]:
            model.zero_grad()
            with nnj.collect(quantity, **options):
                loss_func(model(x), y).backward()
            return read(model)

        return run

    return prepare


def replayed(quantity: str, read: Read, **options: Any) -> Prepare:
    """By nnj.compile: what is timed is replayed."""

    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        import nnj

        step = nnj.compile(model, nn.CrossEntropyLoss(), quantity, **options)

        def run() -> list[Tensor]:
            model.zero_grad()
            step(x, y)
            return read(model)

        for _ in range(4):
            run()
        if step.replays == 0:
            raise NotImplementedError("; ".join(step.reasons))
        return run

    return prepare


def backpack(extension: str, read: Read) -> Prepare:
    def prepare(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        from backpack import backpack, extend, extensions

        plain = isinstance(model, nn.Sequential) and not any(list(m.children()) for m in model)
        extended = extend(model, use_converter=not plain)
        loss_func, make = extend(nn.CrossEntropyLoss()), getattr(extensions, extension)

        def run() -> list[Tensor]:
            extended.zero_grad()
            with backpack(make()):
                loss_func(extended(x), y).backward()
            return read(model)

        return run

    return prepare


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from opacus import GradSampleModule

    wrapped, loss_func = GradSampleModule(model), nn.CrossEntropyLoss()

    def run() -> list[Tensor]:
        wrapped.zero_grad()
        for p in model.parameters():
            p.grad_sample = None
        loss_func(wrapped(x), y).backward()
        return [p.grad_sample / len(x) for p in model.parameters()]  # theirs is that of a sum

    return run


def gradients(model: nn.Module, x: Tensor, y: Tensor, compile: bool = False) -> Run:
    """torch.func: the gradient of one sample under vmap."""
    from torch.func import functional_call, grad, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (row[None],)), target[None]) / len(x)

    every: Any = vmap(grad(loss), (None, 0, 0))
    every = torch.compile(every) if compile else every
    return lambda: list(every(params, x, y).values())


def compiled_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    return gradients(model, x, y, compile=True)


def norms(prepare: Prepare) -> Prepare:
    """Squared norms of the gradients that another function gives."""

    def made(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        run = prepare(model, x, y)
        return lambda: [t.flatten(1).square().sum(1) for t in run()]

    return made


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from curvlinops import FisherType, KFACLinearOperator

    found = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type=FisherType.TYPE2,
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    names = {m: name for name, m in model.named_modules()}

    def run() -> list[Tensor]:
        found._input_covariances, found._gradient_covariances = {}, {}
        found.compute_kronecker_factors()
        sides = found._gradient_covariances, found._input_covariances
        return [diagonal_of(*(s[names[m]] for s in sides), m) for m in weights(model)]

    return run


def asdl(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from asdl import FisherConfig, get_fisher_maker
    from asdl.matrices import FISHER_EXACT, SHAPE_KRON

    config = FisherConfig(FISHER_EXACT, [SHAPE_KRON], loss_type="cross_entropy", data_size=len(x))
    maker = get_fisher_maker(model, config)

    def run() -> list[Tensor]:
        maker.setup_model_call(model, x)
        maker.forward_and_backward()
        return [diagonal_of(m.fisher.kron.B, m.fisher.kron.A, m) for m in weights(model)]

    return run


def factors(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """S and A by plain autograd: a backward pass for each column of the Hessian's factor."""
    layers = weights(model)

    def run() -> list[Tensor]:
        kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        hooks = [
            m.register_forward_hook(lambda m, given, out: kept.update({m: (given[0], out)}))
            for m in layers
        ]
        z = model(x)
        for hook in hooks:
            hook.remove()
        p = z.detach().softmax(1)
        diagonal = [torch.zeros(m.weight.shape[0], dtype=x.dtype) for m in layers]
        for c in range(z.shape[1]):
            unit = F.one_hot(torch.tensor(c), z.shape[1])
            column = p[:, c : c + 1].sqrt() * (unit - p) / len(x) ** 0.5
            outs = [kept[m][1] for m in layers]
            for s, g in zip(
                diagonal, torch.autograd.grad(z, outs, column, retain_graph=True), strict=True
            ):
                s += g.movedim(1, -1).flatten(0, -2).square().sum(0)
        return [
            torch.outer(s, _moment(m, kept[m][0].detach())).reshape(m.weight.shape)
            for s, m in zip(diagonal, layers, strict=True)
        ]

    return run


def _moment(m: nn.Module, u: Tensor) -> Tensor:
    """diag(A): the mean square of the inputs, over samples and places."""
    if isinstance(m, nn.Conv2d):
        u = F.unfold(u, m.kernel_size, m.dilation, m.padding, m.stride).mT
    return u.flatten(0, -2).square().mean(0)


def kflr(model: nn.Module) -> list[Tensor]:
    return [diagonal_of(*m.weight.kflr, m) for m in weights(model)]


SEPARATE = {"bias": "separate"}
QUANTITIES: dict[str, dict[str, Prepare]] = {
    "ggn_diag": {**TOOLS, "nnj-compiled": replayed("ggn_diag", of_parameters("ggn_diag"))},
    "batch_grad": {
        "nnj": eager("batch_grad", of_parameters("batch_grad")),
        "nnj-compiled": replayed("batch_grad", of_parameters("batch_grad")),
        "backpack": backpack("BatchGrad", of_parameters("grad_batch")),
        "opacus": opacus,
        "torch.func": gradients,
        "func-compiled": compiled_gradients,
        "gradient": gradient,
        "reference": gradients,
    },
    "batch_grad_sq_norm": {
        "nnj": eager("batch_grad_sq_norm", of_parameters("batch_grad_sq_norm")),
        "nnj-compiled": replayed("batch_grad_sq_norm", of_parameters("batch_grad_sq_norm")),
        "backpack": backpack("BatchL2Grad", of_parameters("batch_l2")),
        "opacus": norms(opacus),
        "torch.func": norms(gradients),
        "func-compiled": norms(compiled_gradients),
        "gradient": gradient,
        "reference": norms(gradients),
    },
    "kfac": {
        "nnj": eager("kfac", of_factors, **SEPARATE),
        "nnj-compiled": replayed("kfac", of_factors, **SEPARATE),
        "backpack": backpack("KFLR", kflr),
        "laplace": curvlinops,
        "asdfghjkl": asdl,
        "gradient": gradient,
        "reference": factors,
    },
}
