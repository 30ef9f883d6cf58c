"""Does a network know when it does not know? Laplace posteriors of a small residual CNN.

The network learns the digits of about three people (scikit-learn's come writer after writer), and
is tested on others', and on rotated ones: as it is, with a temperature chosen on held-out digits,
and as the mean over a Gaussian posterior of its weights, whose prior is chosen on the same ones.

    python examples/digits.py [--out digits.png] [--quick] [--evidence]

--evidence adds the prior of the highest marginal likelihood. It misleads here: a network trained to
the end without weight decay is at no mode of a posterior, and that prior comes out far too wide.
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

import nnj

entropy = lambda p: -torch.special.xlogy(p, p).sum(1)
SHOWN = {"plain": "#d1495b", "tempered": "#9a7aa0", "Kronecker Laplace": "#00798c"}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        conv = lambda: nn.Conv2d(channels, channels, 3, padding=1)
        self.body = nn.Sequential(conv(), nn.ReLU(inplace=True), conv())

    def forward(self, x):
        return (self.body(x) + x).relu_()


def trained(x, y, epochs, c=16, batch=50, rate=3e-3):
    first = [nn.Conv2d(1, c, 3, padding=1), nn.ReLU(inplace=True), Residual(c), nn.MaxPool2d(2)]
    model = nn.Sequential(*first, Residual(c), nn.Flatten(), nn.Linear(16 * c, 10))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(x) // batch)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            schedule.step()
    return model


def ways(model, train, held_out, evidence):
    """How probabilities come about, by name."""
    logits = lambda x: model(x).detach()
    heats, (x, y) = torch.logspace(-0.5, 1, 61), held_out
    heat = min(heats, key=lambda t: cross_entropy(logits(x) / t, y))
    found = {"plain": lambda x: logits(x).softmax(1)}
    found["tempered"] = lambda x: (logits(x) / heat).softmax(1)
    kinds = {"diagonal Laplace": "ggn_diag", "Kronecker Laplace": "kfac", "last layer": "kfac"}
    for name, quantity in {**kinds, **({"evidence": "ggn_diag"} if evidence else {})}.items():
        options = {"modules": [model[-1]]} if name == "last layer" else {}
        post = nnj.laplace(model, nn.CrossEntropyLoss(), [train], quantity, **options)
        if name == "evidence":
            post.tune_evidence()
        else:
            post.tune_heldout([held_out], [0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5])
        found[name] = lambda x, post=post: post.predict_proba(x, batch_size=200)
    return found


def reliability(p, y, bins=10):
    """Of each bin of the confidence that holds digits: how many, mean confidence, accuracy."""
    confidence, guess = p.max(1)
    index = (confidence * bins).long().clamp(max=bins - 1)
    some = [index == b for b in index.unique()]
    return torch.tensor([[b.sum(), confidence[b].mean(), (guess == y)[b].sum()] for b in some]).T


def scores(p, rotated, y):
    count, confidence, right = reliability(p, y)
    nll = -p.gather(1, y[:, None]).clamp_min(1e-30).log().mean()
    error = (count * confidence - right).abs().sum() / len(y)
    strange = roc_auc_score([0] * len(y) + [1] * len(y), entropy(torch.cat([p, rotated])))
    return [right.sum().item() / len(y), nll.item(), error.item(), strange]


def picture(path, images, y, clean, rotated):
    plt.switch_backend("Agg")  # needs no screen
    figure = plt.figure(figsize=(12, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    top.suptitle("The test digits that the posterior is least sure of, and what is said of them")
    axes = top.subplots(2, 8, height_ratios=[1.5, 1])
    unsure = entropy(clean["Kronecker Laplace"]).argsort(descending=True)[:8].tolist()
    for image, bars, i in zip(*axes, unsure, strict=True):
        image.imshow(images[i, 0], cmap="gray_r")
        image.set_title(f"written: {y[i]}", fontsize=10)
        image.axis("off")
        for name, at in (("plain", -0.2), ("Kronecker Laplace", 0.2)):
            bars.bar(torch.arange(10) + at, clean[name][i], 0.4, color=SHOWN[name])
        bars.set(ylim=(0, 1), yticks=[], xticks=range(0, 10, 3), frame_on=False)
    curve, histogram = bottom.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color="0.7", lw=1)
    for name, color in SHOWN.items():
        count, confidence, right = reliability(clean[name], y)
        curve.plot(confidence, right / count, color=color, label=name)
        curve.scatter(confidence, right / count, 150 * count / len(y), color=color)
        if name == "tempered":
            continue
        options = dict(bins=25, range=(0, 2.31), density=True, color=color)
        histogram.hist(entropy(clean[name]), alpha=0.35, label=f"{name}, test", **options)
        options |= {"histtype": "step", "lw": 1.8, "label": f"{name}, rotated by 90°"}
        histogram.hist(entropy(rotated[name]), **options)
    curve.set(xlabel="confidence", ylabel="accuracy", title="Is it right as often as it says?")
    histogram.set(xlabel="entropy", title="Does it notice that a digit is strange?", yscale="log")
    curve.legend(frameon=False)
    histogram.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="digits.png")
    for flag in ("--quick", "--evidence"):
        parser.add_argument(flag, action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    y, images = torch.tensor(data.target), torch.tensor(data.images).float()[:, None] / 16
    x = (images - images[:400].mean()) / images[:400].std()
    test, table, said = slice(797, 1097 if options.quick else None), {}, []
    for seed in range(1 if options.quick else 3):
        torch.manual_seed(seed)
        model = trained(x[:400], y[:400], 25 if options.quick else 60)
        asked = ways(model, (x[:400], y[:400]), (x[400:797], y[400:797]), options.evidence)
        for name, say in asked.items():
            said.append((name, say(x[test]), say(x[test].rot90(1, (2, 3)))))
            table.setdefault(name, []).append(scores(*said[-1][1:], y[test]))
    print(f"400 training, 397 held-out, {len(y[test])} test digits, {seed + 1} seeds (deviation)")
    print(" " * 19 + "".join(f"{c:>16}" for c in ("accuracy", "NLL", "ECE", "AUROC rotated")))
    for name, rows in table.items():
        deviation, mean = torch.std_mean(torch.tensor(rows), 0, correction=0)
        cells = zip(mean.tolist(), deviation.tolist(), strict=True)
        print(f"{name:19}" + "".join(f"{a:8.3f} ({b:.3f})" for a, b in cells))
    shown = [{s[0]: s[k] for s in said[: len(table)]} for k in (1, 2)]
    picture(options.out, images[test], y[test], *shown)
    print(f"{options.out} shows the first seed's. {time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
