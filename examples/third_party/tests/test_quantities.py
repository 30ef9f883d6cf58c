import torch
from torch import nn

import nnj


def test_fisher_diag():
    torch.manual_seed(0)
    model = nnj.extend(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    )
    x, y = torch.randn(6, 2, 5).double(), torch.randint(3, (6,))
    with nnj.collect("fisher_diag", "batch_grad"):
        nnj.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    for p in model.parameters():
        torch.testing.assert_close(p.fisher_diag, p.batch_grad.square().sum(0))
