"""Which training samples are mislabelled? Those that harm held-out digits, by EKFAC influence.

A tenth of the labels of 900 digits is wrong. To first order, leaving sample n out of the training
changes the loss of held-out digits by g_n^T (M + damping)^-1 g, with g_n the gradient of its loss,
g that of the held-out loss, and M the curvature (Koh and Liang 2017; with EKFAC, Grosse et al.
2023). `solve` gives s = (M + damping)^-1 g once, and g_n^T s is r_n . J_n s with r_n = p_n - y_n: a
product of Jacobians, so that no gradient of a sample is ever formed. Beside it is the loss of each
sample, which says less once the network has memorised wrong labels.

    python examples/influence.py [--out influence.png] [--quick]
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import nnj


def trained(x, y, epochs):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model


def harm(model, x, y, held_out, damping):
    """How much each training sample raises the loss of held-out digits."""
    loader = list(zip(x.split(150), y.split(150), strict=True))
    curvature = nnj.fit(model, nn.CrossEntropyLoss(), loader, "ekfac", scale="mean").matrix("ekfac")
    loss = cross_entropy(model(held_out[0]), held_out[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    direction = curvature.solve(gradient, damping)
    found = []
    for xs, ys in loader:
        at = nnj.linearize(model, xs)
        found.append(-((at.y.softmax(1) - one_hot(ys, 10)) * at.jvp(direction)).sum(1))
    return torch.cat(found)


def precision(score, wrong):
    """The part of the k highest that is mislabelled, for each k."""
    hits = wrong[score.argsort(descending=True)].float()
    return hits.cumsum(0) / torch.arange(1, len(hits) + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="influence.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images).float().flatten(1)[order] / 8 - 1
    y = torch.tensor(data.target)[order]
    wrong = torch.rand(900) < 0.1
    given = torch.where(wrong, (y[:900] + torch.randint(1, 10, (900,))) % 10, y[:900])
    curves = {"EKFAC influence": [], "loss of the sample": []}
    for seed in range(1 if options.quick else 3):
        torch.manual_seed(seed)
        model = trained(x[:900], given, 120)
        scores = harm(model, x[:900], given, (x[900:1350], y[900:1350]), damping=1e-3)
        loss = cross_entropy(model(x[:900]), given, reduction="none").detach()
        for name, score in zip(curves, (scores, loss), strict=True):
            curves[name].append(precision(score, wrong))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    count = int(wrong.sum())
    for (name, found), color in zip(curves.items(), ("#00798c", "#d1495b"), strict=True):
        stacked = torch.stack(found)
        low, high = stacked.min(0).values, stacked.max(0).values
        axes.plot(range(1, 301), stacked.mean(0)[:300], color=color, label=name)
        axes.fill_between(range(1, 301), low[:300], high[:300], color=color, alpha=0.15)
        print(f"{name:20} finds {stacked[:, count - 1].mean():.3f} of {count} in as many samples")
    axes.axvline(count, color="0.6", lw=1, ls=":")
    axes.text(count + 3, 0.03, f"{count} samples are mislabelled", color="0.4")
    axes.set(xlabel="k samples that are looked at", ylabel="mislabelled among them", ylim=(0, 1.03))
    axes.set_title("Wrong labels that a network has memorised are found by their influence")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
