"""Backward passes of models that FSDP2 shards: the parameters are whole while columns walk, and
what a pass adds is shared out over the ranks when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nnj.collecting.accumulate import Accumulator, Contribution
from nnj.collecting.over_ranks import OverRanks
from nnj.collecting.quantity import Holder
from nnj.collecting.request import Request
from nnj.distributed.ranks import Ranks, same_ranks
from nnj.errors import NNJError
from nnj.graph.traverse import marks_behind
from nnj.recording.records import LossCall
from nnj.recording.sharded import Sharding, sharded_models


@dataclass
class OverShards:
    """How passes come together.

    Attributes:
        mean: as of `OverRanks`.
        spread: whether what modules have stays with one rank each.
    """

    mean: bool = True
    spread: bool = True


class ShardedPass:
    """What is known of the sharded models of one backward pass.

    Attributes:
        sharding: their units; None while no model is sharded.
    """

    def __init__(self) -> None:
        self.sharding: Sharding | None = None

    @contextmanager
    def whole(self, call: LossCall) -> Iterator[None]:
        """The models behind a loss whole."""
        models = sharded_models(mark.module for mark in marks_behind(call.edges))
        if not models:
            yield
            return
        sharding = Sharding(models)
        if self.sharding is not None and self.sharding.models != models:
            sharding = Sharding([*self.sharding.models, *models])
        self.sharding = sharding
        with sharding.whole():
            sharding.check_covered()
            yield

    def share_out(
        self,
        accumulator: Accumulator,
        request: Request,
        contributions: list[Contribution],
        error: Exception | None,
        how: OverShards,
    ) -> None:
        """Add a pass of all ranks to an accumulator.

        Errors: `NNJError`, on all ranks, for what any has refused.
        """
        sharding = self.sharding
        assert sharding is not None
        part = Accumulator(request.quantities)
        if error is None:
            try:
                _check_group(request, sharding)
                part.add_pass([_at_sharded(c, sharding) for c in contributions])
                for contribution in contributions:  # what is shared out is not held twice
                    contribution.states = {}
            except NNJError as refused:
                error = refused
        ranks = Ranks(sharding.group, "nnj.collect")
        over = OverRanks(part, request, ranks, how.mean, sharding, how.spread)
        over.add_up(sharding.models, (), error)
        accumulator.absorb(part)
        accumulator.group = sharding.group


def _check_group(request: Request, sharding: Sharding) -> None:
    """Errors: `NNJError` for another group than that over which the model is sharded."""
    group = request.group
    if group is False or (group is not None and not same_ranks(group, sharding.group)):
        raise NNJError(
            "the model is sharded by fully_shard, over whose ranks results are added up and "
            "sharded, and group= says another thing. Leave it out"
        )


def _at_sharded(contribution: Contribution, sharding: Sharding) -> Contribution:
    """A contribution at the sharded parameters."""
    sharded: dict[Any, Holder] = {**sharding.sharded}
    for name, states in contribution.states.items():
        contribution.states[name] = {
            sharded.get(holder, holder): state for holder, state in states.items()
        }
    holders = contribution.holders
    contribution.holders = {sharded.get(h, h): None for h in holders}
    return contribution
