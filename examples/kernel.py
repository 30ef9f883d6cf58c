"""Is a trained network its tangent kernel? Kernel regression with `nnj.ntk`, before and after.

The tangent kernel of a network is J J^T between samples (Jacot et al. 2018). Ridge regression with
that of the network at its start is what infinitely wide networks learn; with that after training it
shows what features were learned. `nnj.ntk` makes both layer by layer, and never the joint Jacobian.

    python examples/kernel.py [--out kernel.png] [--quick]
"""

import argparse
import copy
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import mse_loss, one_hot

import nnj


def trained(model, x, target, epochs):
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            mse_loss(model(x[i]), target[i]).backward()
            optimizer.step()
    return model


def kernel(model, x1, x2):
    """The mean over classes of the kernel of equal ones, (N, N')."""
    parts = [nnj.ntk(model, part, x2, per_class=True).mean(2) for part in x1.split(200)]
    return torch.cat(parts).double()


def regression(model, x, target, others, ridge=1e-3):
    """The eigenvalues of the kernel, and what ridge regression says of others."""
    k = kernel(model, x, x)
    damping = ridge * k.diagonal().mean() * torch.eye(len(k))
    centre = target.double().mean(0)
    weights = torch.linalg.solve(k + damping, target.double() - centre)
    return torch.linalg.eigvalsh(k).flip(0), kernel(model, others, x) @ weights + centre


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="kernel.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images).float()[order, None] / 8 - 1
    y = torch.tensor(data.target)[order]
    count = 200 if options.quick else 600
    train, test = slice(0, count), slice(count, count + 200 if options.quick else None)
    conv = lambda i, o: (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    fresh = nn.Sequential(*conv(1, 16), *conv(16, 32), nn.Flatten(), nn.Linear(128, 10))
    target = one_hot(y, 10).float()
    network = trained(fresh, x[train], target[train], 15 if options.quick else 40)
    right = lambda said: (said.argmax(1) == y[test]).float().mean().item()
    with torch.no_grad():
        found = {"the network itself": right(network(x[test]))}
    figure, (bars, axes) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = ("#9a7aa0", "#edae49", "#00798c")
    for (name, model), color in zip(
        {"kernel at the start": fresh, "kernel after training": network}.items(),
        colors[1:],
        strict=True,
    ):
        values, said = regression(model, x[train], target[train], x[test])
        found[name] = right(said)
        axes.loglog(range(1, len(values) + 1), values / values.sum(), color=color, label=name)
        part = values[:10].sum() / values.sum()
        print(f"{name:22} the first 10 of {len(values)} eigenvalues have {part:.3f} of the trace")
    for name, value in found.items():
        print(f"{name:22} accuracy {value:.3f}")
    drawn = bars.barh(list(found), list(found.values()), color=colors)
    bars.bar_label(drawn, fmt="%.3f", padding=3)
    bars.set(xlim=(0.8, 1.02), xticks=(0.8, 0.9, 1))
    bars.set_title(f"accuracy on {len(y[test])} digits, {count} for training")
    axes.set(xlabel="eigenvalue", ylabel="its part of the trace", title="spectrum of the kernel")
    axes.set_ylim(1e-7, 1)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
