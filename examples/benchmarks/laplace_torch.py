"""laplace-torch on nnj's curvature, beside its default backend: what is exact, time and memory.

    python examples/benchmarks/laplace_torch.py [--rows mlp-digits 3c3d ...] [--page]

`la.fit` on one batch, of each structure. The default backend (CurvlinopsGGN) forms the Jacobian for
the diagonal. Each cell runs in a process of its own, in turn; time is the least of some rounds,
memory the peak beyond what was there after a forward pass."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from harness import where
from networks import find
from page import option, publish

BACKENDS = ("NNJGGN", "CurvlinopsGGN")
ROWS = ("mlp-digits", "3c3d", "transformer", "resnet18")
LIMIT = 300  # seconds


def posterior(row: str, structure: str, backend: str) -> tuple[Any, Any, Any]:
    import laplace
    from laplace import curvature

    from nnj.integrations.laplace_torch import NNJGGN

    model, x, y = find(row).make()
    model.eval()
    cls = NNJGGN if backend == "NNJGGN" else getattr(curvature, backend)
    made = laplace.Laplace(model, "classification", "all", structure, backend=cls)
    return made, x, y


def measure(row: str, structure: str, backend: str) -> dict[str, Any]:
    """One cell, in this process."""
    import resource

    from torch.utils.data import DataLoader, TensorDataset

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    la, x, y = posterior(row, structure, backend)
    loader = DataLoader(TensorDataset(x, y), len(x))
    la.model(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    while len(times) < 2 or (len(times) < 5 and sum(times) < 5):
        start = time.perf_counter()
        la.fit(loader)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    factors = la.H_facs.kfacs if structure == "kron" else None
    trace = sum(_trace(f) for f in factors) if factors else float(la.H.double().sum())
    return {"ms": 1e3 * min(times), "MiB": peak / 1024, "sum": trace}


def _trace(factors: list[Any]) -> float:
    found = 1.0
    for factor in factors:
        found *= float(factor.double().trace())
    return found


def cell(row: str, structure: str, backend: str) -> dict[str, Any] | str:
    """The same in a process of its own; why there is nothing."""
    command = [sys.executable, __file__, "--cell", row, structure, backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        memory = done.returncode == -9 or "alloc" in last
        return "out of memory" if memory else last[:80]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    option(parser)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(*options.cell)))
        return
    lines = [
        where(1),
        "",
        "| network | structure | backend | ms | MiB | sum, or trace |",
        "|---" * 6 + "|",
    ]
    for row in options.rows:
        for structure in ("diag", "kron"):
            for backend in BACKENDS:
                found = cell(row, structure, backend)
                if isinstance(found, dict):
                    said = f"{found['ms']:.1f} | {found['MiB']:.0f} | {found['sum']:.6g}"
                else:
                    said = f"{found} | | "
                lines.append(f"| {find(row).text} | {structure} | {backend} | {said} |")
                print(lines[-1], flush=True)
    if options.page:
        publish("laplace_torch", "\n".join(lines))


if __name__ == "__main__":
    main()
