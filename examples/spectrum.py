"""How does curvature change as a network learns? The spectrum of its GGN, matrix-free.

`nnj.GGN` is the Gauss-Newton matrix of a data set as a linear operator: its largest eigenvalues by
SciPy's Lanczos, its trace exactly. A few eigenvalues, about as many as there are classes, stand far
out of the rest (Sagun et al. 2018; Papyan 2019); here they rise while the network learns what
separates classes, and fall when it is sure.

    python examples/spectrum.py [--out spectrum.png] [--quick]
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import nnj

SHOWN = 30  # eigenvalues


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="spectrum.png")
    parser.add_argument("--quick", action="store_true")
    options, start, data = parser.parse_args(), time.perf_counter(), load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(data.target))[: 200 if options.quick else 1000]
    x = torch.tensor(data.images).float().flatten(1)[order] / 8 - 1
    y = torch.tensor(data.target)[order]
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    ggn = nnj.GGN(model, nn.CrossEntropyLoss(), [(x, y)], scale="mean")
    size = ggn.shape[0]
    steps = (0, 20) if options.quick else (0, 10, 30, 100, 300, 1000)
    found, done = {}, 0
    for step in steps:
        while done < step:
            i = torch.randint(len(x), (50,))
            optimizer.zero_grad()
            cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            done += 1
        with torch.no_grad():
            loss = cross_entropy(model(x), y).item()
        found[step] = ggn.eigsh(k=SHOWN)[0].flip(0), ggn.trace().item(), loss
        values, trace, _ = found[step]
        print(
            f"step {step:5}: loss {loss:6.3f}, trace {trace:7.2f}, largest {values[0]:6.2f}, "
            f"part of the first 9 of {size} eigenvalues {values[:9].sum() / trace:.3f}"
        )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(found)).tolist())
    for color, (step, (values, _, _)) in zip(colors, found.items(), strict=True):
        left.semilogy(
            range(1, SHOWN + 1), values.clamp(min=1e-6), "o-", ms=3, color=color, label=step
        )
    left.axvline(9.5, color="0.7", lw=1, ls=":")
    left.set(xlabel="eigenvalue", title="the largest eigenvalues")
    left.legend(frameon=False, title="after step", ncols=2, fontsize=9)
    right.plot([trace for _, trace, _ in found.values()], "o-", color="#d1495b", label="trace")
    right.plot(
        [v[0] for v, _, _ in found.values()], "o-", color="#00798c", label="largest eigenvalue"
    )
    right.plot([loss for _, _, loss in found.values()], "o-", color="0.5", label="loss")
    right.set(xlabel="step", yscale="log", title="curvature rises, then falls")
    right.set_xticks(range(len(found)), list(found))
    right.legend(frameon=False)
    figure.savefig(options.out, dpi=110)
    print(f"{options.out}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    plt.switch_backend("Agg")  # needs no screen
    main()
