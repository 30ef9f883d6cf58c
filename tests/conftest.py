"""One thread a worker: the models are tiny."""
import torch

from tests.fakes import fakes  # noqa: F401

torch.set_num_threads(1)
