"""One function for each tool: `prepare(model, x, y)` gives `run()`, which gives the exact GGN
diagonal in the tool's own idiom.

The loss is the mean cross entropy; the result is one tensor for each parameter, in the order of
`model.parameters()`. What a tool cannot do is left to raise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], list[Tensor]]
MEMORY = {"nnj": 2**28, "nnj-lean": 2**25}  # what columns may take: the default, and less


def split(flat: Tensor, model: nn.Module) -> list[Tensor]:
    """A flat vector as tensors of the shapes of the parameters."""
    params = list(model.parameters())
    return [
        part.reshape(p.shape)
        for part, p in zip(flat.split([p.numel() for p in params]), params, strict=True)
    ]


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """One gradient, as a measure."""
    loss_func = nn.CrossEntropyLoss()

    def run() -> list[Tensor]:
        model.zero_grad()
        loss_func(model(x), y).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    return run


def nnj(model: nn.Module, x: Tensor, y: Tensor, memory: int = MEMORY["nnj"]) -> Run:
    import nnj

    nnj.extend(model)
    loss_func = nnj.extend(nn.CrossEntropyLoss())

    def run() -> list[Any]:
        model.zero_grad()
        with nnj.collect("ggn_diag", memory=memory):
            loss_func(model(x), y).backward()
        return [p.ggn_diag for p in model.parameters()]

    return run


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    params = list(model.parameters())  # the converter below puts them in another order
    convert = not isinstance(model, nn.Sequential) or any(len(list(m.children())) for m in model)
    extended, loss_func = extend(model, use_converter=convert), extend(nn.CrossEntropyLoss())

    def run() -> list[Any]:
        extended.zero_grad()
        with backpack(DiagGGNExact()):
            loss_func(extended(x), y).backward()
        return [p.diag_ggn_exact for p in params]

    return run


def nngeometry(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def run() -> list[Tensor]:
        f = FIM(
            model=model,
            loader=loader,
            representation=PMatDiag,
            variant="classif_logits",
            device=x.device,
        )
        return split(f.get_diag(), model)

    return run


def asdfghjkl(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """ASDL; the exact Fisher information, which for cross entropy is the GGN. It needs no
    labels.
    """
    from asdl import FisherConfig, get_fisher_maker
    from asdl.matrices import FISHER_EXACT, SHAPE_DIAG

    config = FisherConfig(FISHER_EXACT, [SHAPE_DIAG], loss_type="cross_entropy", data_size=len(x))
    maker = get_fisher_maker(model, config)

    def run() -> list[Tensor]:
        maker.setup_model_call(model, x)
        maker.forward_and_backward()
        found = {}
        for m in model.modules():
            fisher = getattr(m, "fisher", None)
            if fisher is not None:
                for name, p in m.named_parameters(recurse=False):
                    found[p] = getattr(fisher.diag, name)
        lost = [name for name, p in model.named_parameters() if p not in found]
        if lost:
            raise NotImplementedError(f"nothing for {lost[0]}")
        return [found[p] for p in model.parameters()]

    return run


def laplace(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """laplace-torch with its default backend, curvlinops; its GGN is that of the sum.

    (curvlinops by itself has only estimates of a diagonal, or products with the P columns of the
    identity.)"""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag")

    def run() -> list[Tensor]:
        la.fit(loader)
        return split(la.H / len(x), model)

    return run


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """Plain torch: jacrev under vmap, N x C x P numbers."""
    from torch.func import functional_call, jacrev, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}

    def run() -> list[Tensor]:
        one = lambda q, row: functional_call(model, q, (row[None],))[0]
        p = model(x).detach().softmax(1)
        jacobian = vmap(jacrev(one), (None, 0))(params, x)
        found = []
        for name in params:
            j = jacobian[name].flatten(2)
            mean = torch.einsum("nc,ncp->np", p, j)
            found.append(
                (torch.einsum("nc,ncp->p", p, j.square_()) - mean.square().sum(0)) / len(x)
            )
        return [t.reshape(q.shape) for t, q in zip(found, params.values(), strict=True)]

    return run


def jax(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """Jitted: the vjp of every column of the factor of the Hessian, under vmap, for every sample.

    Samples under vmap on a GPU; on a CPU one after the other, which was 12 times faster on an MLP
    and never slower."""
    import jax
    import jax.numpy as jnp

    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("not written in JAX")
    if x.is_cuda and jax.default_backend() != "gpu":
        raise NotImplementedError("this jaxlib has no GPU")
    # float32, as torch has it; else a GPU rounds to TF32
    jax.config.update("jax_default_matmul_precision", "highest")
    layers = [_jax_layer(m) for m in model]
    weights = [
        [jnp.asarray(p.detach().cpu().numpy()) for p in m.parameters(recurse=False)] for m in model
    ]
    data = jnp.asarray(x.cpu().numpy())

    def network(params: Any, row: Any) -> Any:
        z = row[None]
        for layer, p in zip(layers, params, strict=True):
            z = layer(z, *p)
        return z[0]

    def sample(params: Any, row: Any) -> Any:
        z, back = jax.vjp(lambda q: network(q, row), params)
        p = jax.nn.softmax(z)
        columns = jnp.sqrt(p)[:, None] * (jnp.eye(len(p)) - p[None])
        return jax.tree.map(lambda g: jnp.square(g).sum(0), jax.vmap(back)(columns)[0])

    @jax.jit
    def diagonal(params: Any, data: Any) -> Any:
        if x.is_cuda:
            return jax.tree.map(lambda t: t.mean(0), jax.vmap(sample, (None, 0))(params, data))
        add = lambda total, row: (jax.tree.map(jnp.add, total, sample(params, row)), None)
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), data)
        return jax.tree.map(lambda t: t / len(data), total)

    def run() -> list[Tensor]:
        found = jax.block_until_ready(diagonal(weights, data))
        return [torch.from_dlpack(t).to(x.device) for t in jax.tree.leaves(found)]

    return run


def _jax_layer(m: nn.Module) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    if isinstance(m, nn.Linear):
        return lambda z, w, b: z @ w.T + b
    if isinstance(m, nn.Conv2d):
        pad = [(p, p) for p in m.padding]
        return lambda z, w, b: (
            jax.lax.conv_general_dilated(z, w, m.stride, pad) + b[None, :, None, None]
        )
    if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)):
        k, s = ((v, v) if isinstance(v, int) else v for v in (m.kernel_size, m.stride))

        def pool(z: Any) -> Any:
            over = [0, 0]
            if m.ceil_mode:
                over = [
                    max(0, (-(-(n - k[i]) // s[i])) * s[i] + k[i] - n)
                    for i, n in enumerate(z.shape[2:])
                ]
            pad = [(0, 0), (0, 0), (0, over[0]), (0, over[1])]
            window, stride = (1, 1, *k), (1, 1, *s)
            if isinstance(m, nn.MaxPool2d):
                return jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, window, stride, pad)
            return jax.lax.reduce_window(z, 0.0, jax.lax.add, window, stride, pad) / (k[0] * k[1])

        return pool
    plain: dict[type, Callable[..., Any]] = {
        nn.ReLU: jax.nn.relu,
        nn.Tanh: jnp.tanh,
        nn.Flatten: lambda z: z.reshape(len(z), -1),
    }
    if type(m) not in plain:
        raise NotImplementedError(f"{type(m).__name__} is not written in JAX")
    return plain[type(m)]


def reference(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    """Sample by sample, some columns at a time: in float64 what all are compared with, in float32
    the lean way in plain torch.
    """
    from torch.func import functional_call, vjp, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}
    step = max(1, min(64, 2**28 // sum(p.numel() for p in params.values())))

    def run() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in params.values()]
        for row in x:
            z, back = vjp(lambda q, row=row: functional_call(model, q, (row[None],))[0], params)
            p = z.softmax(0)
            columns = p.sqrt()[:, None] * (torch.eye(len(p), dtype=p.dtype, device=p.device) - p)
            for part in columns.split(step):
                for t, g in zip(total, vmap(back)(part)[0].values(), strict=True):
                    t += g.square_().sum(0)
        return [t / len(x) for t in total]

    return run


TOOLS: dict[str, Callable[[nn.Module, Tensor, Tensor], Run]] = {
    "nnj": nnj,
    "nnj-lean": functools.partial(nnj, memory=MEMORY["nnj-lean"]),
    "backpack": backpack,
    "nngeometry": nngeometry,
    "asdfghjkl": asdfghjkl,
    "laplace": laplace,
    "torch.func": torch_func,
    "by-sample": reference,
    "jax": jax,
    "gradient": gradient,
    "reference": reference,
}
NAMES = {
    "nnj": "nnj",
    "nnj-compiled": "nnj.compile",
    "nnj-lean": "nnj, memory=2**25",
    "backpack": "BackPACK",
    "nngeometry": "NNGeometry",
    "asdfghjkl": "ASDL",
    "laplace": "laplace-torch (curvlinops)",
    "opacus": "Opacus",
    "torch.func": "torch.func",
    "func-compiled": "torch.func, compiled",
    "by-sample": "torch.func by sample",
    "jax": "JAX",
}
PACKAGES = {
    "nnj": ["nnj"],
    "nnj-compiled": [],
    "nnj-lean": [],
    "backpack": ["backpack-for-pytorch"],
    "nngeometry": ["nngeometry"],
    "asdfghjkl": ["asdfghjkl"],
    "laplace": ["laplace-torch", "curvlinops-for-pytorch"],
    "opacus": ["opacus"],
    "torch.func": [],
    "func-compiled": [],
    "by-sample": [],
    "jax": ["jax"],
}
