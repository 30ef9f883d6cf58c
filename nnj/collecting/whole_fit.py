"""A fit of which ranks have parts as one that each of them has whole: DTensors are gathered, and
what one rank has for all goes to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nnj.collecting.quantity import Quantity
from nnj.distributed.packing import form_of
from nnj.distributed.ranks import Ranks
from nnj.matrices.load import unpacked
from nnj.matrices.matrix import packed
from nnj.recording.placement import whole_of, whole_state
from nnj.recording.tensor_parallel import is_distributed

Table = dict[str, dict[str, Any]]  # by quantity and place


def has_parts(table: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a DTensor is in a table."""
    return any(is_distributed(t) for kept in table.values() for t in tree_leaves(packed(kept)))


def of_all_ranks(table: Table, ranks: Ranks, local: Callable[[str], bool]) -> Table:
    """A table over the ranks of a sharded model: a collective.

    Args:
        local: whether each rank keeps what it has of a quantity.
    """
    mine = {
        f"{name}\n{place}": packed(value)
        for name, kept in table.items()
        if not local(name)
        for place, value in kept.items()
    }
    ranks.meet()
    every = ranks.notes(list(mine))
    found, alone = dict[str, Any](), dict[str, Any]()
    for key in dict.fromkeys(key for keys in every for key in keys):
        if all(key in keys for keys in every):
            found[key] = tree_map_only(Tensor, whole_of, mine[key])
        elif key in mine:
            alone[key] = mine[key]
    forms = ranks.notes({key: form_of(tree) for key, tree in alone.items()})
    devices = [t.device for t in tree_leaves(mine) if isinstance(t, Tensor)]
    device = devices[0] if devices else torch.device("cpu")
    found |= ranks.merged(alone, forms, lambda key, trees: trees[0], device)
    whole: Table = {name: dict(kept) if local(name) else {} for name, kept in table.items()}
    for key, value in found.items():
        name, _, place = key.partition("\n")
        whole[name][place] = unpacked(value)
    return whole


def of_mesh(
    table: Table, quantities: Mapping[str, Quantity], parameters: Mapping[str, Any]
) -> Table:
    """Results, or states, under tensor parallelism, all of them: a collective.

    Args:
        parameters: of the model, of which states at parameters that are distributed are parts.
    """

    def whole(name: str, place: str, value: Any) -> Any:
        p, quantity = parameters.get(place), quantities[name]
        if quantity.place is Tensor and is_distributed(p):
            return whole_state(name, quantity.entrywise, p, value)
        return unpacked(tree_map_only(Tensor, whole_of, packed(value)))

    return {
        name: {place: whole(name, place, value) for place, value in kept.items()}
        for name, kept in table.items()
    }
