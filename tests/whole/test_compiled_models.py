"""Models of the table, compiled: traced at other numbers, replayed at their own, against
torch.func. Those that run eagerly say why.

Tracing takes a second or more each: so these are every 16th model, and with `--whole-table` all of
them."""

from __future__ import annotations

import shutil

import pytest

from tests.support.cases import CASES
from tests.support.collecting import QUANTITIES
from tests.support.replaying import replayed

EAGER: dict[str, str] = {
    "mlp-input-requires-grad": "requires grad, and its gradient would be lost",
    "scripted-part": "is a scripted module",
    "autograd-function-numpy": "reads a tensor as numbers of Python",
    "checkpoint-dropout": "sets a random generator back",
}
ALL = (
    "linear",
    "mlp",
    "cnn-pooling",
    "transformer",
    "embedding-bag",
    "lora",
    "sequence-lstm-first",
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler on a CPU",
)


def pytest_generate_tests(metafunc):
    """The models that `test_replayed` is run for."""
    if metafunc.function is test_replayed:
        whole = metafunc.config.getoption("--whole-table")
        some = [n for i, n in enumerate(CASES) if whole or i % 16 == 0 or n in EAGER]
        metafunc.parametrize("name", some)


def test_replayed(name):
    faults, reasons = replayed(CASES[name], "ggn_diag", "batch_grad")
    assert faults == []
    if name in EAGER:
        assert EAGER[name] in reasons[0]
    else:
        assert reasons == []


@pytest.mark.parametrize("name", ALL)
def test_all_quantities(name):
    assert replayed(CASES[name], *QUANTITIES) == ([], [])


@needs_compiler
@pytest.mark.parametrize("name", ["mlp", pytest.param("cnn-pooling", marks=pytest.mark.slow)])
def test_inductor(name):
    assert replayed(CASES[name], "ggn_diag", "batch_grad", backend="inductor") == ([], [])
