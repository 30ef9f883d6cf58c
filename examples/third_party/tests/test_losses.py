import torch
from nnj_siren import LogCosh

from nnj.testing import check_loss


def test_log_cosh():
    check_loss(LogCosh(), torch.randn(4, 3), torch.randn(4, 3))
    check_loss(LogCosh(), 20 * torch.randn(4, 2, 3), torch.randn(4, 2, 3))
    # declined, and differentiated twice
    check_loss(LogCosh(), torch.randn(4, 1), torch.randn(4, 3))
