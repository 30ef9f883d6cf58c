"""One table of models, losses and ways to call them, all tiny; tests are products over it."""

import tests.support.cases.samples
import tests.support.cases.sequence  # noqa: F401
from tests.support.cases.losses import WithLoss
from tests.support.cases.models import MLP, Attention
from tests.support.cases.modules import tied_linears
from tests.support.cases.table import (
    CASES,
    EITHER,
    Case,
    Do,
    N,
    classes,
    do,
    linear,
    plain,
    r,
    vectors,
)

__all__ = [
    "CASES",
    "EITHER",
    "MLP",
    "Attention",
    "Case",
    "Do",
    "N",
    "WithLoss",
    "classes",
    "do",
    "linear",
    "plain",
    "r",
    "tied_linears",
    "vectors",
]
