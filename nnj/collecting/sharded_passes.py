"""Backward passes of models that FSDP2 shards: units are whole while they are read, sums are shared
out over the ranks as they are done, and all else when the pass ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nnj.collecting.accumulate import Accumulator
from nnj.collecting.contribution import Contribution
from nnj.collecting.over_ranks import OverRanks
from nnj.collecting.quantity import Holder
from nnj.collecting.request import Request
from nnj.collecting.shares import OverShards, Shares
from nnj.distributed.ranks import Ranks, same_ranks
from nnj.distributed.rounds import Rounds
from nnj.errors import NNJError
from nnj.graph.traverse import all_marks_behind
from nnj.recording.placement import check_placed
from nnj.recording.records import LossCall
from nnj.recording.sharded import Sharding, sharded_models
from nnj.recording.units_on_read import UnitsOnRead


class ShardedPass:
    """What is known of the sharded models of one backward pass.

    Args:
        requests: those of the collections.

    Attributes:
        sharding: the units; None while no model is sharded.
        shares: what is shared out before the pass ends.
    """

    def __init__(self, requests: Mapping[Request, OverShards]) -> None:
        self._requests = requests
        self.sharding: Sharding | None = None
        self.shares: Shares | None = None

    @contextmanager
    def whole(self, call: LossCall) -> Iterator[None]:
        """The units of the models behind a loss whole while they are read."""
        models = sharded_models(mark.module for mark in all_marks_behind(call.edges))
        if not models:
            yield
            return
        if self.sharding is not None and self.sharding.models != models:
            models = list(dict.fromkeys([*self.sharding.models, *models]))
        sharding = self.sharding = Sharding(models)
        shares = self.shares = self.shares or Shares(self._requests)
        ranks = Ranks(sharding.group, "nnj.collect")
        with sharding.at_rest():
            units = UnitsOnRead(sharding, lambda unit: rounds.need(unit))
            rounds = Rounds(ranks, units.gather, shares.size, shares.share)
            shares.begin(call, sharding, ranks, rounds)
            try:
                for unit in sharding.never_whole():
                    rounds.need(unit)
                sharding.check_covered()
                with units:
                    yield
            except Exception:
                rounds.end()
                raise
            else:
                rounds.end()
            finally:
                units.close_all()

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
        sharding, shares = self.sharding, self.shares
        assert sharding is not None and shares is not None
        part, error = Accumulator(request.quantities), error or shares.error
        if error is None:
            try:
                _check_group(request, sharding)
                part.add_pass([_at_sharded(c, sharding, request) for c in contributions])
                for contribution in contributions:  # what is shared out is not held twice
                    contribution.states = {}
                _add(part, shares.waiting(request))
            except NNJError as refused:
                error = refused
        ranks = Ranks(sharding.group, "nnj.collect")
        over = OverRanks(part, request, ranks, how.mean, sharding, how.spread)
        over.add_up(sharding.models, (), error)
        _add(part, shares.shared(request))
        part.settle()
        accumulator.absorb(part)
        accumulator.group = sharding.group
        accumulator.parallel.update(sharding.parallel)


def _add(part: Accumulator, found: Mapping[str, Mapping[Holder, Any]]) -> None:
    for name, states in found.items():
        part.plus(name, states)


def _check_group(request: Request, sharding: Sharding) -> None:
    """Errors: `NNJError` for another group than that over which the model is sharded."""
    group = request.group
    if group is False or (group is not None and not same_ranks(group, sharding.group)):
        raise NNJError(
            "the model is sharded by fully_shard, over whose ranks results are added up and "
            "sharded, and group= says another thing. Leave it out"
        )


def _at_sharded(contribution: Contribution, sharding: Sharding, request: Request) -> Contribution:
    """A contribution at the sharded parameters.

    Errors: `NNJError` for what may be of a part of a parameter, or of all of it.
    """
    sharded: dict[Any, Holder] = {**sharding.sharded}
    for name, states in contribution.states.items():
        for holder, state in states.items():
            check_placed(name, request.quantities[name].entrywise, holder, state)
        contribution.states[name] = {
            sharded.get(holder, holder): state for holder, state in states.items()
        }
    holders = contribution.holders
    contribution.holders = {sharded.get(h, h): None for h in holders}
    return contribution
