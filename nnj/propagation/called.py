"""How a model is called with what a user has, and which part of what it gives is the output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nnj.errors import NNJError


def call(model: nn.Module, inputs: Any) -> Any:
    """A model at a tensor, a tuple of arguments, or a dict of named ones.

    Errors: `NNJError` for arguments that its `forward` does not have.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    listed = inputs if isinstance(inputs, (tuple, list)) else () if named else (inputs,)
    try:
        return model(*listed, **named)
    except TypeError:
        check_arguments(model, listed, named)
        raise


def check_arguments(model: nn.Module, listed: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Errors: `NNJError` if a model's `forward` does not take these arguments."""
    try:
        inspect.signature(model.forward).bind(*listed, **named)
    except TypeError as error:
        what = f"the arguments {', '.join(named)}" if named else f"{len(listed)} arguments"
        raise NNJError(
            f"{type(model).__name__} does not take {what} ({error}). A batch is (x, ..., y), all "
            "but the last for the model, or a dict. Where it is another, with weights of samples "
            "say, write forward=lambda model, batch: output (and, of nnj.fit, target=lambda batch: "
            "target)"
        ) from error


def logits_of(output: Any) -> Any:
    """The `.logits` of an output that has several parts, such as those of transformers; else
    itself.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output
