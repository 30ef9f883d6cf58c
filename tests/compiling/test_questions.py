"""What is asked of a tensor while tracing is asked again in each replay."""

from __future__ import annotations

import pytest
import torch

from nnj.checks import enough, number
from nnj.compiling.program import Untraceable
from nnj.compiling.trace import trace
from nnj.generators import OwnGenerator

X = torch.tensor([1.0, -2.0, 3.0])


def traced(function, *inputs):
    """A function of its inputs, traced."""
    return trace(lambda: [function(*inputs)], inputs)


def changed(found, *inputs):
    """Whether a replay says that something is answered otherwise."""
    return bool(found.graph(*inputs)[-1])


ASKED = {
    "bool": (lambda x: x + 1 if bool(x.sum() > 0) else x - 1, -X),
    "if": (lambda x: x + 1 if (x > 9).any() else x, X + 9),
    "int": (lambda x: x[: int((x > 0).sum())] * 2, -X),
    "item": (lambda x: x * (x > 0).sum().item(), -X),
    "equal": (lambda x: x if torch.equal(x, x.abs()) else -x, X.abs()),
    "allclose": (lambda x: x if torch.allclose(x, x.abs()) else -x, X.abs()),
    "nonzero": (lambda x: x[(x > 0).nonzero()[:, 0]] * 2, -X),
    "of an entry": (lambda x: x + 1 if bool(x[torch.tensor([0, 2])].sum() > 0) else x, -X),
    "of a mask": (lambda x: x + 1 if bool(x[x.abs() > 0].sum() > 0) else x, -X),
    "of a selection": (
        lambda x: x + 1 if bool(x.masked_select(torch.ones(3) > 0).sum() > 0) else x,
        -X,
    ),
    "mask": (lambda x: x[x > 0] * 2, -X),
    "masked_select": (lambda x: x.masked_select(x > 0) * 2, -X),
    "unique": (lambda x: x + len((x > 0).long().unique()), X.abs()),
    "tolist": (lambda x: x + sum((x > 0).long().tolist()), -X),
    "numpy": (lambda x: x + int((x > 0).numpy().sum()), -X),
    "repeat": (lambda x: x.repeat_interleave((x > 0).long() + 1), -X),
}


@pytest.mark.parametrize("name", ASKED)
def test_an_answer_is_a_guard(name):
    function, other = ASKED[name]
    found = traced(function, X)
    assert found.asks and torch.equal(found.results[0], function(X))
    for same in (X, X * 2):
        assert not changed(found, same)
        torch.testing.assert_close(found.graph(same)[0], function(same))
    assert changed(found, other)


def test_what_does_not_depend_on_the_inputs_is_no_question():
    found = traced(lambda x: x + int(torch.arange(4).sum()) + float(torch.ones(3).sum()), X)
    assert not found.asks
    assert torch.equal(found.graph(X)[0], X + 9)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * float(x.max()),
        lambda x: x * x.sum().item(),
        lambda x: x * sum(x.tolist()),
        lambda x: x * float(x.numpy()[0]),
        lambda x: x + len(x.unique()),
    ],
)
def test_a_real_number_is_refused_by_its_place(function):
    with pytest.raises(Untraceable, match=r"test_questions, line \d+"):
        traced(function, X)


def test_it_is_refused_also_where_somebody_catches_it():
    def function(x):
        try:
            return x * float(x.max())
        except Exception:
            return x

    with pytest.raises(Untraceable):
        traced(function, X)


def test_what_is_written_into_a_view_depends_on_the_inputs():
    def function(x):
        whole = torch.zeros(2, 3)
        whole[0].copy_(x)
        return x + 1 if bool(whole.sum() > 0) else x - 1

    found = traced(function, X)
    assert found.asks and changed(found, -X)


def test_a_number_in_a_sentence_is_no_question():
    found = traced(lambda x: x + (number(x.max()) > 5), X)
    assert not found.asks


def test_a_number_that_need_only_be_enough_serves_smaller_ones():
    x = torch.arange(-5.0, 20.0)
    found = traced(lambda x: x[: enough((x > 0).sum(), 25)] * 2, x)
    assert len(found.results[0]) == 21  # of 19, by steps of 3
    assert not changed(found, x - 10) and not changed(found, x + 2)
    assert changed(found, x + 3)
    assert enough((x > 0).sum(), 25) == 19


def test_hooks_on_tensors_are_refused():
    def function(x):
        y = x.clone().requires_grad_() * 2
        y.register_hook(lambda g: None)
        return y

    with pytest.raises(Untraceable, match="hook"):
        traced(function, X)


def test_draws_of_a_users_generator_are_inputs_and_of_our_own_constants():
    users = torch.Generator().manual_seed(0)

    def function(x):
        own = OwnGenerator.seeded(1)
        return x + torch.rand(3, generator=users) + torch.rand(3, generator=own)

    found = traced(function, X)
    (draw,) = found.draws
    again = torch.Generator().manual_seed(0)
    expected = [
        X + torch.rand(3, generator=again) + torch.rand(3, generator=OwnGenerator.seeded(1))
        for _ in range(3)
    ]
    assert torch.equal(found.results[0], expected[0])
    for one in expected[1:]:
        assert torch.equal(found.graph(X, draw.again())[0], one)


def test_torchs_own_generator_draws_anew():
    found = traced(lambda x: torch.nn.functional.dropout(x, 0.5), X)
    assert found.random
    torch.manual_seed(0)
    first, second = found.graph(X)[0], found.graph(X)[0]
    torch.manual_seed(0)
    assert torch.equal(first, torch.nn.functional.dropout(X, 0.5))
    assert torch.equal(second, torch.nn.functional.dropout(X, 0.5))
