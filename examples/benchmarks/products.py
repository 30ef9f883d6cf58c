"""What products cost: vjp and jvp of a CNN against torch's own, and a diagonal GGN by diag_backprop
against one gradient.

    python examples/benchmarks/products.py [--batch 64] [--rounds 15]

The results are compared first. Then the two are timed in turn, and the medians and their ratio
printed."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import nnj


def network() -> nn.Sequential:
    """A CNN for images of 28 x 28 pixels, as in the original nnj."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each in seconds, all measured in turn so that a busy machine slows them
    alike.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def pairs(
    model: nn.Module, x: Tensor
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], float]]:
    """What is compared: nnj's product, torch's, and how many times slower nnj's may be."""
    params = [p for p in model.parameters() if p.requires_grad]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    u, v = torch.randn_like(model(x)), torch.randn_like(x)
    direction = [torch.randn_like(p) for p in params]
    flat = torch.cat([d.flatten() for d in direction])

    def grad_input() -> Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(model(z), z, u)[0].flatten(1)

    def jvp_input() -> Tensor:
        return torch.func.jvp(model, (x,), (v,))[1]

    def jvp_weight() -> Tensor:
        run = lambda p: torch.func.functional_call(model, p, (x,))
        values = dict(zip(names, (p.detach() for p in params), strict=True))
        return torch.func.jvp(run, (values,), (dict(zip(names, direction, strict=True)),))[1]

    return {
        "vjp, input": (lambda: nnj.vjp(model, x, u), grad_input, 1.5),
        "jvp, input": (lambda: nnj.jvp(model, x, v.flatten(1)), jvp_input, 1.5),
        "jvp, weight": (lambda: nnj.jvp(model, x, flat, "weight"), jvp_weight, 1.5),
    }


def layer_by_layer(model: nn.Sequential, x: Tensor) -> Tensor:
    """diag(J^T J) in the weights with the diagonal alone between layers, for each sample, by dense
    Jacobians.
    """
    points = [x]
    for layer in model:
        points.append(layer(points[-1]).detach())
    m, parts = torch.ones_like(points[-1]), []
    for layer, z in reversed(list(zip(model, points, strict=False))):
        for wrt in ("weight", "input"):
            params = {name: p.detach() for name, p in layer.named_parameters()}
            if wrt == "weight" and not params:
                continue
            run = lambda p, t, layer=layer: torch.func.functional_call(
                layer, p, (t[None],)
            ).flatten()
            j = torch.func.vmap(torch.func.jacrev(run, argnums=int(wrt == "input")), (None, 0))(
                params, z
            )
            j = j.flatten(2) if wrt == "input" else torch.cat([t.flatten(2) for t in j.values()], 2)
            found = torch.einsum("noi,no->ni", j.square(), m.flatten(1))
            if wrt == "weight":
                parts.insert(0, found)
        m = found
    return torch.cat(parts, 1)


def main(batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Prints the table; gives for each line the ratio and the limit."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(batch, 1, 28, 28)
    params = list(model.parameters())
    results: dict[str, tuple[float, float]] = {}
    print(f"{batch} samples, {torch.get_num_threads()} threads")
    print(f"{'':28}{'nnj':>10}{'torch':>10}{'ratio':>8}{'limit':>8}")

    def line(
        name: str, ours: Callable[[], object], theirs: Callable[[], object], limit: float
    ) -> None:
        times = interleaved({"nnj": ours, "torch": theirs}, rounds)
        ratio = times["nnj"] / times["torch"]
        results[name] = ratio, limit
        print(
            f"{name:28}{1e3 * times['nnj']:7.2f} ms{1e3 * times['torch']:7.2f} "
            f"ms{ratio:8.2f}{limit:8.1f}",
            flush=True,
        )

    for name, (ours, theirs, limit) in pairs(model, x).items():
        torch.testing.assert_close(ours(), theirs().detach(), rtol=1e-3, atol=1e-4)
        line(name, ours, theirs, limit)

    diagonal = lambda z: nnj.jTmjp(model, z, None, "weight", to_diag=True, diag_backprop=True)
    few = x[:2]
    torch.testing.assert_close(diagonal(few), layer_by_layer(model, few), rtol=1e-3, atol=1e-5)
    target = torch.randint(10, (batch,))
    gradient = lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), target), params)
    line("jTmjp, diag_backprop", lambda: diagonal(x), gradient, 3.0)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    main(**vars(parser.parse_args()))
