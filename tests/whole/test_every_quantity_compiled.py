"""Every quantity, replayed from a graph, is what the eager pass gives, also on the context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import net
from tests.support.every_quantity import ALL, AT_PARAMETERS, ON_THE_CONTEXT, plain_numbers
from tests.support.oracle import close

NAMES = (*ALL, "input_moment", "ggn_diag")


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, groups=1), nn.Flatten(1)
    ).double()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


MODELS = {
    "mlp": (net, lambda n: torch.randn(n, 4).double(), 3),
    "images": (images, lambda n: torch.randn(n, 1, 4, 4).double(), 12),
    "tokens": (Tokens, lambda n: torch.arange(6 * n).reshape(n, 6) % 5, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_replayed_as_eager(name):
    make, data, c = MODELS[name]
    model, loss = make(), nn.CrossEntropyLoss()
    step = nnj.compile(model, loss, *NAMES, backend="aot")
    for _ in range(5):
        x, y = data(6), torch.randint(c, (6,))
        with nnj.collect(*NAMES) as eager:
            loss(model(x), y).backward()
        places = [*model.parameters(), *model.modules()]
        expected = [
            (p, q, getattr(p, q, None)) for p in places for q in (*AT_PARAMETERS, "input_moment")
        ]
        with nnj.collect(*NAMES) as context:
            step(x, y)
        for place, quantity, value in expected:
            found = getattr(place, quantity, None)
            assert found is value is None or close(found, value) == "", quantity
        for key in ON_THE_CONTEXT:
            found, value = getattr(context, key), getattr(eager, key)
            assert close(plain_numbers(found), plain_numbers(value)) == "", key
    assert step.replays >= 2 and step.reasons == []


def test_a_fit_of_replayed_batches_is_one_of_eager_ones():
    loader = [(torch.randn(3, 4).double(), torch.randint(3, (3,))) for _ in range(6)]
    names = [name for name in NAMES if name != "batch_grad_dot"]
    found, expected = (
        nnj.fit(net(), nn.CrossEntropyLoss(), loader, *names, scale="mean", compile=compile)
        for compile in ("aot", False)
    )
    for quantity, values in expected.values_of.items():
        for name, value in values.items():
            assert close(found[quantity][name], value) == "", f"{quantity} of {name}"
    for key, value in expected.context.items():
        assert close(plain_numbers(found.context[key]), plain_numbers(value)) == "", key
