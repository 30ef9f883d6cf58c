"""Which rank keeps what belongs to a module of a sharded model: the same in all passes, also of
other models, and each about as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from nnj.collecting.quantity import Holder
from nnj.distributed.ranks import Ranks
from nnj.recording.scope import modules_of

# By the ranks of a group. All of them come to the same passes, so that all say the same.
_owners: dict[tuple[int, ...], WeakKeyDictionary[nn.Module, int]] = {}


def owner_of(holder: Holder, models: Sequence[nn.Module], ranks: Ranks) -> int:
    """The rank that has the result of a module, which is part of one of the models; of anything
    else the one that merges it.
    """
    if not isinstance(holder, nn.Module):
        return 0
    known = _owners.setdefault(
        tuple(dist.get_process_group_ranks(ranks.group)), WeakKeyDictionary()
    )
    if holder not in known:
        _assign(models, known, ranks.size)
    return known[holder]


def _assign(
    models: Sequence[nn.Module], known: WeakKeyDictionary[nn.Module, int], size: int
) -> None:
    """Give each module that has no owner yet to the rank with the fewest parameters so far, the
    largest first.
    """
    every = dict.fromkeys(m for model in models for m in modules_of(model))
    counts = {m: sum(p.numel() for p in m.parameters(recurse=False)) for m in every}
    taken = [0] * size
    for m in (m for m in every if m in known):
        taken[known[m]] += counts[m]
    for m in sorted((m for m in every if m not in known), key=lambda m: -counts[m]):
        known[m] = owner = min(range(size), key=taken.__getitem__)
        taken[owner] += counts[m]
