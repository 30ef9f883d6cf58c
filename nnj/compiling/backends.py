"""What runs a graph: torch's operators one by one, a compiler, or a recording of a GPU's work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from nnj.errors import NNJError

Run = Callable[..., Sequence[Tensor]]
BACKENDS = ("inductor", "aot", "cudagraphs")


def check_backend(name: str) -> None:
    """Errors: `NNJError` for one that is not known, or that cannot be here."""
    if name not in BACKENDS:
        raise NNJError(f"backend={name!r}: known are {', '.join(map(repr, BACKENDS))}")
    if name == "cudagraphs" and not torch.cuda.is_available():
        raise NNJError(
            "backend='cudagraphs' replays the work of a GPU, and torch sees none. Use 'inductor' "
            "or 'aot'"
        )


def compiled(graph: GraphModule, inputs: Sequence[Tensor], kept: int, backend: str) -> Run:
    """A function of the inputs of a graph that gives what it gives; to be called without autograd.

    Args:
        inputs: those of the run that was traced, random numbers included.
        kept: how many of them, in front, are tensors of modules, which seldom are others.

    Errors: `NNJError` for CUDA graphs of what is not on a GPU.
    """
    if backend == "inductor":
        return _inductor(graph, inputs)
    if backend == "cudagraphs":
        return _Recorded(graph, inputs, kept)
    run: Run = graph.forward
    return run


def _inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Run:
    """Compiled; without a compiler, or where it fails, by torch's operators, after a warning."""
    try:
        from torch._inductor.compile_fx import compile_fx

        found: Any = compile_fx(graph, list(inputs))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"nnj.compile: inductor cannot compile the pass ({type(error).__name__}: {said[0]}), "
            "so its operators are replayed one by one. On a CPU inductor needs a C++ compiler "
            "such as gcc; backend='aot' needs none, and does not warn",
            stacklevel=2,
        )
        found = graph.forward
    run: Run = found
    return run


class _Recorded:
    """A CUDA graph: the work of one run, recorded, and done again on the same memory.

    Tensors of modules are read where they are, and the work is recorded anew when one has moved;
    all other inputs are copied to where they were. Results are copies.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Tensor], kept: int):
        if not inputs or any(t.device.type != "cuda" for t in inputs):
            raise NNJError(
                "backend='cudagraphs' replays the work of a GPU, but a tensor of the model, the "
                "loss or the batch is on another device. Use 'inductor' or 'aot', or move all of "
                "them"
            )
        self.graph, self.kept, self.places = graph, kept, list[int]()
        self.inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        places = [t.data_ptr() for t in inputs[: self.kept]]
        if places != self.places:
            self._record(inputs)
            self.places = places
        for there, t in zip(self.inputs[self.kept :], inputs[self.kept :], strict=True):
            there.copy_(t)
        self.recording.replay()
        return [t.clone() for t in self.results]

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [t if i < self.kept else t.clone() for i, t in enumerate(inputs)]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries find their algorithms before the recording
            for _ in range(2):
                self.graph.forward(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self.results = list(self.graph.forward(*self.inputs))
