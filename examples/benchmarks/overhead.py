"""What nnj.extend costs while nothing is collected: a forward and a backward pass, plain and
extended, one after the other.

    python examples/benchmarks/overhead.py

With --page the table goes into the README.md of this folder, too."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from harness import where
from networks import ROWS, mlp
from page import option, publish
from torch import Tensor, nn

import nnj


def images(n: int) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model, x, _ = ROWS["resnet18"].make()
        return model, torch.randn(n, *x.shape[1:]), torch.arange(n)

    return make


def vectors() -> tuple[nn.Module, Tensor, Tensor]:
    return mlp(100, 100, 100, 100), torch.randn(32, 100), torch.arange(32)


CASES = {
    "MLP, 3 layers of width 100, N = 32": (vectors, 200),
    **{f"ResNet-18, 64 x 64, N = {n}": (images(n), 1) for n in (4, 16, 32)},
}


def passes(model: nn.Module, loss_func: nn.Module, x: Tensor, y: Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        loss_func(model(x), y).backward()
    return (time.perf_counter() - start) / count


def measure(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]], count: int, repeats: int
) -> tuple[float, float]:
    """Seconds of both passes, plain and extended: medians."""
    plain, x, y = make()
    extended = nnj.extend(make()[0])
    losses = nn.CrossEntropyLoss(), nnj.extend(nn.CrossEntropyLoss())
    rounds = [
        [passes(m, f, x, y, count) for m, f in zip((plain, extended), losses, strict=True)]
        for _ in range(repeats + 1)
    ]
    return statistics.median(t[0] for t in rounds[1:]), statistics.median(t[1] for t in rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", type=int, choices=range(len(CASES)), default=list(range(len(CASES)))
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    option(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| network | plain [ms] | extended [ms] | ratio |", "|---" * 4 + "|"]
    print(*lines, sep="\n")
    for number in args.cases:
        name, (make, count) = list(CASES.items())[number]
        plain, extended = measure(make, count, args.repeats)
        lines.append(
            f"| {name} | {1e3 * plain:.3g} | {1e3 * extended:.3g} | {extended / plain:.3f} |"
        )
        print(lines[-1], flush=True)
    if args.page:
        publish("overhead", "\n".join([*lines, "", f"{where(args.threads)}."]))


if __name__ == "__main__":
    main()
