"""sum u u^T of the inputs of a weight, against u by torch.func: the Jacobian of a place in what
makes one output channel.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import nnj
from tests.support.collecting import X, Y, base, pair
from tests.support.fitting import CLASSES, batches, mlp
from tests.support.fitting import X as DATA
from tests.support.oracle import close

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear-on-tokens": (lambda: nn.Linear(4, 3), (5, 2, 4)),
    "conv1d-dilated": (lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=1), (5, 2, 6)),
    "conv2d-strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 2, 5, 5)),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (5, 2, 4, 4)),
    "conv2d-circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (5, 2, 4, 4),
    ),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (4, 1, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), (5, 2, 3, 3)),
    "transposed-grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), (5, 4, 3)),
}


def by_jacobian(layer: nn.Module, x: Tensor, groups: int) -> Tensor:
    """(G, I, I): u of each place is the derivative of the first channel of its group in that
    channel's entries of the weight.
    """
    rest = {name: p.detach() for name, p in layer.named_parameters() if name != "weight"}
    w = layer.weight.detach()
    j = jacrev(lambda w: functional_call(layer, {"weight": w, **rest}, (x,)))(w)
    axis = 1 if x.dim() > 2 and not isinstance(layer, nn.Linear) else x.dim() - 1
    channels = j.shape[axis] // groups
    found = []
    for g in range(groups):
        of_channel = j.select(axis, g * channels)  # (N, *places, *weight)
        places = of_channel.reshape(-1, *w.shape)
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out / G, *kernel)
            size = w.shape[0] // groups
            u = places[:, g * size : (g + 1) * size, 0]
        else:
            u = places[:, g * channels]
        flat = u.flatten(1)
        found.append(flat.mT @ flat)
    return torch.stack(found)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("frozen_bias", [False, True])
def test_of_layers(name, frozen_bias):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape).double()
    if layer.bias is not None:
        layer.bias.requires_grad_(not frozen_bias)
    expected = by_jacobian(layer, x, getattr(layer, "groups", 1))
    nnj.extend(layer)
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect("input_moment", "ggn_diag"):
        out = layer(x)
        loss(out, torch.zeros_like(out)).backward()
    assert close(layer.input_moment, expected) == ""


def test_of_several_passes_and_the_scale_of_the_loss_does_not_count():
    model, loss = pair()
    with nnj.collect("input_moment"):
        loss(model(X[:2]), Y[:2]).backward()
        (5 * loss(model(X[2:]), Y[2:])).backward()
    assert close(model.one.input_moment, (X.mT @ X)[None]) == ""


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_of_a_fit(scale, tmp_path):
    loader = batches(DATA, CLASSES, 3)  # the last one is of one sample
    fits = [
        nnj.fit(mlp(), nn.CrossEntropyLoss(), loader, "input_moment", scale=scale)
        for loader in (loader, loader[:1], loader[1:])
    ]
    fits[1].save(tmp_path / "fit")
    merged = nnj.Fit.merge([nnj.Fit.load(tmp_path / "fit"), fits[2]])
    for fit in (fits[0], merged):
        assert list(fit["input_moment"]) == ["0", "3"]
        assert close(fit["input_moment"]["0"], (DATA.mT @ DATA)[None]) == ""


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, q, k, v):
        return self.head(self.attention(q, k, v, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("inputs", [[0, 0, 0], [0, 1, 1], [0, 1, 2]])
def test_attention_has_a_group_for_each_projection(inputs):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, 4).double()
    model, loss = nnj.extend(Attends().double()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("input_moment", "ggn_diag"):
        loss(model(*(x[i] for i in inputs)), Y).backward()
    flat = [t.flatten(0, 1) for t in x]
    each = torch.stack([flat[i].mT @ flat[i] for i in inputs])
    assert close(model.attention.input_moment, each) == ""


def test_attention_with_weights_of_its_own_for_each_has_none():
    model, loss = nnj.extend(Attends(kdim=3, vdim=2).double()), nnj.extend(nn.CrossEntropyLoss())
    x = [torch.randn(6, 5, size).double() for size in (4, 3, 2)]
    with nnj.collect("input_moment"):
        loss(model(*x), Y).backward()
    assert model.attention.input_moment is None and model.head.input_moment is not None


class Reads(nn.Module):
    def __init__(self, rows: int, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 4, **options), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


def test_an_embedding_counts_how_often_rows_are_read():
    torch.manual_seed(0)
    x = torch.randint(5, (6, 4))
    model, loss = nnj.extend(Reads(5).double()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("input_moment"):
        loss(model(x), Y).backward()
    assert (
        close(model.table.input_moment, x.flatten().bincount(minlength=5).double().diag()[None])
        == ""
    )
    message = (
        r"^the input_moment of a table of 5 rows is diagonal, and would be 5 x 5, which is 0\.0 "
        r"GiB, and beyond block_limit=4\. Restrict collect with modules=\[\.\.\.\], or raise "
        r"block_limit$"
    )
    with pytest.raises(nnj.NNJError, match=message), nnj.collect("input_moment", block_limit=4):
        loss(model(x), Y).backward()


def test_modules_that_have_none():
    """Norms, recurrent cells, and weights that are frozen."""
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.cell = nn.LayerNorm(4), nn.RNNCell(4, 3)
            self.head, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3)
            self.frozen.weight.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.head(self.cell(self.norm(x))))

    model, loss = nnj.extend(Odd().double()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("input_moment"):
        loss(model(X), Y).backward()
        loss(model(X), Y).backward()
    for m in (model.norm, model.cell, model.frozen):
        assert m.input_moment is None
    assert model.head.input_moment.shape == (1, 3, 3)


def test_a_tied_weight_has_the_places_of_all_its_uses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    inside = model[:2](X).detach()
    nnj.extend(model)
    with nnj.collect("input_moment"):
        nnj.extend(nn.CrossEntropyLoss())(model(X), Y).backward()
    both = (X.mT @ X + inside.mT @ inside)[None]
    assert close(model[0].input_moment, both) == "" and close(model[2].input_moment, both) == ""


def test_two_losses_of_the_same_calls_see_the_same_inputs():
    model, loss = pair()
    other = nnj.extend(nn.MSELoss())
    with nnj.collect("input_moment"):
        out = model(X)
        (loss(out, Y) + other(out, torch.zeros_like(out))).backward()
    assert close(model.one.input_moment, (X.mT @ X)[None]) == ""


def test_two_losses_of_other_calls_are_refused():
    """Those of inputs that both see would count twice."""
    model, loss = pair(base())
    first, second = model(X[:2]), model(X[2:])
    with pytest.raises(nnj.NNJError, match="^input_moment: one loss is given the outputs of more"):
        with nnj.collect("input_moment"):
            (loss(first, Y[:2]) + loss(torch.cat([first, second]), Y)).backward()


def test_the_limit_is_a_number():
    with pytest.raises(nnj.NNJError, match="block_limit='a': the most rows are a number"):
        nnj.collect("input_moment", block_limit="a")
