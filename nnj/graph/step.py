"""One step of a graph: a record of a layer, or a raw node of autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnj.graph.matmul import SavedInput
from nnj.graph.nodes import node_name
from nnj.jacobians.jacobian import Jacobian
from nnj.recording.records import Edge, Record


@dataclass(eq=False)
class Step:
    """One step of the walk: the edges on which columns arrive, and those on which they leave
    (None: nobody needs them).
    """

    node: Any
    record: Record | None
    slots: dict[str, Jacobian]
    into: list[Edge]
    out: list[Edge | None]
    leaf: Tensor | None = None
    dtype: torch.dtype | None = None  # in which a record works
    # wanted parameters of a record, or of a product
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    # whether it has the samples in its rows: a record with wanted parameters, or the model's input
    batch: bool = False
    batch_above: bool = False  # whether such a unit lies further on
    # whether it is a product with bare parameters, which mostly has the samples in its rows, too
    bare: bool = False
    bare_above: bool = False
    held: SavedInput | None = None  # what the bare parameters of a product meet

    @property
    def name(self) -> str:
        return type(self.record.module).__name__ if self.record else node_name(self.node)


def describe(step: Step, paths: dict[int, str]) -> str:
    """The name of a unit for a sentence."""
    if step.record is not None:
        path = paths.get(id(step.record.module), "")
        return f"layer '{path or type(step.record.module).__name__}'"
    return f"autograd's {node_name(step.node)}"
