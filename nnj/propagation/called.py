"""How a model is called with what a user has, and which part of what it gives is the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, inputs: Any) -> Any:
    """A model at a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits_of(output: Any) -> Any:
    """The `.logits` of an output that has several parts, such as those of transformers; else
    itself.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output
