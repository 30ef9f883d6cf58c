"""Errors for parameters that are others at the backward pass than they were when their model was
called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.graph.builder import Graph
from nnj.graph.nodes import leaf_of, own_task
from nnj.graph.traverse import children, reachable
from nnj.recording.records import tensors


def check_data(graph: Graph, nodes: Iterable[Any], paths: Mapping[nn.Module, str]) -> None:
    """Errors: `NNJError` if the graph computes with a parameter or buffer of a model that has other
    data by now, as autograd does where it has saved the tensor itself.

    Args:
        nodes: those at which the graph begins.
    """
    moved: set[Tensor] = set()
    for mark in graph.marks:
        moved |= mark.called_with.moved()
    if not moved:
        return
    found = own_task(lambda: next((t for t in _met(nodes) if t in moved), None))
    if found is not None:
        raise NNJError(
            f"the data of {_name(found, paths)} was replaced (by p.data = ..., or model.to(...)) "
            "between its call and the backward pass, which computes with the new data, as .grad "
            "does. Replace it after the backward pass"
        )


def _met(nodes: Iterable[Any]) -> Iterator[Tensor]:
    """The leaves of a graph, and the tensors that its nodes have saved."""
    for node in reachable(nodes, children):
        leaf = leaf_of(node)
        if leaf is not None:
            yield leaf
        for name in dir(type(node)):
            if name.startswith("_saved_") or name == "saved_tensors":
                yield from tensors(getattr(node, name))


def check_replaced(
    graph: Graph, wanted: set[Tensor], met: set[Tensor], paths: Mapping[nn.Module, str]
) -> None:
    """Errors: `NNJError` for a wanted parameter in whose place another tensor was in the call, and
    that the loss does not reach otherwise: it would have no result.
    """
    for module, name, now in graph.replaced():
        if now in wanted and now not in met:
            where = paths.get(module, "")
            raise NNJError(
                f"in the place of parameter '{where + '.' if where else ''}{name}' of "
                f"{type(module).__name__} was another tensor when the model was called (by "
                "torch.func.functional_call, or it was replaced since), and the loss does not "
                "reach the parameter itself, which would have no result. Call the model with its "
                "own parameter, freeze it (requires_grad_(False)), or name modules without it "
                "(modules=[...])"
            )


def _name(t: Tensor, paths: Mapping[nn.Module, str]) -> str:
    """What a tensor is called in the extended models."""
    for module, path in paths.items():
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, own in table.items():
                if own is t:
                    full = f"{path}.{name}" if path else name
                    return f"{kind} '{full}' of {type(module).__name__}"
    return "a parameter"
