"""What does a network know that it does not know? A Laplace posterior for a small residual CNN on
handwritten digits.

The digits come with scikit-learn. They are not shuffled: labels repeat after 130, as if writer
followed writer, so the network learns from about three people and is tested on others, on digits
rotated by 90 degrees, and on noisy ones. It says how sure it is as a plain network, and as the mean
over a Gaussian posterior of its weights,

    p(weights | data) = N(theta, 1 / (ggn_diag + prior precision)),

in the model linearised at theta. nnj gives both parts: ggn_diag, and the variance of the logits
(jmjTp).

    python examples/digits.py [--out digits.png] [--quick]
"""

import argparse
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import nnj

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

CLASSES, BINS = 10, 10
NAMES = {
    "plain": "plain network",
    "tempered": "tempered, held-out digits",
    "evidence": "Laplace, marginal likelihood",
    "held-out": "Laplace, held-out digits",
}
COLORS = {"plain": "#d1495b", "tempered": "#9a7aa0", "evidence": "#edae49", "held-out": "#00798c"}


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.body(x)
        y += x
        return self.act(y)


def network(channels=16):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        Residual(channels),
        nn.MaxPool2d(2),
        Residual(channels),
        nn.Flatten(),
        nn.Linear(channels * 16, CLASSES),
    )


def train(model, x, y, epochs, batch=50, rate=3e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * -(-len(x) // batch)
    )
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            schedule.step()


def progress(batches, what):
    if tqdm is not None:
        yield from tqdm(batches, what, unit="batch", leave=True)
        return
    for i, batch in enumerate(batches, 1):
        print(f"{what}: batch {i} of {len(batches)}", flush=True)
        yield batch


# -- the Laplace posterior -------------------------------------------------------------------------


def flat(parts):
    return torch.cat([p.detach().flatten() for p in parts])


def curvature(model, x, y, batch=20):
    """log p(data | theta), and the diagonal of the GGN of its negative."""
    # A sum, not a mean: the loss is then -log p(data | theta), and its GGN adds to the precision of
    # the prior as it is.
    loss_func = nnj.extend(nn.CrossEntropyLoss(reduction="sum"))
    total = 0.0
    with nnj.collect("ggn_diag"):
        for xs, ys in progress(list(zip(x.split(batch), y.split(batch), strict=True)), "ggn_diag"):
            loss = loss_func(model(xs), ys)
            loss.backward()  # batches add up, as .grad does
            total -= loss.item()
    return total, flat(p.ggn_diag for p in model.parameters())


def evidence(log_likelihood, theta, h, prior):
    """log p(data | prior) by Laplace's method, for the prior N(0, 1 / prior); the powers of 2 pi
    cancel.
    """
    # log p(data | theta) - theta^T P theta / 2
    fit = log_likelihood - prior * theta.square().sum() / 2
    return fit - torch.log1p(h / prior).sum() / 2  # + log det P / 2 - log det (H + P) / 2


def predict(model, x, variances, draws=500, batch=100):
    """E[softmax(f)], (N, 10), for each variance of the weights: of the model linearised at theta,
    the logits f are Gaussian.

    Their mean is what the network says, their covariance J diag(variance) J^T, with J the Jacobian
    in all weights."""
    # the same for every digit
    noise = torch.randn(draws, CLASSES, 1, generator=torch.Generator().manual_seed(0))
    found = {name: [] for name in variances}
    for xs in x.split(batch):
        with torch.no_grad():
            mean = model(xs)
        for name, variance in variances.items():
            covariance = nnj.jmjTp(
                model, xs, variance.expand(len(xs), -1), wrt="weight", from_diag=True
            )
            root = torch.linalg.cholesky(covariance + 1e-5 * torch.eye(CLASSES))
            found[name].append((mean + (root @ noise[:, None]).squeeze(-1)).softmax(-1).mean(0))
    return {name: torch.cat(parts) for name, parts in found.items()}


# -- what it is worth ------------------------------------------------------------------------------


def nll(p, y):
    return -p.gather(1, y[:, None]).clamp_min(1e-30).log().mean().item()


def entropy(p):
    return -torch.special.xlogy(p, p).sum(1)


def reliability(p, y):
    """For each bin of the confidence that holds digits: how many, their mean confidence, their
    accuracy.
    """
    confidence, guess = p.max(1)
    right, index = (guess == y).float(), (confidence * BINS).long().clamp(max=BINS - 1)
    bins = [index == b for b in range(BINS) if (index == b).any()]
    return torch.tensor([[b.sum(), confidence[b].mean(), right[b].mean()] for b in bins]).T


def calibration_error(p, y):
    count, confidence, accuracy = reliability(p, y)
    return ((count / count.sum()) @ (confidence - accuracy).abs()).item()


def auroc(usual, strange):
    """How well the entropy tells strange digits from usual ones: 1 always, 0.5 never."""
    labels = [0] * len(usual) + [1] * len(strange)
    return roc_auc_score(labels, torch.cat([entropy(usual), entropy(strange)]))


def table(clean, rotated, noisy, y):
    print(f"\n{'':30}{'accuracy':>9}{'NLL':>8}{'ECE':>8}{'AUROC rotated':>15}{'AUROC noisy':>13}")
    for name, p in clean.items():
        accuracy = (p.argmax(1) == y).float().mean().item()
        print(
            f"{NAMES[name]:30}{accuracy:9.3f}{nll(p, y):8.3f}{calibration_error(p, y):8.3f}"
            f"{auroc(p, rotated[name]):15.3f}{auroc(p, noisy[name]):13.3f}"
        )


def picture(path, images, y, clean, rotated, log_evidence, held_out, chosen):
    figure = plt.figure(figsize=(13, 9.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    top.suptitle(
        f"The {2 * 7} test digits that the Laplace posterior is least sure of, and what both say",
        fontsize=13,
    )
    axes = top.subplots(4, 7, height_ratios=[1.5, 0.9, 1.5, 0.9])
    for k, i in enumerate(entropy(clean["held-out"]).argsort(descending=True)[: 2 * 7].tolist()):
        image, bars = axes[k // 7 * 2, k % 7], axes[k // 7 * 2 + 1, k % 7]
        image.imshow(images[i, 0], cmap="gray_r", vmin=0, vmax=1)
        image.set_title(f"written: {y[i]}", fontsize=10)
        image.axis("off")
        for name, shift in (("plain", -0.2), ("held-out", 0.2)):
            bars.bar(
                torch.arange(CLASSES) + shift,
                clean[name][i],
                0.4,
                color=COLORS[name],
                label={"plain": "plain network", "held-out": "Laplace"}[name],
            )
        bars.set(ylim=(0, 0.95), yticks=[], xticks=range(CLASSES))
        bars.tick_params(length=0, labelsize=8)
        bars.get_xticklabels()[y[i]].set_fontweight("bold")
        bars.spines[["top", "left", "right"]].set_visible(False)
    axes[1, 0].legend(fontsize=7, frameon=False, loc="upper right", borderaxespad=0)

    curve, histogram, prior = bottom.subplots(1, 3)
    curve.plot([0, 1], [0, 1], color="0.7", lw=1)
    for name, p in clean.items():
        count, confidence, accuracy = reliability(p, y)
        label = f"{NAMES[name]} (ECE {calibration_error(p, y):.3f})"
        curve.plot(confidence, accuracy, color=COLORS[name], label=label)
        curve.scatter(confidence, accuracy, 8 + 150 * count / len(y), color=COLORS[name])
    curve.set(
        xlabel="confidence",
        ylabel="accuracy",
        title="Does it know how often it is right?",
        xlim=(0, 1.03),
        ylim=(-0.42, 1.05),
        yticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
    )
    curve.legend(fontsize=8.5, frameon=False, loc="lower right")

    for name, title in (("plain", "plain"), ("held-out", "Laplace")):
        options = dict(bins=25, range=(0, 2.31), density=True, color=COLORS[name])
        histogram.hist(
            entropy(clean[name]),
            histtype="stepfilled",
            alpha=0.35,
            label=f"{title}, test digits",
            **options,
        )
        histogram.hist(
            entropy(rotated[name]),
            histtype="step",
            lw=1.6,
            label=f"{title}, rotated by 90°",
            **options,
        )
    histogram.set(
        xlabel="entropy of the prediction (nats)",
        ylabel="density",
        yscale="log",
        title="Does it notice that a digit is strange?",
    )
    histogram.legend(fontsize=8, frameon=False)

    prior.semilogx(*log_evidence, color=COLORS["evidence"])
    prior.axvline(chosen["evidence"], color=COLORS["evidence"], ls=":")
    best = log_evidence[1].max()
    prior.set(
        xlabel="prior precision",
        title="How wide should the prior be?",
        ylim=(best - 5000, best + 500),
    )
    prior.set_ylabel("log marginal likelihood", color=COLORS["evidence"])
    other = prior.twinx()
    other.semilogx(*held_out, color=COLORS["held-out"])
    other.axvline(chosen["held-out"], color=COLORS["held-out"], ls=":")
    other.set_ylabel("NLL of held-out digits", color=COLORS["held-out"])
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="digits.png", help="where the picture goes")
    parser.add_argument(
        "--quick", action="store_true", help="fewer epochs and test digits, in a few seconds"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)

    data = load_digits()
    images, y = (
        torch.tensor(data.images, dtype=torch.float32)[:, None] / 16,
        torch.tensor(data.target),
    )
    test = slice(797, 1097 if options.quick else None)
    mean, std = images[:400].mean(), images[:400].std()
    x = (images - mean) / std
    clean = images[test]
    noisy = (clean + 0.5 * torch.randn(clean.shape) - mean) / std

    model = network()
    train(model, x[:400], y[:400], epochs=25 if options.quick else 60)
    nnj.extend(model)
    log_likelihood, h = curvature(model, x[:400], y[:400])
    theta = flat(model.parameters())

    # The prior precision, twice. The marginal likelihood needs no further data, but it trusts a
    # diagonal, which forgets that weights make up for one another, and a theta that no weight decay
    # has brought to the mode: the prior that it likes here is far too wide. So the next 397 digits
    # are asked, too. The test digits choose nothing.
    fine = torch.logspace(0, 5, 51)
    grid = fine[:: 10 if options.quick else 5]
    log_evidence = torch.stack([evidence(log_likelihood, theta, h, prior) for prior in fine])
    others = predict(model, x[400:797], {prior: 1 / (h + prior) for prior in grid})
    held_out = torch.tensor([nll(p, y[400:797]) for p in others.values()])
    chosen = {
        "evidence": fine[log_evidence.argmax()].item(),
        "held-out": grid[held_out.argmin()].item(),
    }

    variances = {name: 1 / (h + prior) for name, prior in chosen.items()}
    # what the same digits can do for the plain network: divide its logits by one number
    with torch.no_grad():
        logits, heats = model(x[400:797]), torch.logspace(-0.5, 1, 61)
        heat = heats[
            torch.tensor([nll((logits / t).softmax(-1), y[400:797]) for t in heats]).argmin()
        ]
    said = []
    for z in (x[test], x[test].rot90(1, (2, 3)), noisy):
        with torch.no_grad():
            plain = {"plain": model(z).softmax(-1), "tempered": (model(z) / heat).softmax(-1)}
        said.append({**plain, **predict(model, z, variances)})
    print(
        f"\n{len(theta)} parameters, 400 training digits, {len(clean)} test digits.\nPrior "
        f"precision: {chosen['evidence']:.0f} by marginal likelihood, {chosen['held-out']:.0f} by "
        f"held-out digits. Temperature: {heat:.2g}."
    )
    table(*said, y[test])
    picture(options.out, clean, y[test], *said[:2], (fine, log_evidence), (grid, held_out), chosen)
    print(f"\n{options.out} shows them. {time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
