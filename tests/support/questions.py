"""What is asked of tensors: each answer has to wait for all that a device has still to do."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

BY_NUMBERS = ("index", "index_put", "index_put_")  # which count a mask
READ = ("tolist", "numpy", "__array__", "cpu", "__format__", "__repr__")


class Questions(TorchDispatchMode):
    """Notes what is asked of tensors: `bool`, `int`, `item`, `nonzero`, `unique`, `equal`, masks as
    indices, and with `Reads` also `tolist` and the like.

    Attributes:
        asked: for each question its operator, and the last lines of nnj's code that led to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        asks = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        name = func.overloadpacket.__name__
        if name in BY_NUMBERS:  # tagged for the sake of masks alone
            asks = {t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)}
        if asks:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        """One more question."""
        lines = [
            f
            for f in traceback.extract_stack()
            if "nnj" in f.filename and "tests" not in f.filename
        ]
        self.asked.append(f"{name} at {[f'{f.name}:{f.lineno}' for f in lines[-3:]]}")


class Reads(TorchFunctionMode):
    """Notes tensors that become numbers of Python by no operator."""

    def __init__(self, questions: Questions):
        super().__init__()
        self.questions = questions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READ and args and isinstance(args[0], Tensor):
            self.questions.note(name)
        return func(*args, **(kwargs or {}))
