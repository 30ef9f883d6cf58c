import torch
from nnj_siren import FirstSine, Sine
from torch import nn

import nnj
from nnj.testing import check_layer, check_model


def test_sine():
    check_layer(Sine(3, frequency=2.0), torch.randn(4, 3))
    check_layer(Sine(3, frequency=2.0), torch.randn(4, 5, 3))


def test_first_sine():
    check_layer(FirstSine(3, frequency=2.0), torch.randn(4, 3))
    check_layer(FirstSine(3, frequency=2.0), torch.randn(4, 5, 3))


def test_in_a_model():
    model = nn.Sequential(
        nn.Linear(2, 5),
        Sine(5, frequency=2.0),
        nn.Linear(5, 4),
        FirstSine(4, frequency=1.5),
        nn.Linear(4, 3),
    )
    report = check_model(
        model, nn.CrossEntropyLoss(), torch.randn(4, 2), torch.tensor([0, 2, 1, 0])
    )
    assert {(line.path, line.rule) for line in report.rules} >= {("1", "sine"), ("3", "first_sine")}


def test_both_agree():
    found = []
    for cls in (Sine, FirstSine):
        torch.manual_seed(0)
        model = nnj.extend(
            nn.Sequential(nn.Linear(2, 5), cls(5, frequency=2.0), nn.Linear(5, 3)).double()
        )
        with nnj.collect("ggn_diag"):
            nnj.extend(nn.MSELoss())(
                model(torch.randn(6, 2).double()), torch.zeros(6, 3).double()
            ).backward()
        found.append([p.ggn_diag for p in model.parameters()])
    torch.testing.assert_close(*found)
