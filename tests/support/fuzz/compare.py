"""What came of a question: equal, refused, or wrong; and when numbers are equal."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nnj
from tests.support.fuzz.case import Case

EQUAL, REFUSED, FAILURE = "equal", "refused", "FAILURE"


@dataclass(frozen=True)
class Outcome:
    """What came of one question: `words` say why it was refused, or what is wrong."""

    kind: str
    words: str = ""


class Wrong(Exception):
    """What nnj gave is not what is true."""


def asked(question: Callable[[], bool | None]) -> Outcome | None:
    """Ask; None where there is nothing to compare."""
    try:
        answered = question()
    except nnj.NNJError as error:
        # what nnj did not foresee is no refusal, whatever it is wrapped into
        unforeseen = re.search(r"failed with \w+", str(error))
        return Outcome(FAILURE if unforeseen else REFUSED, str(error))
    except Exception as error:
        return Outcome(FAILURE, words_of(error))
    return None if answered is False else Outcome(EQUAL)


def words_of(error: Exception) -> str:
    if isinstance(error, Wrong):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error) or "no words").splitlines()[0]
    return f"{type(error).__name__}: {first} ({place.filename.split('/')[-1]}:{place.lineno})"


def compare(case: Case, what: str, found: Any, expected: Tensor, scale: float = 0.0) -> None:
    """Errors: `Wrong` unless equal, as far as the dtype of the case tells.

    Args:
        scale: the largest entry of the same quantity elsewhere: what is small beside it is noise.
    """
    if not isinstance(found, Tensor):
        raise Wrong(f"{what} is {found!r}")
    if found.shape != expected.shape:
        raise Wrong(f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if found.dtype != case.dtype:
        raise Wrong(f"{what} is {found.dtype}, expected {case.dtype}")
    error, own = (found.double() - expected).abs(), largest(expected)
    if case.autocast:
        bad = error.square().sum().sqrt() > 0.2 * expected.square().sum().sqrt() + 1e-2 * scale
    elif case.dtype == torch.float32:
        bad = (error > 2e-3 * own + 1e-4 * max(scale, 0.1)).any()
    else:
        bad = (error > 1e-7 * expected.abs() + 1e-9 * max(own, scale, 1e-3)).any()
    if bool(bad):
        raise Wrong(f"{what} is off by {float(error.max()):.3g} of {own:.3g}")


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0
