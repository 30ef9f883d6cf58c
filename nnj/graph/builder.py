"""Autograd's graph as linear steps, records and nodes, with their edges, in topological order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nnj.distributed.ranks import there_are_groups
from nnj.graph.acceptance import Accepted, accept
from nnj.graph.lstm import expand
from nnj.graph.matmul import PRODUCTS, SavedInput, bare_parameters
from nnj.graph.nodes import LEAF, edges, is_alive, leaf_of, node_name, shape_at
from nnj.graph.refusals import refuse_leaf, refuse_model, refuse_node, refuse_tensor
from nnj.graph.step import Step
from nnj.graph.traverse import children, reachable, topological
from nnj.recording.called_with import Replaced
from nnj.recording.records import MARK, CallMark, Edge
from nnj.recording.wrappers import check_engine


class Graph:
    """The steps between the outputs of a loss and the wanted parameters, in topological order.

    Args:
        roots: the edges of the outputs.
        wanted: whether a parameter is to be reached.
        paths: the name of each module, for errors.
        batched: a leaf that is no parameter but the model's input, with the samples in axis 0.
        products: whether products with bare parameters are taken for linear layers.
        parallel: whether layers may be distributed by tensor parallelism.
    """

    def __init__(
        self,
        roots: list[Edge],
        wanted: Callable[[Tensor], bool],
        paths: Mapping[nn.Module, str],
        batched: Tensor | None = None,
        products: bool = True,
        parallel: bool = False,
    ):
        self.roots, self.wanted, self.paths = roots, wanted, paths
        self.batched, self.products = batched, products
        self.parallel = parallel and there_are_groups()
        # the edges on which outputs of outermost calls were met
        self.outputs: dict[Edge, CallMark] = {}
        self.shapes: dict[Edge, tuple[int, ...]] = {}  # of the tensor on each edge
        self.dtypes: dict[Edge, torch.dtype] = {}
        self._replaced: list[Replaced] = []  # in calls of layers
        self._empty: list[Any] = []  # nodes of tensors without entries
        self._sizeless: list[Tensor] = []  # parameters without entries
        self._steps: dict[Edge, Step] = {}
        self._raw: dict[Any, Step] = {}  # steps of nodes, which may have several outputs
        self._needed: set[Step] = set()  # those that lead to what is wanted
        # nodes that stand for many: the edges of their outputs, and where their inputs lead
        self._expanded: dict[Any, list[Edge | None] | None] = {}
        self._aliases: dict[Any, Edge] = {}
        self.steps = self._wanted_steps()
        self.roots = [edge for edge in roots if 0 not in self.shapes[edge]]
        for step in self.steps:
            step.out = [
                e if e is not None and self.step_at(e) in self._needed else None for e in step.out
            ]

    def _wanted_steps(self) -> list[Step]:
        """The steps that lead to what is wanted, in topological order; each is told what lies
        behind it.
        """
        behind: dict[Step, list[Step]] = {}

        def below(step: Step) -> list[Step]:
            found = behind[step] = [self.step_at(e) for e in step.out if e is not None]
            return found

        order = topological((self.step_at(root) for root in self.roots), below)
        for step in reversed(order):
            leaf = step.leaf is not None and self.wanted(step.leaf)
            needed = leaf or bool(step.params)
            step.batch = (bool(step.params) and not step.bare) or (
                leaf and step.leaf is self.batched
            )
            for later in behind[step]:
                needed = needed or later in self._needed
                step.batch_above = step.batch_above or later.batch or later.batch_above
                step.bare_above = step.bare_above or later.bare or later.bare_above
            if needed:
                self._needed.add(step)
        return [step for step in order if step in self._needed]

    def step_at(self, edge: Edge) -> Step:
        """The step whose result is on an edge; it is made when it is asked for the first time."""
        step = self._steps.get(edge)
        if step is None:
            like = edge[0]._input_metadata[edge[1]]
            refuse_tensor(like.is_nested_tensor, like.device)
            shape = shape_at(edge) if self.parallel else tuple(like.shape)
            self.shapes[edge] = shape
            self.dtypes[edge] = like.dtype
            if type(edge[0]) is not LEAF and (mark := edge[0].metadata.get((MARK, edge[1]))):
                check_engine(mark.engine)
                refuse_model(mark.module, self.parallel)
                self.outputs[edge] = mark
            if 0 in shape:
                step = self._nothing(edge)
            else:
                step = self._raw.get(edge[0]) or self._made(edge)
            self._steps[edge] = step
            step.into.append(edge)
        return step

    def _nothing(self, edge: Edge) -> Step:
        """The step on an edge whose tensor has no entries (no rows, no width): it leads nowhere."""
        self._empty.append(edge[0])
        return Step(node_name(edge[0]), edge[0], None, {}, [], [])

    @cached_property
    def marks(self) -> list[CallMark]:
        """Of the outermost calls that were met, each once, in their order."""
        return sorted(dict.fromkeys(self.outputs.values()), key=lambda mark: mark.order)

    def replaced(self) -> Iterator[Replaced]:
        """The parameters in whose place others were in the calls that were met."""
        yield from self._replaced
        for mark in self.marks:
            yield from mark.called_with.replaced()

    def without_entries(self) -> dict[Tensor, None]:
        """The wanted parameters that are behind tensors without entries, or have none themselves:
        autograd gives them zeros, and no column ever comes to them from there.
        """
        leaves = (leaf_of(node) for node in reachable(self._empty, children))
        found = dict.fromkeys(leaf for leaf in leaves if leaf is not None and self.wanted(leaf))
        return found | dict.fromkeys(self._sizeless)

    def _made(self, edge: Edge) -> Step:
        """The step of the record on an edge if it speaks for its call, else that of the node."""
        node, number = edge
        refuse_node(node)
        if type(node) is not LEAF:
            said = accept(node, number, self.paths, self.wanted, self._replaced)
            if isinstance(said, Accepted):
                return self._from_record(node, said)
        step = self._raw[node] = self._from_node(node)
        return step

    def _from_record(self, node: Any, said: Accepted) -> Step:
        """A record as a step, from the edge of its output straight to the edge of its input."""
        record, jacobians, parameters, dtype = said
        for j in jacobians.values():
            # the rule reads neither x nor y: only the node knows where they were
            if j.like.device.type == "meta":
                j.like = torch.empty(j.n, 0, dtype=dtype, device=node._input_metadata[0].device)
        params = []
        for slot in jacobians:
            if slot != "input" and self.wanted(p := parameters[slot]):
                if 0 in p.shape:
                    self._sizeless.append(p)
                else:
                    params.append((slot, p))
        edge = record.edge
        if edge is not None:
            # a dead one led nowhere: y does not depend on it
            edge = self._resolve(edge) if is_alive(edge[0]) else None
        name = type(record.module).__name__
        return Step(name, node, record, jacobians, [], [edge], None, dtype, params)

    def _from_node(self, node: Any) -> Step:
        """A node as a step. Bare parameters of a product belong to the step, and no columns are
        sent to them.
        """
        out = [None if edge is None else self._resolve(edge) for edge in edges(node)]
        leaf = leaf_of(node)
        if leaf is not None:
            refuse_leaf(leaf)
        step = Step(node_name(node), node, None, {}, [], out, leaf)
        if self.products and step.name in PRODUCTS:
            step.saved_input = SavedInput(node)
            for bare in bare_parameters(node, self._parameter, step.saved_input):
                step.bare, step.dtype, step.out[bare.operand] = True, bare.p.dtype, None
                step.slots[str(bare.operand)] = bare.j
                step.params.append((str(bare.operand), bare.p))
        return step

    def _resolve(self, edge: Edge) -> Edge | None:
        """The edge itself, or where it leads when a node that stands for many is taken apart."""
        node, nr = edge
        if node in self._aliases:
            return self._resolve(self._aliases[node])
        if node.name() != "MkldnnRnnLayerBackward0":
            return edge
        if node not in self._expanded:
            found = expand(node)
            self._expanded[node] = None if found is None else found[0]
            self._aliases.update({} if found is None else found[1])
        edges = self._expanded[node]
        return edge if edges is None else edges[nr]

    def _parameter(self, leaf: Tensor) -> bool:
        """Whether a leaf is a wanted parameter, and not the input."""
        return leaf is not self.batched and self.wanted(leaf)
