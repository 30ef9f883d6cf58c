"""README.md of this folder: what each benchmark measures, and the results that it has left in
results/.

    python examples/benchmarks/page.py

puts the page together again. A benchmark that is run with --page first leaves its part there
(results/NAME.md, and NAME.png where it draws), so that one part is renewed without running the
others; so is a row of compare.py's parts of some rows."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEAD = """\
# Benchmarks

What nnj's exact results cost, beside every other tool that has them. This page is written by the
benchmarks: `python examples/benchmarks/NAME.py --page` measures one part anew and writes it into
`results/`, and `python examples/benchmarks/page.py` puts the page together from what is there.

```sh
pip install -e '.[benchmarks]' && python examples/benchmarks/compare.py --out results
```

Without `--page` a benchmark leaves its table, figure and raw numbers in the folder that `--out`
names. `--device cuda` measures `compare.py` and `scaling.py` on a GPU (no such table was made yet).
`products.py` sets `nnj.vjp`, `nnj.jvp` and a diagonal by `diag_backprop=True` beside torch's own
products and one gradient, and prints a table of its own. `compiled.py` sets passes replayed by
`nnj.compile` beside eager ones. `compare.py --quantity kfac` (or `batch_grad`,
`batch_grad_sq_norm`) sets another quantity beside the tools that have it, and `--rows` chooses
networks. `operators.py` sets products in the weights, tangent kernels and operators over a data set
beside what one writes by hand.
"""
# name -> heading, what is measured, and what the picture shows
PARTS = {
    "compare": (
        "The exact GGN diagonal by every tool",
        """\
Each tool runs in a process of its own with its own idiom, on the same weights and data; its result
is compared with a reference in float64 before anything is timed. A cell is the median time
(fastest–slowest), the peak memory beyond that of a plain gradient, and the largest error. Wrong,
refused, missing, out of memory and too slow are said. torch.func is what a user writes, `jacrev`
under `vmap`; "by sample" is our own best writing of it, one sample at a time.""",
        "Time and memory of each tool on each network",
    ),
    "compare-ggn_diag": (
        "The diagonal on one thread, eager and compiled",
        """\
The same measurement of networks that end soon, on one thread: a table of some rows, which
`compare.py --rows ... --page` writes. The two columns before the last are nnj's eager pass and the
one that `nnj.compile` replays, over the fastest other tool that is right.""",
        "",
    ),
    "compare-batch_grad": (
        "Gradients of samples",
        "`compare.py --quantity batch_grad`: (N, *p) for each parameter, and `p.grad` beside it.",
        "",
    ),
    "compare-batch_grad_sq_norm": (
        "Squared norms of the gradients of samples",
        "`compare.py --quantity batch_grad_sq_norm`.",
        "",
    ),
    "compare-kfac": (
        "Kronecker factors",
        """\
`compare.py --quantity kfac`: exact columns, *expand*, weights and biases apart. Each tool has a
scale of its own on convolutions (see [coming from another tool](../coming_from.md)), so that a
result is called wrong there where it is another approximation.""",
        "",
    ),
    "laplace_torch": (
        "laplace-torch on nnj",
        """\
`laplace_torch.py`: `la.fit` on one batch with nnj as the backend, beside laplace-torch's default
one, each in a process of its own on one thread; the last column is the sum of the diagonal, or the
trace of all Kronecker products, by which one sees that both are the same. (A convolution's bias has
its exact block by nnj.)""",
        "",
    ),
    "scaling": (
        "How cost grows with classes, samples, width, depth and tokens",
        """\
`scaling.py` measures one collect of `ggn_diag` beside one gradient, one size at a time: of an MLP,
of layers that are given what several layers before them give, of convolutions and of a transformer.
The exponent is that of the three largest sizes, of the time and of the time in gradients. Peak
memory, beyond that of a gradient, stands beside what it may be, with the default `memory=2**28` and
with an eighth of that.

Sums and concatenations of all layers before have one edge for each pair of layers, so that both the
gradient and the diagonal grow with the square of the depth in the end. An addition is a node of its
own for each pair, which is crossed in Python where the gradient crosses it in C++; a concatenation
is one node with all its edges. Columns are as many as classes, or as the last layer is wide where
that is less; what then grows with classes is the Gram matrix of the last layer's rows.""",
        "Gradients that the diagonal takes, and its peak memory, against each size",
    ),
    "compiled": (
        "Compiled passes",
        """\
`nnj.compile` replays a pass as one graph. Gradient and quantity of one batch, cross entropy; exact
results were compared first. `compiled.py` measures the backends beside an eager pass.""",
        "",
    ),
    "tolerance": (
        "What a tolerance saves",
        """\
A trained network is sure of most of its answers, and `tol=` makes use of that. The result is a
lower bound with a deficit that is known; Monte Carlo with as many columns is far less exact.""",
        "Time and true error against tol",
    ),
    "floor": (
        "What stands between nnj and the floor",
        """\
The floor is the time of the multiply-adds alone, at the rate of a large matrix product.
`floor.py` also says it layer by layer. Milliseconds.""",
        "",
    ),
    "overhead": (
        "An extended model in which nothing is collected",
        "A forward and a backward pass, plain and extended, one after the other.",
        "",
    ),
}


def page(results: Path = FOLDER / "results") -> str:
    """The page, with the parts that have a result."""
    parts = [HEAD]
    for name, (heading, about, caption) in PARTS.items():
        found = results / f"{name}.md"
        if found.exists():
            parts += [f"## {heading}", f"{about}", found.read_text().strip()]
            if caption and (results / f"{name}.png").exists():
                parts.append(f"![{caption}](results/{name}.png)")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def renewed(old: str, new: str) -> str:
    """A table with the rows of an earlier one, of the same columns, that were not measured again;
    below it what is said of each run, and of which rows.
    """
    (head, rows, runs), (columns, more, now) = read(old), read(new)
    kept = {name: row for name, row in rows.items() if name not in more}
    if head != columns or not kept:
        return new
    said = {text: [n for n in names if n in kept] for text, names in runs.items()}
    said = {text: names for text, names in said.items() if names} | now
    notes = [f"*{'; '.join(names)}:* {text}" for text, names in said.items()]
    return "\n".join([*head, *(rows | more).values(), "", "\n\n".join(notes)])


def read(table: str) -> tuple[list[str], dict[str, str], dict[str, list[str]]]:
    """The head of a table, its rows by their network, and each paragraph with the rows that it is
    of: *one; another:* at its beginning, or all of them.
    """
    lines = [line for line in table.splitlines() if line.strip()]
    grid = [line for line in lines if line.startswith("|")]
    rows = {line.split("|")[1].strip(): line for line in grid[2:]}
    said: dict[str, list[str]] = {}
    for line in lines[len(grid) :]:
        names, found, text = line.removeprefix("*").partition(":* ")
        said.update({text: names.split("; ")} if found else {line: list(rows)})
    return grid[:2], rows, said


def publish(name: str, text: str, figure: Path | None = None, folder: Path = FOLDER) -> None:
    """Leave the result of one benchmark in results/, and write the page anew."""
    results = folder / "results"
    earlier = results / f"{name}.md"
    if name.startswith("compare-") and earlier.exists():
        text = renewed(earlier.read_text(), text)
    earlier.write_text(text.strip() + "\n")
    if figure is not None:
        shutil.copyfile(figure, results / f"{name}.png")
    (folder / "README.md").write_text(page(results))


def option(parser: argparse.ArgumentParser) -> None:
    """--page, for a benchmark."""
    parser.add_argument(
        "--page",
        action="store_true",
        help="write the result into results/ and README.md of this folder, too",
    )


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page())
