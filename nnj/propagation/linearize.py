"""A module at a point: its Jacobian in the input or in the parameters as one operator per sample,
for layers and whole models.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nnj.errors import Coupled, NNJError, complex_parameter
from nnj.graph.builder import Graph
from nnj.jacobians.factor import Factor
from nnj.jacobians.sample_index import SampleIndex
from nnj.propagation.backward import Sweep
from nnj.propagation.forward import Forward
from nnj.propagation.plan_search import plans
from nnj.recording.extend import temporarily_extended
from nnj.recording.records import Edge, edge_of


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad, each once, in the order of `parameters()`."""
    return [p for p in module.parameters() if p.requires_grad]


def parameters_by_module(module: nn.Module) -> list[list[nn.Parameter]]:
    """The own parameters that require grad of each module that has any, in the order of
    `modules()`; shared ones once.
    """
    seen: set[int] = set()
    found = []
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        if own:
            found.append(own)
    return found


def _plan(
    walk: type[Sweep], graph: Graph, n: int, roots: dict[Edge, SampleIndex], at_input: bool
) -> Sweep:
    """The first plan in which samples do not influence one another.

    An operand that is cut off at the input would hide what other samples have to do with it.
    """
    refusal: Coupled | None = None
    for options in plans(graph):
        if not (at_input and options["cut"]):
            try:
                return walk(graph, n, roots, **options)
            except Coupled as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


class Linearization:
    """The plan of all products of one module at one x. The forward pass is made here; the module is
    left as it was.

    Args:
        module: extended or not, a layer or a whole model; it is called once.
        x: (N, ...), a single tensor.
        wrt: "input" or "weight".
        walk: the kind of sweep.

    Errors: `NNJError` if y is not one tensor with the samples in axis 0, or where samples influence
    one another."""

    def __init__(self, module: nn.Module, x: Tensor, wrt: str, walk: type[Sweep] = Sweep):
        self.module, self.wrt = module, wrt
        if not isinstance(module, nn.Module):
            raise TypeError(f"products are those of a torch.nn.Module, not of {module!r}")
        if not isinstance(x, Tensor):
            raise NNJError(f"x is {type(x).__name__}, expected a tensor")
        if x.dim() == 0 or x.shape[0] == 0:
            raise NNJError(
                f"x has shape {tuple(x.shape)}; expected (N, ...) with at least one sample"
            )
        self.n = x.shape[0]
        self.params = parameters(module) if wrt == "weight" else []
        if any(p.is_complex() for p in self.params):
            raise complex_parameter(f"a parameter of {type(module).__name__}")
        if wrt == "input" and not x.is_floating_point():
            raise NNJError(
                f"x is {x.dtype}, which has no derivative; the input must be of floating point for "
                "wrt='input'"
            )
        with temporarily_extended(module), torch.enable_grad():
            self.x = x.detach().clone() if wrt == "weight" else x.detach().clone().requires_grad_()
            y = module(self.x if wrt == "weight" else self.x.view_as(self.x))
        if not isinstance(y, Tensor) or y.dim() == 0 or y.shape[0] != self.n:
            what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise NNJError(
                f"{type(module).__name__} gave {what} for {self.n} samples; products need one "
                "tensor (N, ...)"
            )
        if not y.is_floating_point():
            raise NNJError(
                f"{type(module).__name__} gave {y.dtype}; products are those of a real output"
            )
        self.y = y.detach()
        self.outputs, self.inputs = tuple(y.shape[1:]), tuple(x.shape[1:])
        self.sizes = [p.numel() for p in self.params]
        wanted = {id(p) for p in self.params} if wrt == "weight" else {id(self.x)}
        paths = {m: name for name, m in module.named_modules()}
        self.root = edge_of(y)
        self.sweep: Sweep | None = None
        if self.root is not None:
            roots: dict[Edge, SampleIndex] = {self.root: SampleIndex(self.n)}
            graph = Graph(
                [self.root],
                lambda p: id(p) in wanted,
                paths,
                None if wrt == "weight" else self.x,
                walk is Sweep,
            )
            if graph.steps:
                self.sweep = _plan(walk, graph, self.n, roots, wrt == "input")

    @property
    def size(self) -> int:
        """in, or P."""
        return math.prod(self.inputs) if self.wrt == "input" else sum(self.sizes)

    @property
    def out(self) -> int:
        """The number of outputs of one sample."""
        return math.prod(self.outputs)

    def walk(self, u: Tensor, sink: Callable[[Tensor, Factor], None]) -> None:
        """u J for cotangents u (K, N, *outputs), as the factor of each parameter, or of the
        input.
        """
        if self.sweep is not None and self.root is not None:
            self.sweep.run({self.root: u}, u.shape[0], sink)

    def vjp(self, u: Tensor) -> Tensor:
        """u J: (K, N, *outputs) -> (K, N, in or P)."""
        found: dict[int, Tensor] = {}
        if not u.shape[0]:
            return u.new_zeros(0, self.n, self.size)
        self.walk(u, lambda p, factor: found.__setitem__(id(p), factor.dense()))
        holders = [self.x] if self.wrt == "input" else self.params
        lead = u.shape[:2]
        parts = [
            found[id(p)].reshape(*lead, -1).to(p.dtype)
            if id(p) in found
            else torch.zeros(
                *lead,
                p.numel() // (self.n if self.wrt == "input" else 1),
                dtype=p.dtype,
                device=p.device,
            )
            for p in holders
        ]
        return torch.cat(parts, -1) if parts else u.new_zeros(*lead, 0)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (K, N, in or P) -> (K, N, *outputs); (K, 1, P) is one direction for all samples."""
        k = v.shape[0]
        zero = self.y.new_zeros(k, self.n, *self.outputs)
        if not k or self.sweep is None or self.root is None:
            return zero
        if self.wrt == "input":
            seeds = {id(self.x): v.reshape(k, self.n, *self.inputs)}
        else:
            split = v.split(self.sizes, -1)
            seeds = {
                id(p): t.reshape(k, v.shape[1], *p.shape)
                for p, t in zip(self.params, split, strict=True)
            }
        try:
            return Forward(self.sweep).run(seeds, k).get(self.root, zero)
        except CheckpointError:
            if k == 1:
                raise
        # What a checkpoint computes anew under vmap need not be what it saved: one direction after
        # the other.
        return torch.cat([self.jvp(v[i : i + 1]) for i in range(k)])

    def dense(self) -> Tensor:
        """J, (N, out, in or P)."""
        return self.vjp(self.basis()).transpose(0, 1)

    def basis(self) -> Tensor:
        """The unit cotangents, (out, N, *outputs)."""
        eye = torch.eye(self.out, dtype=self.y.dtype, device=self.y.device)
        return (
            eye[:, None].expand(self.out, self.n, self.out).reshape(self.out, self.n, *self.outputs)
        )
