"""Autograd's graph as the sweep sees it: steps (records and raw nodes) and their edges, in
topological order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nnj.errors import NNJError
from nnj.graph.acceptance import confirmed, working_point
from nnj.graph.lstm import expand
from nnj.graph.matmul import SavedInput, product
from nnj.graph.nodes import node_name
from nnj.graph.step import Step
from nnj.recording.records import MARK, CallMark, Edge, Record
from nnj.registry.layer_rules import apply_rule


class Graph:
    """The units between the outputs of a loss and the wanted parameters, in topological order.

    Args:
        roots: the edges of the outputs.
        wanted: whether a parameter is to be reached.
        paths: the name of each module, for errors.
        batched: a leaf that is no parameter but the model's input, with the samples in axis 0.
        products: whether products with bare parameters are taken for linear layers.
    """

    def __init__(
        self,
        roots: list[Edge],
        wanted: Callable[[Tensor], bool],
        paths: dict[int, str],
        batched: Tensor | None = None,
        products: bool = True,
    ):
        self.roots, self.wanted, self.paths, self.batched, self.products = (
            roots,
            wanted,
            paths,
            batched,
            products,
        )
        self.marks: list[CallMark] = []
        self._steps: dict[Any, Step] = {}
        self._needed: dict[Step, bool] = {}
        # nodes that stand for many, and the edges of their outputs
        self._expanded: dict[Any, list[Edge | None] | None] = {}
        self._aliases: dict[Any, Edge] = {}
        order = self._visit(roots)
        self.steps = [step for step in order if self._needed[step]]
        for step in self.steps:
            step.out = [
                e if e is not None and self._needed[self.step_at(e)] else None for e in step.out
            ]

    def step_at(self, edge: Edge) -> Step:
        node, nr = edge
        if "CompiledFunction" in node.name():
            raise NNJError(
                "the model runs under torch.compile, which leaves no calls of layers in the graph. "
                "Collect with the model that was given to torch.compile (model._orig_mod)"
            )
        if "CheckpointFunctionBackward" in node.name():
            raise NNJError(
                "torch.utils.checkpoint runs with use_reentrant=True, whose backward is a backward "
                "pass of its own and adds to .grad. Use use_reentrant=False"
            )
        if edge in self._steps:
            return self._steps[edge]
        if node in self._steps:
            step = self._steps[node]
        else:
            record = None
            if not hasattr(node, "variable"):
                found = node.metadata
                mark = found.get((MARK, nr))
                if mark is not None:
                    self.marks.append(mark)
                record = Record.of(node, nr)
            made = self._from_record(node, record) if record is not None else None
            if made is not None:
                self._steps[edge] = made
                made.into.append(edge)
                return made
            step = self._from_node(node)
            self._steps[node] = step
        self._steps[edge] = step
        step.into.append(edge)
        return step

    def _from_node(self, node: Any) -> Step:
        """A raw node as a unit; the bare parameters of a product are its own, and no columns go
        there.
        """
        out = [None if n is None else self._resolve((n, i)) for n, i in node.next_functions]
        step = Step(node, None, {}, [], out, node.variable if hasattr(node, "variable") else None)
        step.held = SavedInput(node)
        for bare in product(node, self._parameter, step.held) if self.products else []:
            step.bare, step.dtype, step.out[bare.operand] = True, bare.p.dtype, None
            step.slots[str(bare.operand)] = bare.j
            step.params.append((str(bare.operand), bare.p))
        return step

    def _resolve(self, edge: Edge) -> Edge | None:
        """The edge itself, or where it leads when a node that stands for many is taken apart."""
        node, nr = edge
        if node in self._aliases:
            return self._resolve(self._aliases[node])
        if node_name(node) != "MkldnnRnnLayer":
            return edge
        if node not in self._expanded:
            found = expand(node)
            self._expanded[node] = None if found is None else found[0]
            self._aliases.update({} if found is None else found[1])
        edges = self._expanded[node]
        return edge if edges is None else edges[nr]

    def _parameter(self, leaf: Tensor) -> bool:
        return leaf is not self.batched and self.wanted(leaf)

    def _from_record(self, node: Any, record: Record) -> Step | None:
        """A record as a unit, if its rule still describes the call."""
        if record.stale:
            return None
        if node_name(node) == "MaxPool2DWithIndices" and node.next_functions[0] == record.edge:
            # the node has saved where the largest entries are, which a rule would have to find
            # again
            return None
        point = working_point(record)
        if point is None:
            return None
        x, y = point
        slots = apply_rule(record.entry, record.module, x, y, self.paths.get(id(record.module), ""))
        if slots is None or (record.edge is not None and "input" not in slots):
            return None
        if record.entry.key is nn.Module and not confirmed(node, record, slots, y):
            return None
        for j in slots.values():
            # the rule reads neither x nor y: only the node knows where they were
            if j.like.device.type == "meta":
                j.like = torch.empty(j.n, 0, dtype=y.dtype, device=node._input_metadata[0].device)
        own = dict(record.module.named_parameters(remove_duplicate=False))
        params = [(slot, own[slot]) for slot in slots if slot != "input" and self.wanted(own[slot])]
        edge = None if record.edge is None else self._resolve(record.edge)
        return Step(node, record, slots, [], [edge], None, y.dtype, params)

    def _visit(self, roots: list[Edge]) -> list[Step]:
        """Units in topological order (reversed postorder of a depth-first walk), with what each of
        them leads to.
        """
        order: list[Step] = []
        done: set[Step] = set()
        for root in roots:
            stack: list[tuple[Step, bool]] = [(self.step_at(root), False)]
            while stack:
                step, leaving = stack.pop()
                if leaving:
                    children = [self.step_at(e) for e in step.out if e is not None]
                    leaf = step.leaf is not None and self.wanted(step.leaf)
                    self._needed[step] = (
                        leaf or bool(step.params) or any(self._needed[c] for c in children)
                    )
                    step.batch = (bool(step.params) and not step.bare) or (
                        leaf and step.leaf is self.batched
                    )
                    step.batch_above = any(c.batch or c.batch_above for c in children)
                    step.bare_above = any(c.bare or c.bare_above for c in children)
                    order.append(step)
                elif step not in done:
                    done.add(step)
                    stack.append((step, True))
                    stack += [(self.step_at(e), False) for e in step.out if e is not None]
        return order[::-1]
