"""collect("ggn_diag", tol=…) on a trained network with 100 classes: time and true error against
tol, beside Monte Carlo.

    python examples/benchmarks/tolerance.py --out tolerance

writes tolerance/table.md and figure.png, and with --page the README.md of this folder. A tolerance
leaves out columns of the loss's Hessian that carry little, so the result is a lower bound, and
`collect` reports what is missing. Each sample walks as many columns as it needs; beside it is the
time with as many for all of them. Monte Carlo is given as many columns as the tolerance has kept of
the sample that has most."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import where
from page import option, publish
from torch import Tensor, nn

import nnj
from nnj.collecting import ragged_pass

CLASSES, SIDE = 100, 16
TOLERANCES = (0.3, 0.1, 0.03, 1e-2, 3e-3, 1e-3, 1e-4, 1e-6)


def images(n: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random pictures, one for each class, shifted a little and with noise on them."""
    prototypes = torch.randn(CLASSES, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    prototypes = F.interpolate(prototypes, size=SIDE, mode="bicubic")
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    shift = torch.randint(-2, 3, (n, 2), generator=g)
    x = torch.stack(
        [prototypes[c].roll(tuple(s.tolist()), (1, 2)) for c, s in zip(y, shift, strict=True)]
    )
    return x + noise * torch.randn(x.shape, generator=g), y


def trained(noise: float, epochs: int) -> tuple[nn.Module, float]:
    """A small convolutional network, and its accuracy on data that it has not seen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )
    x, y = images(6000, noise, 1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    x, y = images(2000, noise, 2)
    with torch.no_grad():
        return model, float((model(x).argmax(1) == y).float().mean())


def collected(
    model: nn.Module, loss_func: Any, x: Tensor, y: Tensor, name: str, repeats: int, **options: Any
) -> dict[str, Any]:
    """The diagonal as one vector, the median time, and what the context says."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with nnj.collect(name, **options) as context:
            loss_func(model(x), y).backward()
        seconds.append(time.perf_counter() - start)
    flat = torch.cat([getattr(p, name).flatten() for p in model.parameters()])
    return {
        "value": flat,
        "time": statistics.median(seconds),
        "columns": context.columns,
        "deficit": context.deficit,
    }


@contextmanager
def as_many_for_all() -> Iterator[None]:
    """All samples walk as many columns, as if a part of them cost too much."""
    before, ragged_pass.PART = ragged_pass.PART, math.inf
    try:
        yield
    finally:
        ragged_pass.PART = before


def measure(
    model: nn.Module, n: int, noise: float, repeats: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The exact diagonal, and a row for each tolerance."""
    nnj.extend(model)
    loss_func = nnj.extend(nn.CrossEntropyLoss())
    x, y = images(n, noise, 3)
    error = lambda a: float((a - exact["value"]).abs().sum() / exact["value"].sum())
    exact = collected(model, loss_func, x, y, "ggn_diag", repeats + 1)
    rows = []
    for tol in TOLERANCES:
        bound = collected(model, loss_func, x, y, "ggn_diag", repeats, tol=tol)
        with as_many_for_all():
            packed = collected(model, loss_func, x, y, "ggn_diag", repeats, tol=tol)
        draws = [
            collected(model, loss_func, x, y, "ggn_diag_mc", 1, samples=bound["columns"])
            for _ in range(repeats)
        ]
        rows.append(
            {
                "tol": tol,
                "columns": bound["columns"],
                "deficit": bound["deficit"],
                "time": bound["time"],
                "packed": packed["columns"],
                "packed_time": packed["time"],
                "error": error(bound["value"]),
                "mc_time": statistics.median(d["time"] for d in draws),
                "mc_error": statistics.median(error(d["value"]) for d in draws),
            }
        )
    return exact, rows


def table(exact: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Markdown; errors are sums of absolute differences over the sum of the exact diagonal."""
    lines = [
        "| tol | columns at most | deficit | error | time "
        "| as many for all samples: columns | time | Monte Carlo: error | time |",
        "|---" * 9 + "|",
        f"| 0 (exact) | {exact['columns']} | 0 | 0 | {exact['time'] * 1e3:.0f} ms "
        "| – | – | – | – |",
    ]
    for r in reversed(rows):
        lines.append(
            f"| {r['tol']:g} | {r['columns']} | {r['deficit']:.1e} | {r['error']:.1e} | "
            f"{r['time'] * 1e3:.0f} ms | {r['packed']} | {r['packed_time'] * 1e3:.0f} ms | "
            f"{r['mc_error']:.1e} | {r['mc_time'] * 1e3:.0f} ms |"
        )
    return "\n".join(lines)


def figure(exact: dict[str, Any], rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Time, and error, against the tolerance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tols = [r["tol"] for r in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.axhline(
        1e3 * exact["time"], color="gray", ls="--", label=f"exact: {exact['columns']} columns"
    )
    left.plot(tols, [1e3 * r["time"] for r in rows], "o-", color="black", label="with tol")
    left.plot(
        tols,
        [1e3 * r["packed_time"] for r in rows],
        "o:",
        color="gray",
        label="with tol, as many columns for all samples",
    )
    left.plot(
        tols,
        [1e3 * r["mc_time"] for r in rows],
        "s-",
        color="C1",
        label="Monte Carlo, as many columns",
    )
    for r in rows:
        left.annotate(
            str(r["columns"]),
            (r["tol"], 1e3 * r["time"]),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    left.set_ylabel("time [ms] (and columns)")
    left.set_ylim(bottom=0)
    right.plot(
        tols,
        [max(r["error"], 1e-9) for r in rows],
        "o-",
        color="black",
        label="true error with tol",
    )
    right.plot(
        tols, [max(r["deficit"], 1e-9) for r in rows], "k:", label="deficit that collect reports"
    )
    right.plot(
        tols, [r["mc_error"] for r in rows], "s-", color="C1", label="Monte Carlo, as many columns"
    )
    right.set_yscale("log")
    right.set_ylabel("sum of absolute errors / sum of the diagonal")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("tol")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    fig.suptitle(title)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="tolerance")
    parser.add_argument(
        "--noise", type=float, default=0.8, help="of the pictures: more makes the network less sure"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    option(parser)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, accuracy = trained(args.noise, args.epochs)
    exact, rows = measure(model, args.samples, args.noise, args.repeats)
    title = (
        f"A network with {CLASSES} classes, {accuracy:.0%} of test data right, {args.samples} "
        "samples"
    )
    text = (
        f"{title}; errors are sums of absolute differences, relative to the sum of the exact "
        f"diagonal.\n\n{table(exact, rows)}"
    )
    (out / "table.md").write_text(text + "\n")
    figure(exact, rows, title, out / "figure.png")
    if args.page:
        measured = where(torch.get_num_threads())
        publish("tolerance", f"{text}\n\n{measured}.", out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
