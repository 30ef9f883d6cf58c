"""The sweep: columns of the loss's Hessian go backwards over autograd's graph, and become factors
at the parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nnj.checks import ask_now, being_traced
from nnj.errors import Coupled, NNJError
from nnj.graph.builder import Graph
from nnj.graph.matmul import product_backward
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import own_task, signed, sum_to
from nnj.graph.op_names import NEW
from nnj.graph.step import Step, describe
from nnj.jacobians.factor import DenseFactor, Factor, merge_uses
from nnj.jacobians.jacobian import Jacobian
from nnj.jacobians.sample_index import SampleIndex
from nnj.jacobians.separable import note, separable
from nnj.propagation.hooks import Hooks
from nnj.propagation.plan import NOTHING, Assumptions, Plan, device_of
from nnj.propagation.probe import Probe
from nnj.recording.records import Edge, Record
from nnj.recording.tensor_parallel import shape_here, whole_layer
from nnj.registry.blame import blame
from nnj.registry.layer_rules import Declined, ask_rule, checked

Sink = Callable[[Tensor, Factor], None]


class Cotangents(dict[Edge, Tensor]):
    """Cotangents by edge, (K, *shape). Sums, and what a layer has made anew, are tensors of our
    own, to which more is added in place.

    Attributes:
        took_own: whether what was taken last is our own, so that it may be written over.
    """

    def __init__(self, *args: dict[Edge, Tensor]):
        super().__init__(*args)
        self._own: set[Edge] = set()
        self.took_own = False

    def add(self, edge: Edge, v: Tensor, is_new: bool = False) -> None:
        """One more share. Args: is_new: whether v is memory that nothing else uses."""
        there = self.get(edge)
        if there is None:
            self[edge] = v
            if is_new:
                self._own.add(edge)
        elif edge in self._own:
            there += v
        else:
            self[edge] = there + v
            self._own.add(edge)

    def add_part(
        self, edge: Edge, shape: tuple[int, ...], axis: int, index: int, v: Tensor
    ) -> None:
        """A share that is zero but at one index of an axis of `shape`."""
        there = self.get(edge)
        if there is None or edge not in self._own:
            self[edge] = v.new_zeros(len(v), *shape) if there is None else there.clone()
            self._own.add(edge)
        self[edge].select(axis + 1, index).add_(v)

    def take(self, edge: Edge) -> Tensor:
        """What arrived, which goes on."""
        self.took_own = edge in self._own
        self._own.discard(edge)
        return self.pop(edge)


class Sweep(Plan):
    """Goes over a graph as its plan says; a probe finds out what the names of nodes do not tell.

    Attributes:
        uses: at how many steps each parameter has a factor.
        hooks: the user's hooks through which columns go; set by `verification`.
        gathers: whether factors are those of all of a parameter that is distributed.
    """

    def __init__(
        self,
        graph: Graph,
        n: int,
        sample_indices: dict[Edge, SampleIndex],
        assume: Assumptions = NOTHING,
        outputs: dict[Edge, SampleIndex] | None = None,
    ):
        super().__init__(graph, n, sample_indices, assume, outputs)
        # what the probe said of edges at which nothing has arrived yet
        self._unchecked: dict[Edge, SampleIndex] = {}
        self.hooks: Hooks | None = None
        self.gathers, self._wholes = False, dict[Step, dict[str, Jacobian]]()
        self.uses = uses_of(graph.steps)
        if self._has_to_ask():
            own_task(lambda: self._find_sample_indices(sample_indices))

    # -- probing -----------------------------------------------------------------------------------

    def _find_sample_indices(self, roots: dict[Edge, SampleIndex]) -> None:
        """Let the probe's columns go through the graph, and read whose the entries are on the edges
        of which the names of nodes say nothing.
        """
        ask_now()
        probe, values = Probe(self.n), Cotangents()
        probed: dict[Edge, SampleIndex] = {}
        for edge, sample_index in roots.items():
            like = torch.empty((), dtype=self.graph.dtypes[edge], device=device_of(edge))
            values[edge] = probe.columns(sample_index, self.shapes[edge], like)
        for step in self.graph.steps:
            if self._reads_samples(step):
                for edge in step.into:
                    if self.state[edge] is None and edge in values:
                        who = describe(step, self.graph.paths)
                        probed[edge] = probe.sample_index(values[edge], who)
            arrived = {e: values.take(e) for e in step.into if e in values}
            if arrived and step.leaf is None and step not in self.by_column:
                self._probe_step(step, arrived, values)
        for edge, sample_index in probed.items():
            tidy = sample_index.tidy()
            self.state[edge] = self.in_order if tidy.of is None else tidy
        self._unchecked = probed

    def _has_to_ask(self) -> bool:
        """Whether something is told apart by sample at an edge of which nothing is known."""
        if None not in self.state.values():
            return False
        return any(
            self.state[edge] is None
            for step in self.graph.steps
            if self._reads_samples(step)
            for edge in step.into
        )

    def _reads_samples(self, step: Step) -> bool:
        """Whether what arrives at a step is told apart by sample: for its parameters, for columns
        that are split there, or to be summed.
        """
        return (
            bool(step.params)
            or step.leaf is not None
            or step in self.by_column
            or any(route is not None and route.way != "together" for route in self.routes[step])
        )

    def _probe_step(self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> None:
        """J itself, whatever goes through the graph afterwards, and to operands with samples
        alone.
        """
        if step.record is not None:
            self._record(step, arrived, values, None)
            return
        together = [route is not None and route.way == "together" for route in self.routes[step]]
        if not any(together) or self._select(step, arrived, values):
            return
        answers = Sweep.backward(self, step, _arguments(step, arrived), _count(arrived))
        for i, (edge, back) in enumerate(zip(step.out, answers, strict=False)):
            if edge is not None and back is not None and together[i]:
                self._send(step, i, sum_to(back, self.shapes[edge], 1), values)

    # -- what a step is: overridden where something else than J goes through the graph ------------

    def operator(self, step: Step, slot: str) -> Jacobian:
        """The operator of a record in one slot."""
        return step.slots[slot]

    def backward(self, step: Step, args: list[Tensor | None], k: int) -> list[Tensor | None]:
        """What a raw node sends to its operands for k columns."""
        if step.bare and args[0] is not None:
            return product_backward(step.node, args[0], step.out)
        return call_node(step.node, args, k)

    # -- going through the graph -------------------------------------------------------------------

    def run(
        self, roots: dict[Edge, Tensor], k: int, sink: Sink, steps: list[Step] | None = None
    ) -> dict[Edge, Tensor]:
        """Let k columns go back from the roots; `sink` is given each parameter with the factor of
        all its uses.

        Args:
            roots: for each root edge its columns, (K, *shape).
            k: K.
            sink: called once for each parameter that was reached.
            steps: go through these alone.

        Returns:
            What stands on edges to whose steps nothing went on.
        """
        values = Cotangents({edge: v.to(self.graph.dtypes[edge]) for edge, v in roots.items()})
        pending: dict[Tensor, list[Factor]] = {}
        if self.hooks is not None:
            sink = self._behind_hooks(sink, self.hooks)

        def use(p: Tensor, factor: Factor) -> None:
            if self.uses[p] == 1:
                sink(p, factor)
                return
            parts = pending.setdefault(p, [])
            parts.append(factor)
            if len(parts) == self.uses[p]:
                sink(p, merge_uses(pending.pop(p)))

        def walk() -> None:
            for step in self.graph.steps if steps is None else steps:
                self.cross(step, values, k, use)
            for p, parts in pending.items():  # to some of its uses nothing was sent
                sink(p, merge_uses(parts))

        if self.hooks is None and all(map(_reads_no_node, self.graph.steps)):
            with torch.no_grad():
                walk()
        else:
            own_task(walk)
        return values

    def watch(
        self, roots: dict[Edge, Tensor], k: int, steps: list[Step]
    ) -> list[tuple[Step, Tensor]]:
        """What arrives at some records, without any factor."""
        values, seen = Cotangents(roots), []

        def walk() -> None:
            for step in self.graph.steps:
                if step in steps and step.into[0] in values:
                    seen.append((step, values[step.into[0]]))
                self.cross(step, values, k, None)

        own_task(walk)
        return seen

    def cross(self, step: Step, values: Cotangents, k: int, use: Sink | None) -> None:
        """Let what has arrived at a step go through it; `use` is given factors at its
        parameters.
        """
        arrived = {e: values.take(e) for e in step.into if e in values}
        if not arrived:
            return
        if self.hooks is not None:
            at = self.hooks.at_edges
            arrived = {e: at[e](v) if e in at else v for e, v in arrived.items()}
        if step in self.by_column:
            arrived = {e: self.sample_index(e, step, v).to_columns(v) for e, v in arrived.items()}
        if step.leaf is not None:
            if use is not None:
                self._leaf(step, step.leaf, arrived, k, use)
        elif step.record is not None:
            self._record(step, arrived, values, use)
        else:
            if step.bare and use is not None:
                # where a reshape follows, the weight behind it sees the same memory as the bias
                arrived = {e: v.contiguous() for e, v in arrived.items()}
                self._bare(step, arrived, use)
            if not self._select(step, arrived, values):
                self._node(step, arrived, values)

    @staticmethod
    def _behind_hooks(sink: Sink, hooks: Hooks) -> Sink:
        """What is given the factors behind the hooks of parameters."""
        return lambda p, factor: sink(p, hooks.factor(p, factor))

    def sample_index(self, edge: Edge, step: Step, v: Tensor | None = None) -> SampleIndex:
        """Whose the entries on an edge of a step are. Errors: `NNJError` if that was not found out,
        or if v, which arrived there, has more in it than the probe saw.
        """
        sample_index, more = self.state[edge], False
        if v is not None and edge in self._unchecked:
            # zero entries are the same in every chunk, so to check once is enough
            of = self._unchecked.pop(edge).of
            more = of is not None and _beyond_rounding(v, of < 0)
        if sample_index is None or more:
            raise NNJError(
                f"nnj could not find out whose the rows at {describe(step, self.graph.paths)} are"
            )
        return sample_index

    # -- leaves ------------------------------------------------------------------------------------

    def _leaf(
        self, step: Step, leaf: Tensor, arrived: dict[Edge, Tensor], k: int, use: Sink
    ) -> None:
        (v,) = arrived.values()
        if leaf is self.graph.batched:
            use(leaf, DenseFactor(self._own_rows(step, v)))
        else:
            use(leaf, _wide(DenseFactor(v.reshape(k, self.n, *leaf.shape))))

    def _own_rows(self, step: Step, v: Tensor) -> Tensor:
        """Columns at the model's input, where each sample's row is its own."""
        if step not in self.by_column:
            self.check_order(step, v.device)
        elif self.n > 1:
            # of the column of sample i row i
            v = v.unflatten(0, (-1, self.n))
            size = v.abs().amax(0).flatten(2).amax(2) if v.dim() > 3 else v.abs().amax(0)
            apart = size.masked_fill(torch.eye(self.n, dtype=torch.bool, device=v.device), 0)
            if bool((apart > 1e3 * torch.finfo(v.dtype).eps * size.max()).any()):
                raise Coupled.at("the input")
            v = v.diagonal(dim1=1, dim2=2).movedim(-1, 1)
        return v

    def check_order(self, step: Step, device: torch.device) -> None:
        """Errors: `NNJError` unless row n of the model's input is that of sample n, as it is in the
        output.
        """
        of = self.sample_index(step.into[0], step).of
        if of is None:
            return
        own = torch.arange(self.n, device=device).reshape(-1, *[1] * (of.dim() - 1))
        # an entry may be nobody's, behind a mask
        if not bool(((of == own) | (of < 0)).all()):
            raise Coupled(
                "the rows of the output do not belong to the same rows of the input: output n must "
                "be that of sample n, in axis 0"
            )

    # -- layers ------------------------------------------------------------------------------------

    def _record(
        self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents, use: Sink | None
    ) -> None:
        ((edge, v),) = arrived.items()
        record = step.record
        assert record is not None
        v = v.to(step.dtype)
        if use is not None:
            self._parameters(step, edge, v, use)
        if step.out[0] is not None:
            j = self.operator(step, "input")
            over = use is not None and values.took_own and self._nobody_sees(step, v)
            back, shape = j.vjp_over(v) if over else j.vjp(v), (len(v), *self.input_shape(step))
            if not isinstance(back, Tensor) or back.shape != shape:
                checked("vjp of 'input'", back, shape, self._who(record))
            if j.spreads or j.entrywise:
                note(j, v, back)
            self._send(step, 0, back, values, j.makes_new)

    def _nobody_sees(self, step: Step, v: Tensor) -> bool:
        """Whether nobody reads columns after they have gone through a layer."""
        seen = step.params or step in self.by_column or self.hooks is not None
        return not seen and separable(v) is None and not being_traced()

    def input_shape(self, step: Step) -> tuple[int, ...]:
        """Of what a layer was given, as columns have it."""
        assert step.record is not None
        return tuple(step.record.x.shape)

    def _parameters(self, step: Step, edge: Edge, v: Tensor, use: Sink) -> None:
        """Columns at a step's own parameters."""
        operators: Mapping[str, Jacobian] | None = None
        if self.gathers and step.params and step.record is not None and step.record.parallel:
            v = step.record.parallel.whole_output(v)  # once: a bias is known by its weight's
            operators = self._whole(step, step.record, v)
        for slot, p in step.params:
            j = self.operator(step, slot) if operators is None else operators[slot]
            factor = j.pullback(v, self.sample_index(edge, step, v))
            shape = shape_here(p) if operators is None else tuple(p.shape)
            if step.record is not None and factor.shape != shape:
                who = self._who(step.record)
                checked(f"vjp of {slot!r}", torch.empty(factor.shape), shape, who)
            use(p, _wide(factor))

    def _whole(self, step: Step, record: Record, v: Tensor) -> Mapping[str, Jacobian]:
        """The operators of a layer of which this rank has a part, in all of its parameters.

        Args:
            v: columns at all of its outputs.
        """
        slots = self._wholes.get(step)
        if slots is None:
            assert record.parallel is not None
            x = record.parallel.whole_input(record.x.tensor())
            y = torch.empty(v.shape[1:], dtype=v.dtype, device="meta")
            said = ask_rule(record.entry, whole_layer(record.module), x, y, self.graph.paths)
            if isinstance(said, Declined):
                raise NNJError(f"{self._who(record)}: its rule does not say what all of it is")
            slots = self._wholes[step] = said.jacobians
        return slots

    def _who(self, record: Record) -> str:
        return blame(record.entry, record.module, self.graph.paths.get(record.module, ""))

    # -- raw nodes ---------------------------------------------------------------------------------

    def _bare(self, step: Step, arrived: dict[Edge, Tensor], use: Sink) -> None:
        """Columns at the bare parameters of a product."""
        ((edge, v),) = arrived.items()
        if step.saved_input is not None:
            step.saved_input.take()
        self._parameters(step, edge, v.to(step.dtype), use)

    def _node(self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> None:
        """A raw node is called once for all its operands: with the columns as they stand, and
        behind these, where an operand needs them so, with those that are split.
        """
        routes, k = self.routes[step], _count(arrived)
        ways = {route.way for route in routes if route is not None}
        if not ways:
            return
        given, in_all = arrived, k
        if "split" in ways:
            k = k if len(ways) > 1 else 0
            given = {
                e: torch.cat([v[:k], self.sample_index(e, step, v).to_columns(v)])
                for e, v in arrived.items()
            }
            in_all = _count(given)
        answers = self.backward(step, _arguments(step, given), in_all)
        for i, (edge, route, back) in enumerate(zip(step.out, routes, answers, strict=False)):
            if edge is None or route is None or back is None:
                continue
            if route.way == "summed":
                share = self._summed(step, edge, arrived, back[:k])
            else:
                share = sum_to(back[k:] if route.way == "split" else back[:k], self.shapes[edge], 1)
            self._send(step, i, share, values, route.way != "summed" and step.name in NEW)

    def _summed(self, step: Step, edge: Edge, arrived: dict[Edge, Tensor], back: Tensor) -> Tensor:
        """At an operand that is broadcast along the samples each sample's share of the node's
        answer, (K * n, *shape).
        """
        ((source, v),) = arrived.items()
        answer = v if step.name == "Expand" else back  # Expand has summed already
        if tuple(answer.shape[1:]) != self.shapes[source]:
            raise NNJError(
                f"autograd's {step.name} gave {tuple(answer.shape[1:])}, expected "
                f"{self.shapes[source]}"
            )
        sample_index = self.sample_index(source, step, answer)
        if sample_index.of is None and not sample_index.by_column:
            # rows in order need no zeros at those of others
            parts = answer.unflatten(1, (self.n, answer.shape[1] // self.n)).flatten(0, 1)
        else:
            parts = sample_index.to_columns(answer)
        shape = self.shapes[edge]
        return sum_to(parts, shape, 1).reshape(answer.shape[0] * self.n, *shape)

    def _select(self, step: Step, arrived: dict[Edge, Tensor], values: Cotangents) -> bool:
        """Whether a step is one index of an axis: that is added where it belongs, as else as many
        tensors of zeros would be added as there are indices.
        """
        if step.name != "Select":
            return False
        (edge,), (route,) = step.out, self.routes[step]
        if edge is None or route is None or route.way != "together":
            return False
        if route.index is None or self.state[edge] is not route.index:
            return False
        (v,), shape = arrived.values(), self.shapes[edge]
        axis, index = step.node._saved_dim, step.node._saved_index
        values.add_part(
            edge, shape, signed(axis) % len(shape), signed(index), v.to(self.graph.dtypes[edge])
        )
        return True

    def _send(
        self, step: Step, i: int, v: Tensor, values: Cotangents, is_new: bool = False
    ) -> None:
        """Columns for operand i go to its edge, in the dtype and the way in which they stand
        there. Args: is_new: whether v is memory that nothing else uses.
        """
        edge = step.out[i]
        assert edge is not None
        v, there, sample_index = v.to(self.graph.dtypes[edge]), self.state[edge], None
        if there is not None and there.by_column:
            sample_index = self.split_at(step, i)
        if sample_index is not None:
            v, is_new = sample_index.to_columns(v), False
        values.add(edge, v, is_new)


def uses_of(steps: list[Step]) -> dict[Tensor, int]:
    """At how many steps each parameter has a factor."""
    found: list[Tensor] = [p for step in steps for _, p in step.params]
    return Counter(found + [step.leaf for step in steps if step.leaf is not None])


def _reads_no_node(step: Step) -> bool:
    """Whether a step is crossed without autograd's node, which may have tensors to unpack."""
    record = step.record
    return step.leaf is not None or (record is not None and not record.entry.is_fallback)


def _count(arrived: dict[Edge, Tensor]) -> int:
    """How many columns have arrived."""
    return next(iter(arrived.values())).shape[0]


def _arguments(step: Step, arrived: dict[Edge, Tensor]) -> list[Tensor | None]:
    """Columns as a node takes them: by the number of its output."""
    args: list[Tensor | None] = [None] * len(step.node._input_metadata)
    for edge, v in arrived.items():
        args[edge[1]] = v
    return args


def _beyond_rounding(v: Tensor, nobody: Tensor) -> bool:
    """Whether something arrived at entries where the probe saw nothing; what rounding leaves of
    zero is dropped there.
    """
    if not bool(nobody.any()):
        return False
    size = v.abs().amax(0)
    return bool(((size > 1e3 * torch.finfo(v.dtype).eps * size.max()) & nobody).any())


def _wide(factor: Factor) -> Factor:
    """Sums over samples and columns are taken in 32 bits at least."""
    return factor.to(torch.float32) if factor.dtype in (torch.float16, torch.bfloat16) else factor
