"""A node of DistributedDataParallel without a process group: what it would queue is counted."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel.distributed import _DDPSink


class Owned(nn.Module):
    """A model whose outputs go through the node.

    Attributes:
        runs: how often the node was run.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.runs = module, 0
        # what the node asks for
        self.static_graph, self._ddp_sink_clone = True, False
        self._static_graph_delay_allreduce_enqueued = False

    @property
    def reducer(self) -> Owned:
        self._static_graph_delay_allreduce_enqueued = False  # each run counts
        return self

    def _delay_all_reduce(self) -> None:
        self.runs += 1

    def forward(self, *args: Tensor) -> Any:
        out = self.module(*args)
        through = _DDPSink.apply(weakref.ref(self), *(out if isinstance(out, tuple) else (out,)))
        return through if isinstance(out, tuple) else through[0]
