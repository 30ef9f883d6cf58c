"""Nodes of autograd's graph that belong to an engine: to the model they are the identity, and only
the engine may run them, since it counts on it that they run once in a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from nnj.recording.tensor_parallel import behind_passage

T = TypeVar("T")
Edge = tuple[Any, int]  # (grad_fn, output_nr)

# The module and name of each function in Python that is such a node; its arguments are something of
# its own, and then what it gives back. That of DistributedDataParallel stands behind each output of
# a model under static_graph or find_unused_parameters, and queues the reduction of gradients; that
# of FSDP2 stands before the inputs of a unit, and reduces and shards its gradients.
ENGINE = frozenset(
    {
        ("torch.nn.parallel.distributed", "_DDPSink"),
        (
            "torch.distributed.fsdp._fully_shard._fsdp_param_group",
            "RegisterPostBackwardFunction",
        ),
    }
)


def is_engine(node: Any) -> bool:
    """Whether a node belongs to an engine."""
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and (function.__module__, function.__qualname__) in ENGINE


def behind_engine(edge: Edge) -> Edge | None:
    """Where an edge leads behind nodes that belong to an engine, and behind torch's steps between a
    layer that is distributed and plain tensors; None for nowhere.
    """
    while hasattr(type(edge[0]), "_forward_cls"):  # a function in Python, which all of these are
        if is_engine(edge[0]):
            found = dict(zip(_needed(edge[0]), _edges(edge[0]), strict=True)).get(edge[1])
        else:
            found = behind_passage(edge)
        if found is None or found is edge:
            return found
        edge = found
    return edge


def through_engine(node: Any, arrived: Sequence[T | None]) -> list[T | None]:
    """What a node that belongs to an engine sends along each of its edges, of what has arrived."""
    sent = iter([arrived[nr] for nr in _needed(node)])
    return [None if child is None else next(sent) for child, _ in node.next_functions]


def _needed(node: Any) -> list[int]:
    """Which of the results are tensors through which a gradient flows."""
    return [nr for nr, needed in enumerate(node.needs_input_grad[1:]) if needed]


def _edges(node: Any) -> list[Edge]:
    """The edges of these: what is no tensor has none, what needs no gradient one to nowhere."""
    return [edge for edge in node.next_functions if edge[0] is not None]
