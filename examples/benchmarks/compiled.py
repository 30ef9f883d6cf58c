"""What nnj.compile saves: gradient and quantities of one batch, eager and replayed by each backend,
one after the other in one process.

    python examples/benchmarks/compiled.py --backends inductor aot

Results are compared with the eager ones before anything is timed."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import islice

import torch
from harness import where
from networks import Transformer, mlp
from torch import Tensor, nn

import nnj

Made = tuple[nn.Module, Tensor, Tensor]


def vectors(n: int, *widths: int) -> Callable[[], Made]:
    return lambda: (
        mlp(*widths),
        torch.randn(n, widths[0]),
        torch.randint(0, widths[-1], (n,)),
    )


def tokens() -> Made:
    model = Transformer(width=64, layers=2, classes=10).eval()
    return model, torch.randn(8, 16, 64), torch.randint(0, 10, (8,))


CASES: dict[str, tuple[Callable[[], Made], str]] = {
    "MLP 10-32-32-3, N = 32": (vectors(32, 10, 32, 32, 3), "ggn_diag"),
    "the same": (vectors(32, 10, 32, 32, 3), "ggn_diag_mc"),
    "the same, once more": (vectors(32, 10, 32, 32, 3), "batch_grad"),
    "MLP 784-128-10, N = 64": (vectors(64, 784, 128, 10), "ggn_diag"),
    "MLP 100-100-100-100, N = 128": (vectors(128, 100, 100, 100, 100), "ggn_diag"),
    "transformer, 2 layers, 16 tokens, N = 8": (tokens, "ggn_diag"),
}


def passes(
    make: Callable[[], Made], quantity: str, backends: list[str]
) -> list[Callable[[], None]]:
    """The eager pass and that of each backend, which replays from now on."""
    torch.manual_seed(0)
    model, x, y = make()
    loss_func = nn.CrossEntropyLoss()
    steps = [nnj.compile(model, loss_func, quantity, backend=name) for name in backends]
    loss_func = nnj.extend(loss_func)

    def eager() -> None:
        model.zero_grad()
        with nnj.collect(quantity):
            loss_func(model(x), y).backward()

    def replay(step: Callable[..., object]) -> None:
        model.zero_grad()
        step(x, y)

    eager()
    expected = [getattr(p, quantity).clone() for p in model.parameters()]
    for step in steps:
        for _ in range(4):
            replay(step)
        assert step.replays == 1, step.reasons  # of the fourth pass
        for p, value in zip(model.parameters(), expected, strict=True):
            found = getattr(p, quantity)
            if quantity != "ggn_diag_mc":  # which is drawn anew
                torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-5 * float(value.max()))
    return [eager, *(lambda step=step: replay(step) for step in steps)]


def measure(
    runs: list[Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds of each, taken by turns: medians."""
    rounds = []
    for _ in range(repeats):
        times = []
        for run in runs:
            start = clock()
            run()
            times.append(clock() - start)
        rounds.append(times)
    return [statistics.median(one) for one in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument("--backends", nargs="+", default=["inductor", "aot"])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: what this process has used, where other programs disturb",
    )
    args = parser.parse_args()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    torch.set_num_threads(args.threads)
    names = [f"{name} [ms] | ÷ eager" for name in args.backends]
    print(f"| network | quantity | eager [ms] | {' | '.join(names)} |")
    print("|---" * (3 + 2 * len(names)) + "|")
    for number in args.cases:
        name, (make, quantity) = next(islice(CASES.items(), number, None))
        eager, *others = measure(passes(make, quantity, args.backends), args.repeats, clock)
        cells = [f"{1e3 * t:.3g} | {t / eager:.2g}" for t in others]
        print(f"| {name} | {quantity} | {1e3 * eager:.3g} | {' | '.join(cells)} |", flush=True)
    print(
        f"\n{where(args.threads)}; medians of {args.repeats} rounds, by turns; {args.clock} time."
    )


if __name__ == "__main__":
    main()
