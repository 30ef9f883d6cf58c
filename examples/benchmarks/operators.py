"""Products in the weights without J, tangent kernels and operators over a data set, beside what one
would write by hand and what others have.

    python examples/benchmarks/operators.py

Results are compared before anything is timed; times are the least of some rounds, taken by turns,
in milliseconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from harness import where
from networks import mlp
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

import nnj

Run = Callable[[], Tensor]


class Row(NamedTuple):
    """What is compared: nnj's way and another one."""

    name: str
    ours: Run
    other: str
    theirs: Run


def network(scale: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """An MLP 784-256-64-10 with a batch of 32, `scale` times smaller."""
    torch.manual_seed(0)
    model = mlp(784 // scale, 256 // scale, 64 // scale, 10)
    return model, torch.randn(32 // scale, 784 // scale), torch.randint(10, (32 // scale,))


@torch.no_grad()
def by_hand(model: nn.Sequential, x: Tensor, variance: Tensor) -> Tensor:
    """J diag(variance) J^T of an MLP, layer by layer."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    inputs, h = [], x
    for m in model:
        if isinstance(m, nn.Linear):
            inputs.append(h)
        h = m(h)
    parts = variance.split([p.numel() for p in model.parameters()])
    n, c = h.shape
    g, total = torch.eye(c).expand(n, c, c), torch.zeros(n, c, c)
    for i in range(len(layers) - 1, -1, -1):
        weight, bias = parts[2 * i].reshape(layers[i].weight.shape), parts[2 * i + 1]
        along = inputs[i].square() @ weight.mT + bias
        total += (g * along[:, None]) @ g.mT
        if i:
            g = (g @ layers[i].weight) * (inputs[i] > 0)[:, None]
    return total


def jacobian_of(model: nn.Module, x: Tensor) -> Tensor:
    """J in the weights, (N, C, P), by torch.func."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    of_row = lambda q, row: functional_call(model, q, (row[None],))[0]
    found = vmap(jacrev(of_row), (None, 0))(params, x)
    return torch.cat([t.flatten(2) for t in found.values()], 2)


def kernel_by_products(model: nn.Module, x: Tensor) -> Tensor:
    """The tangent kernel by products with it (Novak et al. 2022), by torch.func: (N, C, N, C)."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    of_row = lambda q, row: functional_call(model, q, (row[None],))[0]
    classes = model(x[:1]).shape[1]

    def block(one: Tensor, two: Tensor) -> Tensor:
        _, back, *_ = vjp(lambda q: of_row(q, one), params)
        column = lambda v: jvp(lambda q: of_row(q, two), (params,), back(v))[1]
        return vmap(column)(torch.eye(classes))

    found = vmap(vmap(block, (None, 0)), (0, None))(x, x)  # (N, N, C, C)
    return found.permute(0, 2, 1, 3)


def rows(scale: int) -> Iterator[Row]:
    model, x, y = network(scale)
    p = sum(q.numel() for q in model.parameters())
    variance, at = torch.rand(p), nnj.linearize(model, x)
    ours = lambda: nnj.jmjTp(model, x, variance, "weight", from_diag=True)
    yield Row("J diag J^T, MLP", ours, "by hand", lambda: by_hand(model, x, variance))
    dense = lambda: (jacobian_of(model, x) * variance) @ jacobian_of(model, x).mT
    yield Row("the same", ours, "dense J, torch.func", dense)

    outputs = 3100 // scale
    linear, h = nn.Linear(128, outputs), torch.randn(64 // scale, 128)
    share = torch.rand(outputs * 129)
    w, b = share[: outputs * 128].reshape(outputs, 128), share[outputs * 128 :]
    there = nnj.linearize(linear, h)
    yield Row(
        f"variance of {outputs} outputs, a linear layer",
        lambda: there.variance(share),
        "h² @ var",
        lambda: h.square() @ w.mT + b,
    )

    fit = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "kfac", "ggn_diag")
    kron, diag = (fit.matrix(name).inverse(1.0) for name in ("kfac", "ggn_diag"))
    yield Row(
        "covariance under kfac",
        lambda: at.covariance(kron),
        "under ggn_diag",
        lambda: at.covariance(diag),
    )

    small, few = mlp(10, 32, 3), torch.randn(4, 10)
    yield Row(
        "J of 4 rows, MLP 10-32-3",
        lambda: nnj.jacobian(small, few, "weight"),
        "torch.func",
        lambda: jacobian_of(small, few),
    )

    def contraction() -> Tensor:
        j = jacobian_of(model, x)
        return torch.einsum("ncp,mdp->ncmd", j, j)

    yield Row("tangent kernel, MLP", lambda: nnj.ntk(model, x), "Jacobian contraction", contraction)
    products = lambda: kernel_by_products(model, x)
    yield Row("the same", lambda: nnj.ntk(model, x), "products with it", products)
    yield from operators(model, x, y, p)


def operators(model: nn.Module, x: Tensor, y: Tensor, p: int) -> Iterator[Row]:
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        return
    loss, params, v = nn.CrossEntropyLoss(), list(model.parameters()), torch.randn(p, 8)
    for name, mine, theirs in (
        ("GGN", nnj.GGN, GGNLinearOperator),
        ("Hessian", nnj.HessianOperator, HessianLinearOperator),
    ):
        a = mine(model, loss, [(x, y)], scale="mean", check=False)
        b = theirs(model, loss, params, [(x, y)], check_deterministic=False)
        one = lambda operator, v=v[:, 0]: operator @ v
        yield Row(
            f"{name} @ v", lambda a=a, one=one: one(a), "curvlinops", lambda b=b, one=one: one(b)
        )
        yield Row(f"{name} @ 8 vectors", lambda a=a: a @ v, "curvlinops", lambda b=b: b @ v)


def least(runs: list[Run], repeats: int) -> list[float]:
    """Milliseconds of each, by turns."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="how many times smaller networks are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| what | nnj | beside | | ÷ |")
    print("|---|---|---|---|---|")
    for row in rows(args.scale):
        found, expected = row.ours(), row.theirs()
        if "kfac" not in row.name:  # another matrix
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )
        mine, other = least([row.ours, row.theirs], args.repeats)
        print(
            f"| {row.name} | {mine:.3g} | {row.other} | {other:.3g} | {mine / other:.2g} |",
            flush=True,
        )
    print(f"\n{where(args.threads)}; least of {args.repeats} rounds, by turns.")


if __name__ == "__main__":
    main()
