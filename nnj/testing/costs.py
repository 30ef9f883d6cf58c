"""What each quantity of a model would take, before any of them is asked for: bytes of results, and
of one column on its way, and about how long all exact columns would take.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nnj.errors import NNJError
from nnj.graph.builder import Graph
from nnj.jacobians.kron import KronSize
from nnj.matrices.matrix import BLOCK_LIMIT
from nnj.propagation.called import call, logits_of
from nnj.recording.extend import temporarily_extended
from nnj.recording.records import Edge, edge_of, tensors


@dataclass
class Costs:
    """Entries of results, of parameters that require grad; and what that is in bytes.

    Attributes:
        size: of one entry, in bytes.
        parameters: P.
        samples, outputs: N and C of the call; None without one.
        blocks: by the name of each module, the P of its own parameters.
        kronecker: by the name of each module, the entries of its Kronecker factors; a module that
            is not in it has its exact block in their place, or beyond `BLOCK_LIMIT` its diagonal.
        column: the most that one column, and what a step makes of it, has on its way.
        backward: seconds that a backward pass of the call took.
    """

    size: int
    parameters: int
    samples: int | None = None
    outputs: int | None = None
    blocks: dict[str, int] = field(default_factory=dict)
    kronecker: dict[str, int] = field(default_factory=dict)
    column: int = 0
    backward: float = 0.0

    @property
    def kfac(self) -> int:
        """The entries of `kfac` of all modules."""
        return sum(self.kronecker.values()) + sum(
            _exact(self.blocks[name]) for name in self.without_factors
        )

    @property
    def without_factors(self) -> list[str]:
        """The modules that have no Kronecker factors."""
        return [name for name in self.blocks if name not in self.kronecker]

    @property
    def too_large(self) -> list[str]:
        """The modules whose block is beyond `BLOCK_LIMIT`."""
        return [name for name, p in self.blocks.items() if p > BLOCK_LIMIT]


def costs_of(model: nn.Module, x: Any = None) -> Costs:
    """What a model's quantities would take.

    Args:
        x: an input, a tuple of arguments, or a dict of named ones: the model is called once.
            Without it nothing is known of columns, of samples, and of Kronecker factors.

    Errors: `NNJError` for lazy layers that were not called yet.
    """
    own = _own(model)
    named = {p: name for name, params in own.items() for p in params.values()}
    if any(map(is_lazy, named)):
        raise NNJError(
            "a lazy layer has parameters without a shape until it is called, so what quantities "
            "take is not known. Give an input (--input), or call the model before"
        )
    first = next(iter(named), torch.empty(0))
    sizes = {name: sum(p.numel() for p in params.values()) for name, params in own.items()}
    found = Costs(first.element_size(), sum(p.numel() for p in named), blocks=sizes)
    if x is None or not named:
        return found
    with temporarily_extended(model), torch.enable_grad():
        given = logits_of(call(model, x))
        outputs = [t for t in tensors(given) if edge_of(t) is not None]
        roots = [edge for t in outputs if (edge := edge_of(t)) is not None]
        paths = {module: path for path, module in model.named_modules()}
        graph = Graph(roots, named.__contains__, paths)
        if outputs and outputs[0].dim():
            found.samples = outputs[0].shape[0]
            found.outputs = sum(t.numel() for t in outputs) // max(1, found.samples)
        found.column = _widest(graph)
        found.backward = min(_seconds(outputs, list(named)) for _ in range(2))
        found.kronecker = _kronecker(graph, own, named)
    return found


def _own(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """By the name of each module its own parameters that require grad: shared ones in each, as
    blocks have them.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    for path, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        params = {name: p for name, p in own if p.requires_grad}
        if params:
            found[path] = params
    return found


def _seconds(outputs: Sequence[Tensor], params: Sequence[nn.Parameter]) -> float:
    """How long a backward pass takes, until a device has done it."""
    ends = [t for t in outputs if edge_of(t) is not None]
    start = time.perf_counter()
    ones = [torch.ones_like(t) for t in ends]
    grads = torch.autograd.grad(ends, params, ones, retain_graph=True, allow_unused=True)
    last = next((g for g in grads if g is not None), None)
    if last is not None and last.numel():
        last.flatten()[0].item()  # of the first layers, and so what is done last
    return time.perf_counter() - start


def _widest(graph: Graph) -> int:
    def entries(edges: Sequence[Edge | None]) -> int:
        return sum(math.prod(graph.shapes[e]) for e in edges if e is not None)

    found: list[int] = [entries(step.into) + entries(step.out) for step in graph.steps]
    return max(found, default=0)


def _kronecker(
    graph: Graph, own: dict[str, dict[str, nn.Parameter]], named: dict[nn.Parameter, str]
) -> dict[str, int]:
    """The entries of factors by the name of a module, of such that have some."""
    modules = {path: module for module, path in graph.paths.items()}
    uses: dict[nn.Parameter, dict[Any, KronSize]] = {}
    count = Counter[nn.Parameter]()
    for step in graph.steps:
        for slot, p in step.params:
            j = step.slots[slot]
            if p in named and j.kron_size is not None:  # more uses of one view are more places
                uses.setdefault(p, {})[getattr(j, "view", None)] = j.kron_size
                count[p] += 1
    found: dict[str, int] = {}
    for name, params in own.items():
        sizes = [size for p in params.values() for size in uses.get(p, {}).values()]
        if isinstance(modules[name], nn.MultiheadAttention):
            sizes = [_projections(size) for size in sizes]
        rest = [p for p in params.values() if p not in uses]
        # a bias is one more input where it has the places of the weight, and no other use has more
        once = all(count[p] <= len(uses[p]) for p in params.values() if p in uses)
        joint = once and bool(sizes) and not sizes[0].diagonal
        bias = joint and any(p.dim() == 1 for p in rest)
        others = sum(p.numel() for p in rest if not (bias and p.dim() == 1))
        if sizes:
            found[name] = sum(size.entries(bias) for size in sizes) + _exact(others)
    return found


def _projections(size: KronSize) -> KronSize:
    """Query, key and value that stand one below the other have factors each."""
    return KronSize(3, size.outputs // 3, size.inputs) if size.outputs % 3 == 0 else size


def _exact(p: int) -> int:
    """The entries of an exact block, or of the diagonal in its place."""
    return p * p if p <= BLOCK_LIMIT else p


def text(costs: Costs) -> str:
    """The costs as lines."""
    size = costs.size
    lines = [f"{costs.parameters:,} parameters that require grad, {size} bytes each. Results take"]
    rows = [("ggn_diag, and each of its shape", _bytes(costs.parameters * size))]
    if costs.samples is not None:
        n = costs.samples
        rows.append(
            (f"batch_grad, batch_ggn_diag of {n} samples", _bytes(n * costs.parameters * size))
        )
        rows.append(("kfac, ekfac", _bytes(costs.kfac * size)))
    within = sum(p * p for p in costs.blocks.values() if p <= BLOCK_LIMIT)
    rows.append(
        (
            "ggn_block",
            _bytes(within * size)
            + _listed(", and refused beyond block_limit at ", costs.too_large),
        )
    )
    joint = costs.parameters > BLOCK_LIMIT
    rows.append(
        (
            "ggn",
            _bytes(costs.parameters**2 * size) + (", refused beyond block_limit" if joint else ""),
        )
    )
    if costs.outputs is not None:
        rows.append(
            (
                f"a column ({costs.outputs} outputs of a sample)",
                f"{_bytes(costs.column * size)} at most",
            )
        )
        exactly = costs.outputs * costs.backward
        rows.append(
            (
                f"{costs.outputs} columns, exactly",
                f"about {exactly:.2g} s at most, as a backward pass takes {costs.backward:.1g} s; "
                "tol= and ggn_diag_mc need fewer",
            )
        )
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:{width}}  {what}" for name, what in rows]
    if costs.samples is not None and costs.without_factors:
        lines.append(
            _listed(
                "No Kronecker factors, but an exact block or a diagonal: ", costs.without_factors
            )
        )
    return "\n".join(lines)


def _listed(before: str, names: list[str]) -> str:
    shown = ", ".join(repr(name or "(model)") for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{before}{shown}{more}" if names else ""


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:,.4g} TiB"
