"""Who speaks for a call: its record, with the rule of a plugin, or autograd's own nodes.

The graph of a backward pass and `python -m nnj` both ask `accept`, so that one says what the other
does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnj.generators import OwnGenerator
from nnj.graph.node_vjp import call_node
from nnj.graph.nodes import edge_shape, edges, leaf_of, node_name, own_task, sum_to
from nnj.graph.op_names import ATTENTION, BATCHED, COPIES, ELEMENTWISE, TRUSTED
from nnj.graph.traverse import reachable, topological
from nnj.jacobians.jacobian import Jacobian, LinearMap
from nnj.recording.called_with import Replaced
from nnj.recording.records import Edge, Record, check_parameters, replaced_in
from nnj.recording.tensor_parallel import Parallel, part_of_layer
from nnj.registry.layer_rules import Declined, Described, ask_rule, parameters_by_name

LARGEST_CALL = 10_000  # nodes of a call that are compared with the fallback's answer
VIEWS = COPIES & TRUSTED
ENTERED = ELEMENTWISE | BATCHED.keys() | {"NativeLayerNorm"}  # where a weight and the data may meet
BY_NODE = "autograd's node has saved what its rule would have to find again"
BY_PRODUCTS = "autograd's nodes take its parameters together with its input, and cost less"
UNRECORDED = Declined("a hook, or the shapes of its input and output, hide what its rows are")


class Accepted(NamedTuple):
    """A record that speaks for its call.

    Attributes:
        jacobians: of the output in the input and each parameter, computed in `dtype`.
        parameters: those of the module, by name.
    """

    record: Record
    jacobians: dict[str, Jacobian]
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype


def accept(
    node: Any,
    number: int,
    paths: Mapping[nn.Module, str],
    wanted: Callable[[Tensor], bool] = lambda p: False,
    replaced: list[Replaced] | None = None,
) -> Accepted | Declined:
    """The record at output `number` of a node, or why autograd's nodes speak for that output.

    Args:
        paths: the names of modules, for errors.
        wanted: whether results may stand on a parameter.
        replaced: takes in the parameters of the layer in whose place others were in the call.

    Errors: `PluginError` if the rule is broken, `NNJError` if it refuses the call.
    """
    record = Record.of(node, number)
    if record is None:
        return UNRECORDED
    if record.stale:
        return _stale(record, paths, wanted, replaced)
    if not record.by_rows:
        return UNRECORDED
    if record.entry.node == node.name() and edges(node)[0] == record.edge:
        return Declined(BY_NODE)
    if record.entry.is_fallback and _enters_with_data(node, record):
        return Declined(BY_PRODUCTS)
    point = record.working_point()
    if point is None:
        return Declined("its parameters are narrower than its tensors")
    x, y = point
    said = _asked(record, x, y, paths)
    if isinstance(said, Declined):
        return said
    if record.edge is not None and "input" not in said.jacobians:
        return Declined("its rule does not know its input")
    accepted = Accepted(record, said.jacobians, said.parameters, y.dtype)
    if record.entry.is_fallback and not _confirmed(node, accepted, y):
        return Declined("for each sample alone it is not what autograd says")
    return accepted


def _asked(
    record: Record, x: Tensor, y: Tensor, paths: Mapping[nn.Module, str]
) -> Described | Declined:
    """What the rule says of a call, or of the part of it on this rank."""
    if record.parallel is None:
        return ask_rule(record.entry, record.module, x, y, paths)
    said = ask_rule(record.entry, part_of_layer(record.module), x, y, paths)
    if isinstance(said, Declined):
        return said
    return _over_ranks(said, record.parallel, parameters_by_name(record.module))


def _over_ranks(
    said: Described, parallel: Parallel, parameters: dict[str, nn.Parameter]
) -> Described:
    """What a rule says of a part of a layer, with the sums over ranks that make it the layer."""
    jacobians = dict(said.jacobians)
    j = jacobians.get("input")
    if j is not None:
        summed = parallel.summed
        vjp = (lambda u: summed(j.vjp(u))) if parallel.way == "outputs" else j.vjp
        jvp = (lambda v: summed(j.jvp(v))) if parallel.way == "inputs" else j.jvp
        jacobians["input"] = LinearMap(jvp, vjp, j.inputs, j.outputs, j.like, per_row=True)
    return Described(jacobians, parameters)


def _stale(
    record: Record,
    paths: Mapping[nn.Module, str],
    wanted: Callable[[Tensor], bool],
    replaced: list[Replaced] | None,
) -> Declined:
    """That something of a record is another by now; the arguments are those of `accept`."""
    name = paths.get(record.module, "") or type(record.module).__name__
    check_parameters(record, f"layer '{name}'", wanted)
    if replaced is not None:
        replaced += replaced_in(record)
    return Declined("what its rule reads was written over in place")


# -- the fallback, which assumes what only the graph of a call can confirm -------------------------


def _enters_with_data(node: Any, record: Record) -> bool:
    """Whether each parameter, but for views of it, enters the call at a node that also takes what
    depends on the input: as in x W + b, not in x softmax(W).

    There columns need not be walked for each sample apart, and the fallback, which computes the
    call anew for each sample and column, takes 1.2 to 4 times as long (measured). But it says that
    rows are along axis 0, which nodes of products of sequences do not where another axis is as
    long."""
    shapes = [shape for shape in (record.x.shape, record.y.shape) if len(shape) > 2]
    if any(n == shape[0] for shape in shapes for n in shape[1:]):
        return False
    nodes = _nodes_of_call(node, record)
    if nodes is None:
        return False
    of_parameters = set[Any]()
    for n in reversed(nodes):
        name, operands = node_name(n), edges(n)
        weights = [
            e is not None
            and e != record.edge
            and (e[0] in of_parameters or leaf_of(e[0]) is not None)
            for e in operands
        ]
        if name not in TRUSTED and not name.startswith(ATTENTION):
            return False
        if operands and all(weights):
            if name not in VIEWS:
                return False
            of_parameters.add(n)
        elif any(weights) and name not in ENTERED:
            return False
    return True


def _confirmed(node: Any, accepted: Accepted, y: Tensor) -> bool:
    """Whether every path through the call ends at its input or its own parameters, and one random
    vjp is autograd's own.

    This sees samples that influence one another, tensors of other layers and hooks on gradients."""
    record, parameters = accepted.record, accepted.parameters
    nodes = _nodes_of_call(node, record)
    if nodes is None:
        return False
    seed = OwnGenerator.seeded()
    u = torch.rand(y.shape, generator=seed).to(y.device, y.dtype) + 0.5
    eps: float = torch.finfo(y.dtype).eps
    try:
        at_input, at_leaves = own_task(lambda: _autograd_vjp(node, record, nodes, u))
        for slot, j in accepted.jacobians.items():
            if slot == "input":
                if record.edge is not None and not _same(j.vjp(u[None])[0], at_input, eps):
                    return False
            elif (p := parameters[slot]).requires_grad:
                if not _same(j.vjp(u[None])[0].sum(0), at_leaves.get(p), eps):
                    return False
    except RuntimeError:
        return False
    return True


def call_vjp(
    node: Any, record: Record, u: Tensor
) -> tuple[Tensor | None, dict[Tensor, Tensor]] | None:
    """Autograd's own vjp of the call of a record with u, without any hook: at x, and at the leaves.
    None if a path through the call ends elsewhere, or it has too many nodes. To be run in a pass of
    its own.
    """
    nodes = _nodes_of_call(node, record)
    return None if nodes is None else _autograd_vjp(node, record, nodes, u)


def _same(found: Tensor, expected: Tensor | None, eps: float) -> bool:
    """Whether two gradients agree but for rounding; None is zero."""
    if expected is None:
        expected = torch.zeros_like(found)
    tolerance = eps**0.5 * (expected.abs().max() + found.abs().max())
    return found.shape == expected.shape and not bool(((found - expected).abs() > tolerance).any())


def _nodes_of_call(node: Any, record: Record) -> list[Any] | None:
    """The nodes of a call in topological order, without leaves; None if a path ends elsewhere than
    at x and the module's parameters, or there are too many.
    """
    own = set(record.module.parameters())

    def inside(n: Any) -> list[Any]:
        return [edge[0] for edge in edges(n) if edge is not None and edge != record.edge]

    met = 0
    for n in islice(reachable([node], inside), LARGEST_CALL + 1):
        leaf, met = leaf_of(n), met + 1
        if leaf is not None and leaf not in own:
            return None
    if met > LARGEST_CALL:
        return None
    return [n for n in topological([node], inside) if leaf_of(n) is None]


def _autograd_vjp(
    node: Any, record: Record, order: list[Any], u: Tensor
) -> tuple[Tensor | None, dict[Tensor, Tensor]]:
    """Autograd's own vjp of a call with u: at x, and at the leaves."""
    values: dict[Edge, Tensor] = {(node, 0): u}
    # apart from the values: another output of the same node may be inside of the call
    at_input: Tensor | None = None
    at_leaves: dict[Tensor, Tensor] = {}
    for n in order:
        args = [values.pop((n, nr), None) for nr in range(len(n._input_metadata))]
        if all(a is None for a in args):
            continue
        columns = [None if a is None else a[None] for a in args]
        for edge, back in zip(edges(n), call_node(n, columns, 1), strict=False):
            if back is None or edge is None:
                continue
            t = sum_to(back, edge_shape(edge), 1)[0]
            if edge == record.edge:
                at_input = t if at_input is None else at_input + t
            elif (leaf := leaf_of(edge[0])) is not None:
                at_leaves[leaf] = at_leaves[leaf] + t if leaf in at_leaves else t
            else:
                values[edge] = values[edge] + t if edge in values else t
    return at_input, at_leaves
