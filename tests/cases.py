"""One table of models, losses and ways to call them: (user code, data, loss). Everything is tiny; tests are products over it."""
import tests.cases_samples
import tests.cases_sequence  # noqa: F401
from tests.case_table import CASES, EITHER, Case, Do, N, classes, do, linear, plain, r, vectors
from tests.cases_losses import WithLoss
from tests.cases_models import MLP, Attention
from tests.cases_modules import tied_linears

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
