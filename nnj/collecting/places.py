"""What ranks call the parameters and modules of a model, and where these are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnj.collecting.quantity import WHOLE, Holder, Whole
from nnj.errors import NNJError
from nnj.recording.sharded import Sharding


class Places:
    """The parameters and modules of some models by names that are the same on all ranks.

    Args:
        sharding: of sharded models, whose parameters are the sharded ones.
    """

    def __init__(self, models: Sequence[nn.Module], sharding: Sharding | None = None):
        sharded = {} if sharding is None else sharding.sharded
        self.models = models
        self.holders: dict[str, Holder] = {"": WHOLE}
        for i, model in enumerate(models):
            self.holders |= {f"{i}.{path}": m for path, m in model.named_modules()}
            named = model.named_parameters()
            self.holders |= {f"{i}.{path}": sharded.get(p, p) for path, p in named}
        self._names = {holder: name for name, holder in self.holders.items()}

    def name(self, holder: Holder) -> str:
        """Errors: `NNJError` for what belongs to none of the models."""
        if holder not in self._names:
            raise NNJError(
                f"{type(holder).__name__} holds a result and is part of no model that took part, "
                "so that ranks cannot name it to one another. Extend the model that it is in"
            )
        return self._names[holder]


def device_of(holder: Holder) -> torch.device:
    """Of a parameter, or of the first of a module; the CPU if it has none."""
    if isinstance(holder, Tensor):
        return holder.device
    first = None if isinstance(holder, Whole) else next(holder.parameters(), None)
    return torch.device("cpu") if first is None else first.device
