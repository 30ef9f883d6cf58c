"""One step of a graph: a record of a layer, or a node of autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnj.graph.matmul import SavedInput
from nnj.jacobians.jacobian import Jacobian
from nnj.recording.records import Edge, Record


@dataclass(eq=False)
class Step:
    """A linear step: columns arrive on the edges `into` and leave on the edges `out`.

    Attributes:
        name: the class of the layer, or the name of the node.
        node: that of the output. A step with a record stands for all nodes of the call.
        slots: the Jacobians of a record in its input and parameters; of a product with bare
            parameters those in them, under the numbers of the operands.
        out: one edge for the input of a record, or for each operand of a node; None where nothing
            wanted is behind it.
        leaf: the tensor whose gradient the node accumulates.
        dtype: that in which the step computes, where it is not that of the columns.
        params: the wanted parameters among the slots.
        batch: whether it has the samples in its rows for sure: a record with wanted parameters, or
            the model's input. `batch_above`: whether such a step comes later in the walk.
        bare: whether it is a product with bare parameters, which usually has the samples in its
            rows, too. `bare_above`: as above.
        saved_input: x of a product with bare parameters.
    """

    name: str
    node: Any
    record: Record | None
    slots: dict[str, Jacobian]
    into: list[Edge]
    out: list[Edge | None]
    leaf: Tensor | None = None
    dtype: torch.dtype | None = None
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    batch: bool = False
    batch_above: bool = False
    bare: bool = False
    bare_above: bool = False
    saved_input: SavedInput | None = None


def describe(step: Step, paths: Mapping[nn.Module, str]) -> str:
    """The name of a step for a sentence."""
    if step.record is not None:
        return f"layer '{paths.get(step.record.module, '') or step.name}'"
    return f"autograd's {step.name}"
