"""Random models, losses and ways to call them against the oracle: 300 seeds, in groups; and that
bugs which were put in are found.

`python -m tests.support.fuzz --seeds 3000` runs more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import nnj
from nnj.collecting.fit_result import Fit
from nnj.collecting.loss_columns import LossColumns
from nnj.registry.manager import use
from nnj_plugins.layers.linear import linear, through
from nnj_plugins.quantities.batch_grad import BatchGrad
from tests.support.fuzz.__main__ import main
from tests.support.fuzz.case import draw
from tests.support.fuzz.check import check
from tests.support.fuzz.compare import FAILURE, REFUSED, Outcome
from tests.support.fuzz.report import Report, outcomes, quietly, report
from tests.support.fuzz.shrink import LINE, shrink
from tests.support.slow import few

SEEDS, GROUP = 300, 15
# A part of the seeds of a group may be refused, each for a reason that the report counts.
REFUSALS = 6


@pytest.mark.parametrize("start", few(range(0, SEEDS, GROUP)))
def test_seeds(start):
    found = report(range(start, start + GROUP))
    assert not found.failures, f"\n{found}"
    refused = {seed for seeds in found.refused.values() for seed in seeds}
    assert len(refused) <= REFUSALS, f"\n{found}"
    assert found.seeds == GROUP


# -- the fuzzer itself -----------------------------------------------------------------------------


@contextmanager
def rule_off_by_a_factor() -> Iterator[None]:
    """A linear layer whose bias counts twice, and nobody verifies."""

    def wrong(m: nn.Linear, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
        slots = linear(m, x, y)
        return slots | {"input": through(2 * m.weight.detach(), x, y)}

    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register):
            register(nn.Linear, wrong, uses="x", replace=True)

    manager = nnj.PluginManager()
    manager.register(Plugin(), "nnj-off-by-a-factor")
    former = use(manager)
    try:
        with mock.patch.dict("os.environ", NNJ_VERIFY="never"):
            yield
    finally:
        use(former)


@contextmanager
def samples_in_another_order() -> Iterator[None]:
    """Rows of batch_grad are those of other samples."""
    right = BatchGrad.parameter
    wrong = lambda self, factor, total: right(self, factor, total).flip(0)
    with mock.patch.object(BatchGrad, "parameter", wrong):
        yield


@contextmanager
def scale_dropped() -> Iterator[None]:
    """What the loss enters the scalar with does not count."""
    right = LossColumns.__init__

    def wrong(self, call, scale, *args, **kwargs):
        right(self, call, torch.ones_like(scale), *args, **kwargs)

    with mock.patch.object(LossColumns, "__init__", wrong):
        yield


@contextmanager
def transposed_metric() -> Iterator[None]:
    """jTmjp forgets that a metric need not be symmetric."""
    right = nnj.jTmjp

    def wrong(module, x, matrix, *args, **kwargs):
        matrix = matrix.mT if matrix.dim() == 3 else matrix
        return right(module, x, matrix, *args, **kwargs)

    with mock.patch.object(nnj, "jTmjp", wrong):
        yield


@contextmanager
def gradient_touched() -> Iterator[None]:
    """p.grad is off by one rounding error."""
    right = nnj.collect.__exit__

    def wrong(self, *args):
        for m in list(self.accumulator.modules):
            for p in m.parameters(recurse=False):
                if p.grad is not None:
                    p.grad.mul_(1 + torch.finfo(p.dtype).eps)
        right(self, *args)

    with mock.patch.object(nnj.collect, "__exit__", wrong):
        yield


@contextmanager
def fit_of_another_scale() -> Iterator[None]:
    """nnj.fit doubles what it has found."""
    right = Fit.__init__

    def wrong(self, values, **options):
        doubled = {name: {k: 2 * v for k, v in of.items()} for name, of in values.items()}
        right(self, doubled, **options)

    with mock.patch.object(Fit, "__init__", wrong):
        yield


@contextmanager
def dies() -> Iterator[None]:
    """Something of ours raises what is no NNJError."""
    with mock.patch.object(LossColumns, "__init__", side_effect=KeyError("key")):
        yield


BUGS: dict[Callable, str] = {
    rule_off_by_a_factor: "ggn_diag",
    samples_in_another_order: "batch_grad",
    scale_dropped: "ggn_diag_mc",
    transposed_metric: "jTmjp, weight",
    gradient_touched: "ggn_block",
    fit_of_another_scale: "fit",
    dies: "ggn_diag",
}


def caught(question: str) -> bool:
    """Whether one of the first seeds, which are right without a bug, is answered wrongly."""
    return any(
        (found := outcomes(seed).get(question)) is not None and found.kind == FAILURE
        for seed in range(GROUP)
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_is_found(bug):
    with quietly(), bug():
        assert caught(BUGS[bug])


def test_a_seed_is_always_the_same_case():
    assert str(draw(7)) == str(draw(7)) != str(draw(8))


def test_the_command_fails_where_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "0", "-v"])
    assert main() == 0
    said = capsys.readouterr().out
    assert "class Model(nn.Module)" in said and "ggn_diag" in said
    with dies():
        assert main() == 1
        monkeypatch.setattr("sys.argv", ["fuzz", "--seeds", "2"])
        assert main() == 1
    assert "KeyError" in capsys.readouterr().out


def test_refusals_are_counted_by_their_reason():
    found = Report()
    found.add(3, {"ggn_diag": refusal("layer 'a' has 3 rows. Do that")})
    found.add(5, {"ggn_diag": refusal("layer 'b' has 7 rows. Do that")})
    assert list(found.reasons.values()) == [2] and "[3, 5]" in str(found)


def refusal(words: str) -> Outcome:
    return Outcome(REFUSED, words)


def test_a_program_is_made_shorter_and_stays_wrong():
    with quietly(), dies():
        case = draw(0)
        shorter = shrink(case)
        assert {o.kind for o in check(shorter).values()} >= {FAILURE}
    code = lambda case: [line for _, line in LINE.findall(case.source)]
    assert sum(map(len, code(shorter))) < sum(map(len, code(case)))
