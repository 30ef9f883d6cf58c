"""A function traced by make_fx, with everything in it that autograd and nnj do: a graph of torch's
operators from the inputs to the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    TorchFunctionMetadataMode,
    get_innermost_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from nnj.compiling.program import Untraceable
from nnj.compiling.questions import Draw, Questions, Readings

LARGEST = 20_000  # operators of a graph, above which nobody would wait for a compiler


class Traced(NamedTuple):
    """A graph, and what it takes and gives beside the inputs and results.

    Attributes:
        graph: of (*inputs, *draws) -> [*results, changed], or [*results] where nothing was asked.
        results: those of the run that was traced.
        draws: random numbers that are inputs.
        random: whether torch's own generators are asked in it.
        asks: whether `changed` is there.
    """

    graph: GraphModule
    results: list[Tensor]
    draws: list[Draw]
    random: bool
    asks: bool


def trace(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Traced:
    """Run a function and note what it does with its inputs, which it reads wherever they are.

    The results are tensors of their own, no views of one another or of inputs.

    Errors: `Untraceable`, and whatever the function raises.
    """
    questions, results = Questions(inputs), list[Tensor]()

    def run(*given: Tensor) -> list[Tensor]:
        with _unnoted(), questions, Readings(questions):
            results.extend(_apart(function(), inputs))
            found = list(results)
            if questions.changed:
                found.append(torch.stack(questions.changed).any())
        return found

    try:
        # one fake mode for the shapes that make_fx notes, which else makes one for each operator
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            graph = make_fx(run)(*inputs)
    except Exception as error:
        if questions.refused is not None:
            raise Untraceable(questions.refused) from error
        raise
    if questions.refused is not None:  # somebody caught it, and went another way
        raise Untraceable(questions.refused)
    _tidy(graph)
    _refuse_leaves(graph)
    if len(graph.graph.nodes) > LARGEST:
        raise Untraceable(f"the pass has more than {LARGEST} operators")
    asks = bool(questions.changed)
    return Traced(graph, results, questions.draws, questions.random, asks)


def _unnoted() -> AbstractContextManager[Any]:
    """Without the mode by which make_fx notes each call of a function of torch: it would be taken
    for one of the user. Older torch has no keyword for that.
    """
    modes = _get_current_function_mode_stack()
    noted = bool(modes) and isinstance(modes[-1], TorchFunctionMetadataMode)
    return _pop_mode_temporarily() if noted else nullcontext()


def _refuse_leaves(module: GraphModule) -> None:
    """Errors: `Untraceable` for a constant whose gradient a backward pass would fill."""
    for node in module.graph.find_nodes(op="get_attr"):
        t = getattr(module, str(node.target))
        if isinstance(t, Tensor) and t.requires_grad:
            raise Untraceable(
                f"a tensor of shape {tuple(t.shape)} that requires grad is read from a closure or "
                "a global, and is no part of the model or the loss"
            )


def _apart(found: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Each result in memory of its own, and as no constant of the graph."""
    mode = get_innermost_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    constants = [t for t in vars(tracer.root).values() if isinstance(t, Tensor)]
    known_to_others = [t for t in (*inputs, *constants) if t.layout == torch.strided]
    taken = {t.untyped_storage().data_ptr() for t in known_to_others}
    results = []
    for t in found:
        known = get_proxy_slot(t, tracer, None) is not None
        t = t.detach()
        storage = t.untyped_storage()
        if not known or storage.data_ptr() in taken or storage.nbytes() != t.nbytes:
            t = t.clone()
        taken.add(t.untyped_storage().data_ptr())
        results.append(t)
    return results


def _tidy(module: GraphModule) -> None:
    """Placeholders first, in order; nothing that nobody reads; no detach (by newer torch, alias),
    which says nothing without autograd.
    """
    graph = module.graph
    last: Node | None = None
    for node in graph.find_nodes(op="placeholder"):
        if last is not None and last.next is not node:
            last.append(node)
        last = node
    for target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(_operand(node))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _operand(node: Node) -> Any:
    return node.args[0]
