"""Values that are refused: at once, or all by one question after a pass."""

from __future__ import annotations

import pytest
import torch

from nnj.checks import Refusals, all_finite, ask_now, at_once, refuse_unless
from nnj.errors import NNJError
from tests.support.questions import Questions

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def error(name: str) -> NNJError:
    """What is raised."""
    return NNJError(name)


def test_at_once_where_nobody_waits() -> None:
    refuse_unless(GOOD, lambda: error("one"))
    with pytest.raises(NNJError, match="two"):
        refuse_unless(BAD, lambda: error("two"))


def test_the_first_error_by_one_question() -> None:
    refusals, questions = Refusals(), Questions()
    with questions:
        with refusals.later():
            for name, fine in {"one": GOOD, "two": BAD, "three": BAD}.items():
                refuse_unless(fine, lambda name=name: error(name))
        assert not questions.asked
        found = refusals.first()
    assert str(found) == "two"
    assert refusals.first() is None  # all is forgotten
    with questions, refusals.later():
        refuse_unless(GOOD, lambda: error("one"))
        refuse_unless(GOOD, lambda: error("two"))
        questions.asked.clear()
        ask_now()
    assert len(questions.asked) == 1


def test_an_error_gives_way_to_what_was_noted_before() -> None:
    with pytest.raises(NNJError, match="noted") as raised:
        with Refusals().later():
            refuse_unless(BAD, lambda: error("noted"))
            raise ValueError("which came of it")
    assert isinstance(raised.value.__context__, ValueError)
    with pytest.raises(ValueError, match="of its own"), Refusals().later():
        refuse_unless(GOOD, lambda: error("noted"))
        raise ValueError("of its own")


def test_at_once_inside_of_one_who_waits() -> None:
    refusals = Refusals()
    with refusals.later():
        with at_once(), pytest.raises(NNJError, match="at once"):
            refuse_unless(BAD, lambda: error("at once"))
        refuse_unless(BAD, lambda: error("later"))
        with pytest.raises(NNJError, match="later"):
            ask_now()
    assert refusals.first() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whether_all_entries_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    fine = torch.tensor([0.0, -largest, largest, 1e-7], dtype=dtype)
    assert bool(all_finite(fine)) and bool(all_finite(fine[:0])) and bool(all_finite(fine[2]))
    for bad in (float("inf"), -float("inf"), float("nan")):
        for at in range(4):
            t = fine.clone()
            t[at] = bad
            assert not bool(all_finite(t))
    assert not bool(all_finite(torch.full((5,), float("inf"), dtype=dtype)))
