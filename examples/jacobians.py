"""The eight products of nnj on a small network, each beside the same from the dense Jacobian; and
the variance of predictions.

    python examples/jacobians.py

For sample n, J is the matrix of the derivatives of its outputs in its inputs, (out, in), or in all
P parameters, (out, P). A network of any size has products with J; only here, where it is small, J
itself can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import nnj

SHOWN = 5


def dense(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """J in the input, (N, out, in), and in the parameters, (N, out, P), by torch.func."""
    params = dict(model.named_parameters())
    run = lambda p, z: functional_call(model, p, (z[None],))[0]
    of_input = vmap(jacrev(run, argnums=1), (None, 0))(params, x)
    of_params = vmap(jacrev(run), (None, 0))(params, x)
    return of_input.detach(), torch.cat([j.flatten(2) for j in of_params.values()], 2).detach()


def show(call: str, formula: str, found: Tensor, expected: Tensor) -> float:
    """Prints the first numbers of both; gives the largest difference."""
    error = (found - expected).abs().max().item()
    numbers = lambda t: " ".join(f"{v:8.4f}" for v in t.flatten()[:SHOWN].tolist())
    print(f"{call:62}{formula:12}{tuple(found.shape)!s:14}")
    print(f"    nnj    {numbers(found)}\n    dense  {numbers(expected)}    difference {error:.0e}")
    return error


def tutorial(model: nn.Module, x: Tensor) -> float:
    """The eight products. Nothing has to be extended for them; models may be residual or recurrent,
    or have attention.
    """
    j, w = dense(model, x)
    n, out, p = w.shape
    errors = []

    def line(call: str, formula: str, found: Tensor, expected: Tensor) -> None:
        errors.append(show(call, formula, found, expected))

    print(
        "1. The Jacobian itself, for each sample: of the outputs in the inputs, or in the "
        "parameters."
    )
    line("nnj.jacobian(model, x)", "J", nnj.jacobian(model, x), j)
    line('nnj.jacobian(model, x, "weight")', "J", nnj.jacobian(model, x, "weight"), w)

    print("\n2. How the outputs move when the inputs, or the parameters, move along v.")
    v, direction = torch.randn(n, j.shape[2]), torch.randn(p)
    line("nnj.jvp(model, x, v)", "J v", nnj.jvp(model, x, v), torch.einsum("noi,ni->no", j, v))
    line(
        'nnj.jvp(model, x, direction, "weight")',
        "J v",
        nnj.jvp(model, x, direction, "weight"),
        w @ direction,
    )

    print(
        "\n3. What a gradient u at the outputs becomes at the parameters: the gradient of each "
        "sample on its own."
    )
    u = torch.randn(n, out)
    line(
        'nnj.vjp(model, x, u, "weight")',
        "u J",
        nnj.vjp(model, x, u, "weight"),
        torch.einsum("no,nop->np", u, w),
    )

    print(
        "\n4. and 5. The same for several directions at once, the columns, or the rows, of a "
        "matrix M."
    )
    m = torch.randn(n, j.shape[2], 4)
    line("nnj.jmp(model, x, M)", "J M", nnj.jmp(model, x, m), j @ m)
    m = torch.randn(n, 4, out)
    line('nnj.mjp(model, x, M, "weight")', "M J", nnj.mjp(model, x, m, "weight"), m @ w)

    print(
        "\n6. A metric on the outputs, pulled back: the Gauss-Newton matrix, with M the Hessian of "
        "a loss in the outputs."
    )
    m = torch.randn(n, out, out)
    line(
        'nnj.jTmjp(model, x, M, "weight", joint=True)',
        "J^T M J",
        nnj.jTmjp(model, x, m, "weight", joint=True),
        w.mT @ m @ w,
    )
    line(
        'nnj.jTmjp(model, x, M, "weight")[0]',
        "its block",
        nnj.jTmjp(model, x, m, "weight")[0],
        (w.mT @ m @ w)[:, :18, :18],
    )
    line(
        'nnj.jTmjp(model, x, M, "weight", to_diag=True)',
        "diagonal",
        nnj.jTmjp(model, x, m, "weight", to_diag=True),
        (w.mT @ m @ w).diagonal(dim1=1, dim2=2),
    )

    print("\n7. A metric on the inputs or the parameters, pushed forward: covariances go this way.")
    m = torch.randn(n, j.shape[2], j.shape[2])
    line("nnj.jmjTp(model, x, M)", "J M J^T", nnj.jmjTp(model, x, m), j @ m @ j.mT)
    variance = torch.rand(p)
    line(
        'nnj.jmjTp(model, x, variance, "weight", from_diag=True)',
        "J M J^T",
        nnj.jmjTp(model, x, variance, "weight", from_diag=True),
        w * variance @ w.mT,
    )

    print("\nAnd for pairs of samples, J1 at x1 and J2 at x2, as contrastive losses have them.")
    x2 = torch.randn_like(x)
    _, w2 = dense(model, x2)
    line(
        'nnj.jTmjp_pair(model, x, x2, None, "weight", to_diag=True)[1]',
        "J1^T J2",
        nnj.jTmjp_pair(model, x, x2, None, "weight", to_diag=True)[1],
        (w * w2).sum(1),
    )

    print(
        "\nWith diag_backprop=True only the diagonal of a metric goes from layer to layer: one "
        "backward pass, whatever the"
    )
    print(
        "number of outputs. That is an approximation, except in the last layer. The largest "
        "relative errors:"
    )
    exact = nnj.jTmjp(model, x, None, "weight", to_diag=True)
    cut = nnj.jTmjp(model, x, None, "weight", to_diag=True, diag_backprop=True)
    last = sum(q.numel() for q in list(model.parameters())[-2:])
    ratio = lambda a, b: ((a - b).abs().max() / b.abs().max()).item()
    print(
        f"    first layer {ratio(cut[:, :18], exact[:, :18]):.2f}    last layer "
        f"{ratio(cut[:, -last:], exact[:, -last:]):.0e}"
    )
    return max(errors)


def predictive(seed: int = 0, draws: int = 20000) -> tuple[Tensor, Tensor]:
    """The variance of a regression's predictions under a diagonal Laplace posterior: linearised,
    and by sampling weights.

    The posterior precision is that of the data, sum_n diag(J^T J) / noise^2, and of the prior.
    Where the posterior is narrow the network is linear in its weights over it, so that both must
    agree; jmjTp needs one pass, and draws no numbers."""
    torch.manual_seed(seed)
    x = torch.linspace(-2, 2, 200)[:, None]
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    noise, prior = 0.1, 1.0
    precision = nnj.jTmjp(model, x, None, "weight", to_diag=True).sum(0) / noise**2 + prior
    shrink = 20.0  # a posterior so narrow that the network is linear over it
    variance = 1 / (precision * shrink)
    z = torch.linspace(-3, 3, 7)[:, None]
    linear = nnj.jmjTp(model, z, variance, "weight", from_diag=True, to_diag=True)[:, 0]

    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)
    mean = torch.cat([p.detach().flatten() for p in model.parameters()])
    weights = mean + variance.sqrt() * torch.randn(draws, len(mean))
    parts = weights.split([s.numel() for s in shapes], 1)
    stacked = {name: t.reshape(-1, *s) for name, s, t in zip(names, shapes, parts, strict=True)}
    samples = vmap(lambda p: functional_call(model, p, (z,)))(stacked)[..., 0]
    sampled = samples.var(0).detach()
    print(
        "\nThe standard deviation of a prediction: linearised by jmjTp, in one pass, and from "
        "samples of the weights."
    )
    print(f"{'x':>8}{'jmjTp':>12}{f'{draws} samples':>16}")
    for at, a, b in zip(
        z[:, 0].tolist(), linear.sqrt().tolist(), sampled.sqrt().tolist(), strict=True
    ):
        print(f"{at:8.1f}{a:12.5f}{b:16.5f}")
    return linear, sampled


def main() -> None:
    """Prints the tutorial, and ends in one number for each of its halves."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model, x = (
        nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(4, 2),
    )
    error = tutorial(model, x)
    linear, sampled = predictive()
    ratio = (linear / sampled).sqrt()
    print(f"\nlargest difference of a product from the dense one: {error:.1e}")
    print(f"linearised by sampled standard deviation: {ratio.min():.3f} to {ratio.max():.3f}")


if __name__ == "__main__":
    main()
