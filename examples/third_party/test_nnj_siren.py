import torch
from nnj_siren import Sine

from nnj.testing import check_layer


def test_sine():
    check_layer(Sine(3, frequency=2.0), torch.randn(4, 3))
    check_layer(Sine(3, frequency=2.0), torch.randn(4, 5, 3))
