"""u J of a node of autograd for many columns u at once: its own formula, under vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode

from nnj.errors import NNJError
from nnj.generators import OwnGenerator
from nnj.graph.attention import attention_backward, fused_attention
from nnj.graph.nodes import node_name, own_task, refuse_freed
from nnj.graph.op_names import FLAT, TRUSTED
from nnj.recording.engine import is_engine, through_engine

Shape: TypeAlias = "tuple[int, ...]"
LINEAR = "nnj.linear"  # on a node: it is known to be
LARGE = 1024.0  # how much larger than the columns that is which a backward in Python is tried with
ROUNDED = 0.01  # what it may be off by, where it computes in less than double precision


def call_node(node: Any, arrived: list[Tensor | None], k: int) -> list[Tensor | None]:
    """What a node makes of k columns, for each of its operands.

    Autograd's own formula under vmap; one column after the other where vmap cannot take it, or
    makes something else of it.

    Errors: `NNJError` for a function in Python whose backward is not linear."""
    if is_engine(node):
        return through_engine(node, arrived)
    known = None if arrived[0] is None else _known(node, arrived[0], k)
    if known is not None:
        return known
    in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    call = node.apply if in_python else node
    if in_python:
        arrived = _without_gaps(node, arrived, k)
    which = [i for i, t in enumerate(arrived) if t is not None]

    def run(*given: Tensor) -> Any:
        args: list[Tensor | None] = [None] * len(arrived)
        for i, t in zip(which, given, strict=True):
            args[i] = t
        with _PlainRecomputation() if call is node else nullcontext():
            out = call(*args)
        out = out if isinstance(out, tuple) else (out,)
        return _by_edge(node, out) if in_python else out

    given = [t for t in arrived if t is not None]
    if k > 1:
        return _together(node, run, given, in_python)
    alone = [None if t is None else t[None] for t in run(*[t[0] for t in given])]
    if in_python:
        _check_linear(node, run, given, alone)
    return alone


def _known(node: Any, g: Tensor, k: int) -> list[Tensor | None] | None:
    """What a node makes of its columns, where it need not be asked."""
    if fused_attention(node):
        return attention_backward(node, g)
    name = node_name(node)
    if name == "Add":
        return _add_backward(node, g)
    if k > 1 and name == "MaxPool2DWithIndices":
        return [_max_pool_backward(node, g)]
    return None


def known_of_some(
    node: Any, g: Tensor, of: Tensor, ends: list[Shape]
) -> list[Tensor | None] | None:
    """What a node makes of columns of some samples, (K, M, ...), for each of its operands; None
    where its formula is not known here.

    Args:
        of: the numbers of the samples, (M,), among the rows of its tensors.
        ends: the shapes of its operands, for all samples.
    """
    name = node_name(node)
    if name == "Add" and all(shape[1:] == g.shape[2:] for shape in ends):
        return _add_backward(node, g)
    if name in FLAT and len(ends) == 1:
        return [g.reshape(*g.shape[:2], *ends[0][1:])]
    if name == "Relu":
        return [g * (node._saved_result.index_select(0, of) > 0)]
    if name == "MaxPool2DWithIndices" and node._saved_self.dim() == 4:
        return [_max_pool_backward(node, g, of)]
    return None


def _add_backward(node: Any, g: Tensor) -> list[Tensor | None] | None:
    """What an addition sends to its two operands: of layers that are given sums of all before them
    there are as many as pairs. None where dtypes would have to be told apart.
    """
    kind, alpha = type(node), getattr(node, "_saved_alpha", None)
    if kind.__name__ != "AddBackward0" or alpha is None or g.is_complex():
        return None
    shares = (g, g if alpha == 1 else g * alpha)
    ends = node.next_functions
    if len(ends) > 2:
        return None
    return [None if end is None else v for (end, _), v in zip(ends, shares, strict=False)]


def _together(
    node: Any, run: Callable[..., tuple[Any, ...]], given: list[Tensor], in_python: bool
) -> list[Tensor | None]:
    """Several columns: under vmap, or one after the other."""
    try:
        with _quiet():
            found = _vmapped(run, given)
        if node_name(node) in TRUSTED:
            return found
        if _confirmed(run, given, found, in_python):
            node.metadata[LINEAR] = True
            return found
    except RuntimeError as error:
        refuse_freed(error)
    columns = [own_task(partial(run, *[t[c] for t in given])) for c in range(len(given[0]))]
    found = [
        None if parts[0] is None else torch.stack(parts) for parts in zip(*columns, strict=True)
    ]
    if in_python:
        _check_linear(node, run, given, found)
    return found


def _without_gaps(node: Any, arrived: list[Tensor | None], k: int) -> list[Tensor | None]:
    """A function in Python is given zeros where nothing arrived, as the engine does."""
    like = next(t for t in arrived if t is not None)
    return [
        like.new_zeros(k, *m.shape, dtype=m.dtype) if t is None else t
        for t, m in zip(arrived, node._input_metadata, strict=True)
    ]


def _by_edge(node: Any, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function in Python gives for each of its edges: it answers for every argument of its
    forward, and only tensors have an edge, those that need a gradient one that leads somewhere.
    """
    wanted = iter([r for r, needed in zip(results, node.needs_input_grad, strict=False) if needed])
    return tuple(None if child is None else next(wanted, None) for child, _ in node.next_functions)


# -- is it what it must be? ------------------------------------------------------------------------


def _check_linear(
    node: Any,
    run: Callable[..., tuple[Any, ...]],
    given: list[Tensor],
    found: list[Tensor | None],
) -> None:
    """Errors: `NNJError` if the backward of a function in Python is not linear on these columns. It
    is asked once.
    """
    if LINEAR in node.metadata:
        return
    if not _confirmed(run, given, found, in_python=True):
        name = type(node).__name__.removesuffix("Backward")
        raise NNJError(
            f"the backward of the autograd.Function {name} is not linear in the gradient that it "
            "is given (it clamps or normalises it, draws random numbers, or keeps a state), so "
            "that it is no Jacobian. Collect with a model without it, or make its backward linear"
        )
    node.metadata[LINEAR] = True


def _confirmed(
    run: Callable[..., tuple[Any, ...]],
    given: list[Tensor],
    found: list[Tensor | None],
    in_python: bool,
) -> bool:
    """Whether a random combination of the columns, taken alone, gives the same combination of what
    came out of them, as it must, since a node is linear.

    Not every batching rule of torch is right (that of cdist's backward is not), and not every
    backward in Python is linear: for these the combination is large, and has both signs."""
    seed = OwnGenerator.seeded()
    weights = torch.rand(len(given[0]), generator=seed, dtype=torch.float64) + 0.5
    if in_python:
        signs = torch.arange(len(weights)) % 2 * 2 - 1
        weights = weights * signs * (LARGE if given[0].dtype != torch.float16 else 1)
    size = float(weights.abs().max().clamp(min=1))
    mix: Callable[[Tensor], Tensor] = lambda t: torch.tensordot(weights.to(t.device, t.dtype), t, 1)
    alone = own_task(lambda: run(*[mix(t) for t in given]))
    for one, columns in zip(alone, found, strict=True):
        if (one is None) != (columns is None):
            return False
        if one is not None and columns is not None and one.numel():
            slack = torch.finfo(one.dtype).eps ** 0.5
            if in_python and one.dtype != torch.float64:
                slack = max(slack, ROUNDED)
            tolerance = slack * columns.abs().max() * len(columns) * (size if in_python else 1)
            if one.shape != columns.shape[1:] or bool(
                ((one - mix(columns)).abs() > tolerance).any()
            ):
                return False
    return True


class _PlainRecomputation(TorchFunctionMode):
    """What a checkpoint computes anew while its tensors are unpacked runs outside of vmap: it has
    nothing to do with the columns.

    Under vmap torch may take other kernels, which save other tensors than the forward pass did."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with temporarily_clear_interpreter_stack():
            return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vmap's warnings of slow paths: the formulas are torch's own, and autograd would
    repeat the warnings to the user after the pass.
    """
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _max_pool_backward(node: Any, g: Tensor, of: Tensor | None = None) -> Tensor:
    """g of (K, N, C, *pooled) where the largest entries were; vmap would do it column by column."""
    x, index = node._saved_self, node._saved_result1
    index = index if of is None else index.index_select(0, of)
    back = g.new_zeros(*g.shape[:-2], x.shape[-2] * x.shape[-1])
    back.scatter_add_(-1, index.flatten(-2).expand(*g.shape[:-2], -1), g.flatten(-2))
    result: Tensor = back.unflatten(-1, x.shape[-2:])
    return result


def _vmapped(run: Callable[..., tuple[Any, ...]], given: list[Tensor]) -> list[Tensor | None]:
    present: list[bool] = []

    def inner(*g: Tensor) -> tuple[Tensor, ...]:
        out = run(*g)
        present[:] = [t is not None for t in out]
        return tuple(t for t in out if t is not None)

    found = iter(torch.vmap(inner)(*given))
    return [next(found) if there else None for there in present]
