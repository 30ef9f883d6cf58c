"""The life of a case: eager, traced, compared, replayed; thrown away, traced anew, given up."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from nnj.compiling.cases import Cases
from nnj.compiling.program import Program
from nnj.errors import NNJError


class Sums(Program[Tensor]):
    """The sum of what a module gives, and how often Python was asked for it."""

    def __init__(self, module):
        self.modules, self.eagerly, self.runs = [module], 0, 0

    def eager(self, batch):
        self.eagerly += 1
        return self.modules[0](*batch).sum()

    def run(self, batch, inputs):
        self.runs += 1
        return [self.modules[0](*batch).sum()], None

    def take(self, results, layout, inputs):
        return results[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.temperature = nn.Parameter(torch.ones(2)), 1.0

    def forward(self, x):
        return (x * self.weight).exp() / self.temperature


X = torch.tensor([[1.0, -2.0], [3.0, 0.5]])


def quiet(cases, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cases(batch)


def started(module, calls=3, batch=(X,), **options):
    """Cases that replay from now on."""
    program = Sums(module)
    cases = Cases(program, "aot", **options)
    for _ in range(calls):
        quiet(cases, batch)
    return program, cases


def test_a_case_is_eager_traced_compared_and_replayed():
    program, cases = started(Net(), 0)
    for eagerly, runs, replays in ((1, 0, 0), (1, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 2)):
        assert torch.equal(cases((X,)).detach(), Net()(X).sum().detach())
        assert (program.eagerly, program.runs, cases.replays) == (eagerly, runs, replays)
    assert cases.reasons == []


def test_without_verify_the_third_is_a_replay():
    _, cases = started(Net(), 3, verify=False)
    assert cases.replays == 1


def test_other_numbers_and_other_parameters_are_the_same_case():
    net = Net()
    _, cases = started(net)
    net.load_state_dict({"weight": torch.tensor([0.5, 2.0])}, assign=True)
    y = X - 1
    assert torch.equal(cases((y,)).detach(), net(y).sum().detach())
    assert cases.replays == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "temperature", 0.1),
        lambda net: net.eval(),
        lambda net: net.double(),
        lambda net: net.weight.requires_grad_(False),
    ],
)
def test_another_module_is_another_case(change):
    net = Net()
    _, cases = started(net)
    change(net)
    for _ in range(5):
        assert torch.allclose(cases((X,)).detach(), net(X).sum().detach())
    assert cases.replays == 2


@pytest.mark.parametrize("batch", [(X[:1],), (X.double(),), (X.T.contiguous().T,)])
def test_another_batch_is_another_case(batch):
    net = Net()
    program, cases = started(net)
    cases(batch)
    assert (program.eagerly, cases.replays) == (2, 0)
    cases((X,))
    assert cases.replays == 1


def test_a_plain_value_in_the_batch():
    class Times(nn.Module):
        def forward(self, x, by):
            return x * by

    _, cases = started(Times(), 4, (X, 2))
    assert cases.replays == 1
    assert float(cases((X, 3))) == float((3 * X).sum())
    assert float(cases((X, 2))) == float((2 * X).sum())
    assert cases.replays == 2


def test_beyond_the_limit_it_is_eager():
    program, cases = started(Net(), limit=1)
    with pytest.warns(UserWarning, match="more than limit=1 cases.*another by the batch"):
        cases((X[:1],))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases((X[:1],))
    assert len(cases.reasons) == 1 and program.eagerly == 3


def test_the_attribute_that_makes_too_many_cases_is_named():
    net = Net()
    _, cases = started(net, limit=1)
    net.temperature = 2.0
    with pytest.warns(UserWarning, match=r"another by Net\.temperature"):
        cases((X,))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if bool(x.sum() > 0) else -x


def test_another_answer_is_traced_anew_and_at_last_given_up():
    program, cases = started(Branch(), 4, limit=2)
    assert cases.replays == 1
    for y in (-X, X) * 6:
        for _ in range(4):
            assert torch.equal(quiet(cases, (y,)), Branch()(y).sum())
    assert "answered otherwise" in cases.reasons[0]
    before = program.eagerly
    quiet(cases, (X,))
    assert program.eagerly == before + 1


class Strict(nn.Module):
    def forward(self, x):
        if not bool(torch.isfinite(x).all()):
            raise NNJError("not finite")
        return x * 2


def test_a_check_raises_what_it_would_and_the_graph_stays():
    program, cases = started(Strict())
    with pytest.raises(NNJError, match="not finite"):
        cases((X / 0,))
    assert torch.equal(cases((X,)), (2 * X).sum())
    assert (program.runs, cases.replays) == (2, 1)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Writes(nn.BatchNorm1d):
    pass


class Tells(nn.Module):
    def forward(self, x):
        return x * x.max().item()


class Hooked(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.register_forward_hook(lambda m, x, y: y + 1)


@pytest.mark.parametrize(
    "make, said",
    [
        (Counts, r"changes Counts\.calls"),
        (lambda: Writes(2), r"writes into Writes\."),
        (Tells, r"test_cases, line \d+ \(forward\), asks a tensor for a number"),
        (Hooked, "has a hook"),
    ],
)
def test_what_cannot_be_replayed_is_eager_and_says_why(make, said):
    module = make()
    program = Sums(module)
    cases = Cases(program, "aot")
    with pytest.warns(UserWarning, match=said):
        for _ in range(6):
            cases((X,))
    assert cases.replays == 0 and len(cases.reasons) == 1
    if isinstance(module, Counts):
        assert module.calls == program.eagerly == 6


def test_what_the_first_pass_fills_is_no_change_afterwards():
    class Lazy(nn.Module):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.full((2,), 2.0)
            return x * self.mask

    _, cases = started(Lazy(), 5)
    assert cases.replays == 1 and not cases.reasons


def test_a_graph_that_is_not_the_pass_is_not_replayed():
    """A number that Python draws is baked in, which nobody sees but the comparison."""
    import random

    class Draws(nn.Module):
        def forward(self, x):
            return x * random.random()

    _, cases = started(Draws(), 5)
    assert cases.replays == 0 and "not what the eager pass gives" in cases.reasons[0]


def test_inputs_that_require_grad_are_eager():
    _, cases = started(Net(), 4, (X.clone().requires_grad_(),))
    assert cases.replays == 0 and "requires grad" in cases.reasons[0]


def test_dropout_draws_anew_as_the_eager_pass_does():
    net = nn.Dropout(0.5)
    _, cases = started(net, 2)
    torch.manual_seed(0)
    found = [float(cases((X,))) for _ in range(4)]
    torch.manual_seed(0)
    assert found == [float(net(X).sum()) for _ in range(4)]
    assert cases.replays == 3 and len(set(found)) > 1


def test_numbers_that_are_drawn_twice_from_a_generator_that_is_set_back():
    """As a checkpoint does, which computes a part again."""

    class Twice(nn.Module):
        def forward(self, x):
            state = torch.get_rng_state()
            first = nn.functional.dropout(x, 0.5)
            torch.set_rng_state(state)
            return first + nn.functional.dropout(x, 0.5)

    _, cases = started(Twice(), 5, verify=False)
    assert cases.replays == 0 and "sets a random generator back" in cases.reasons[0]


def test_another_model_in_a_closure():
    other = nn.Linear(2, 2)

    class Reads(nn.Module):
        def forward(self, x):
            return other(x)

    _, cases = started(Reads(), 5)
    assert cases.replays == 0 and "closure or a global" in cases.reasons[0]


def test_autocast_is_another_case_and_its_casts_are_in_the_graph():
    net = nn.Linear(2, 2)
    _, cases = started(net, 3)
    with torch.autocast("cpu"):
        for _ in range(5):
            found = cases((X,))
            assert torch.equal(found.detach(), net(X).sum().detach())
    assert cases.replays == 2 and found.dtype == torch.bfloat16


def test_generators_of_users():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x + torch.rand(2, generator=self.generator)

    net = Noise()
    _, cases = started(net, 0)
    found = [float(cases((X,))) for _ in range(6)]
    other = Noise()
    assert found == [float(other(X).sum()) for _ in range(6)]
    assert cases.replays == 3


@pytest.mark.parametrize("backend", ["gcc", None])
def test_unknown_backends(backend):
    with pytest.raises(NNJError, match="known are 'inductor'"):
        Cases(Sums(Net()), backend)


@pytest.mark.parametrize("limit", [-1, True, 1.5])
def test_a_limit_that_is_no_number(limit):
    with pytest.raises(NNJError, match="limit="):
        Cases(Sums(Net()), "aot", limit=limit)
