"""How strongly should elastic weight consolidation hold on? As the Fisher of *samples* says.

A network learns upright digits, then digits rotated by 90 degrees, with a penalty on leaving the
first weights: strength / 2 sum F (w - w0)^2, in which 1 is the strength of the first task's own
Laplace posterior (Kirkpatrick et al. 2017). F is the mean over samples of their squared gradients
(`ggn_diag_empirical`), or the exact diagonal of the GGN. Much code squares the gradient of the
batch instead, which vanishes where a network is trained to the end: it is no Fisher, and much too
small. Then both networks are merged into one, each weight by its curvature (Matena and Raffel
2022).

    python examples/ewc.py [--out ewc.png] [--quick]
"""

import argparse
import copy
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import nnj

KINDS = {
    "exact GGN": "#00798c",
    "empirical Fisher of samples": "#edae49",
    "squared batch gradient": "#d1495b",
}


def trained(model, x, y, epochs, penalty=lambda model: 0.0):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            (cross_entropy(model(x[i]), y[i]) + penalty(model)).backward()
            optimizer.step()
    return model


def fishers(model, x, y):
    """F of each kind, of the mean loss, by the names of parameters."""
    fit = nnj.fit(model, nn.CrossEntropyLoss(), [(x, y)], "ggn_diag", "ggn_diag_empirical")
    grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    squared = {n: g.square() for (n, _), g in zip(model.named_parameters(), grads, strict=True)}
    mean = lambda f: {n: t / len(x) for n, t in f.items()}
    kinds = (mean(fit["ggn_diag"]), mean(fit["ggn_diag_empirical"]), squared)
    return dict(zip(KINDS, kinds, strict=True))


def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def merged(models, weights):
    """The mean of two networks, parameter by parameter."""
    found = copy.deepcopy(models[0])
    with torch.no_grad():
        for (name, p), *others in zip(
            found.named_parameters(), *(m.parameters() for m in models), strict=True
        ):
            f = [w[name] + 1e-3 for w in weights]
            p.copy_((f[0] * others[0] + f[1] * others[1]) / (f[0] + f[1]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="ewc.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    images, y = torch.tensor(data.images).float()[order] / 8 - 1, torch.tensor(data.target)[order]
    tasks = [images.flatten(1), images.rot90(1, (1, 2)).flatten(1)]
    train, test, epochs = slice(0, 900), slice(900, None), 5 if options.quick else 15
    first = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    first = trained(first, tasks[0][train], y[train], epochs)
    old = {n: p.detach().clone() for n, p in first.named_parameters()}
    said = lambda model: [accuracy(model, t[test], y[test]) for t in tasks]
    print(f"after the first task: upright {said(first)[0]:.3f}, rotated {said(first)[1]:.3f}")
    known = fishers(first, tasks[0][train], y[train])
    sizes = {kind: sum(t.sum().item() for t in f.values()) for kind, f in known.items()}
    strengths = [10.0**k for k in range(-1, 6, 3 if options.quick else 1)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for kind, color in KINDS.items():
        points = []
        for strength in strengths:
            penalty = lambda model, f=known[kind], c=strength: (
                c
                / 2
                * sum((f[n] * (p - old[n]).square()).sum() for n, p in model.named_parameters())
            )
            torch.manual_seed(1)
            second = trained(copy.deepcopy(first), tasks[1][train], y[train], epochs, penalty)
            points.append(said(second))
        best = max(range(len(points)), key=lambda k: sum(points[k]))
        print(
            f"{kind:28} trace {sizes[kind]:8.2g}, best at strength {strengths[best]:g}: upright "
            f"{points[best][0]:.3f}, rotated {points[best][1]:.3f}"
        )
        for axis, accuracies in zip(axes, zip(*points, strict=True), strict=True):
            axis.semilogx(strengths, accuracies, "o-", color=color, label=kind)
    torch.manual_seed(1)
    free = trained(copy.deepcopy(first), tasks[1][train], y[train], epochs)
    for axis, task, value in zip(
        axes, ("upright (first)", "rotated (second)"), said(free), strict=True
    ):
        axis.axhline(value, color="0.6", lw=1, ls=":", label="no penalty")
        axis.axvline(1, color="0.8", lw=1, label="first task's posterior")
        axis.set(xlabel="strength of the penalty", title=f"accuracy on {task} digits")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(options.out, dpi=110)
    even = [{n: torch.ones_like(t) for n, t in old.items()}] * 2
    pair = [known["exact GGN"], fishers(free, tasks[1][train], y[train])["exact GGN"]]
    for name, weights in (("mean of both networks", even), ("weighted by the GGN", pair)):
        one, two = said(merged([first, free], weights))
        print(f"{name:28} upright {one:.3f}, rotated {two:.3f}")
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
