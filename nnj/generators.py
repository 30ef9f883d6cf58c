"""Random generators of nnj's own, with a seed that never changes: what they draw is the same in
every pass, so that a graph that was traced may hold it.
"""

from __future__ import annotations

import torch
from typing_extensions import Self

SEED = 0x6E6E6A


class OwnGenerator(torch.Generator):
    """A generator on the CPU that nobody outside of nnj sees; `nnj.compiling` tells it from those
    of users, which draw anew in each pass.
    """

    @classmethod
    def seeded(cls, seed: int = SEED) -> Self:
        """A new one at the beginning of its numbers."""
        found = cls("cpu")
        found.manual_seed(seed)
        return found
