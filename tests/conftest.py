"""One thread a worker: the models are tiny."""

import pytest
import torch

from tests.support.distributions import fakes  # noqa: F401

torch.set_num_threads(1)


@pytest.fixture
def seeded():
    """A fixed seed."""
    torch.manual_seed(0)
