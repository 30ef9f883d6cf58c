"""Can a network do without nine of ten weights? If the others make up for them.

Weights are removed with no training afterwards: the smallest; those of the least w^2 ggn_diag,
which is twice what each costs to second order (LeCun, Denker and Solla 1990), at once, or in ten
steps between which curvature is asked again; and the smallest, whereupon the others of each row are
solved for, by least squares of what the layer gives on its inputs: their second moments
(`input_moment`) with damping, as in GPTQ and SparseGPT (Hassibi and Stork 1993). On this network
curvature chooses no better than size does, and the solve is what helps.

    python examples/pruning.py [--out pruning.png] [--quick]
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


def trained(x, y, epochs):
    model = nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def masked(model, scores, part):
    """Without the `part` of all weights that score least."""
    found = copy.deepcopy(model)
    cut = torch.cat([s.flatten() for s in scores.values()]).quantile(part)
    with torch.no_grad():
        for name, p in weights(found).items():
            p *= scores[name] > cut
    return found


def by_curvature(model, loader, part, steps):
    """Without those of the least w^2 ggn_diag / 2, a few at a time."""
    for k in range(1, steps + 1):
        h = nnj.fit(model, nn.CrossEntropyLoss(), loader, "ggn_diag")["ggn_diag"]
        scores = {name: w.detach().square() * h[name] for name, w in weights(model).items()}
        model = masked(model, scores, 1 - (1 - part) ** (k / steps))
    return model


def solved(model, loader, scores, part, damping=1e-2):
    """Without the smallest; of the others the least squares of what the layer gives."""
    moments = nnj.fit(model, nn.CrossEntropyLoss(), loader, "input_moment")["input_moment"]
    found = masked(model, scores, part)
    for name, w in weights(found).items():
        a = moments[name.removesuffix(".weight")][0]
        a = a + damping * a.diagonal().mean() * torch.eye(len(a))
        for row, old in zip(w.data, weights(model)[name].detach(), strict=True):
            kept = row != 0
            row[kept] = torch.linalg.solve(a[kept][:, kept], a[kept] @ old)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="pruning.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images).float().flatten(1)[order] / 8 - 1
    y = torch.tensor(data.target)[order]
    model = trained(x[:1000], y[:1000], 10 if options.quick else 40)
    loader = list(zip(x[:1000].split(100), y[:1000].split(100), strict=True))
    size = {name: w.detach().abs() for name, w in weights(model).items()}
    ways = {
        "size": lambda part: masked(model, size, part),
        "curvature": lambda part: by_curvature(model, loader, part, 1),
        "curvature, in ten steps": lambda part: by_curvature(model, loader, part, 10),
        "size, the others solved for": lambda part: solved(model, loader, size, part),
    }
    parts = [0.5, 0.8, 0.9] if options.quick else [0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    accuracy = lambda m: (m(x[1000:]).argmax(1) == y[1000:]).float().mean().item()
    full = accuracy(model)
    print(f"{'all weights':28}{full:.3f}")
    for (name, way), color in zip(
        ways.items(), ("#d1495b", "#9a7aa0", "#edae49", "#00798c"), strict=True
    ):
        found = {part: accuracy(way(part)) for part in parts}
        print(f"{name:28}" + ", ".join(f"{found[p]:.3f} without {p:.0%}" for p in (0.5, 0.8, 0.9)))
        axes.plot([100 * p for p in parts], list(found.values()), "o-", color=color, label=name)
    axes.axhline(full, color="0.6", lw=1, ls=":")
    axes.set(xlabel="weights removed (%)", ylabel="accuracy on other digits", ylim=(0, 1.03))
    axes.set_title("Weights removed by ..., with no training afterwards")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
