"""One thread a worker: the models are tiny. What is imported is left out of garbage collection: a
verification looks at every object of the process.
"""

import gc

import pytest
import torch

from tests.support.distributions import fakes  # noqa: F401

torch.set_num_threads(1)


def pytest_addoption(parser):
    """Called when pytest starts."""
    parser.addoption("--whole-table", action="store_true", help="compile all models of the table")


def pytest_collection_finish():
    """Called when all test files are imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seeded():
    """A fixed seed."""
    torch.manual_seed(0)
