"""nnj.testing.check_model: what it says of a user's model, and how it fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.registry.manager import manager, use
from nnj.testing import check_model
from tests.support.collecting import X, Y, net
from tests.support.distributions import Plugin

N = 4


class Residual(nn.Module):
    """Glue, a bare parameter, a layer called twice, and a layer that no plugin knows."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.gate = (
            nn.Linear(5, 5),
            nn.Parameter(torch.ones(5)),
            nn.ReLU(inplace=True),
        )

    def forward(self, x, factor=1.0):
        return x + self.scale * self.gate(self.inner(self.inner(x))) * factor


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, ids, mask):
        return self.head((self.embed(ids) * mask[..., None]).sum(1))


class Mixing(nn.Module):
    def forward(self, x):
        return x - 1e-3 * x.mean(0)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return x * self.weight


def targets():
    return torch.randint(3, (N,))


def test_a_report():
    report = check_model(
        nn.Sequential(nn.Linear(6, 5), Residual(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(N, 6),
        targets(),
    )
    assert report.samples == N and report.left_out == []
    assert (
        set(report.errors) == {"ggn_diag", "ggn_block", "batch_grad", "ggn_diag_mc"}
        and max(report.errors.values()) < 1e-10
    )
    rules = {line.path: (line.kind, line.rule) for line in report.rules}
    assert (
        rules["0"] == ("Linear", "linear")
        and rules["1.gate"][0] == "ReLU"
        and rules["1"] == ("Residual", "autograd")
    )
    shown = str(report)
    assert (
        "4 samples, independent of one another" in shown
        and "bare parameters: scale" in shown
        and "batch_grad" in shown
    )


def test_named_inputs_several_arguments_and_the_batch_in_axis_one():
    mask = torch.rand(N, 3)
    check_model(
        Named(), nn.CrossEntropyLoss(), {"ids": torch.randint(7, (N, 3)), "mask": mask}, targets()
    )
    check_model(Named(), nn.CrossEntropyLoss(), (torch.randint(7, (N, 3)), mask), targets())
    report = check_model(
        nnj.extend(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), batch_axis=1),
        nn.MSELoss(),
        torch.randn(3, 2, 4),
        torch.randn(3, 2, 4),
    )
    assert report.samples == 2 and set(report.errors) | set(report.refused) >= {
        "ggn_diag",
        "batch_grad",
    }


def test_what_is_refused_stands_in_the_report():
    """Which rows are whose is lost when the input is rearranged before the first layer; sums are
    exact all the same.
    """

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x.flip(0).roll(1, 0).flatten(0, 1))

    report = check_model(
        nn.Sequential(Turned(5, 3)), nn.MSELoss(), torch.randn(2, 3, 5), torch.randn(6, 3)
    )
    assert (
        "nnj cannot tell which rows" in report.refused["batch_grad"] and "ggn_diag" in report.errors
    )
    assert "batch_grad   refused: batch_grad: nnj cannot tell" in str(report)


def test_blocks_that_are_too_large():
    report = check_model(
        nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3)),
        nn.CrossEntropyLoss(),
        torch.randn(2, 60),
        torch.tensor([0, 2]),
    )
    assert report.left_out == ["0"] and "ggn_block of '0' is too large" in str(report)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(6, 3), Mixing()),
    ],
    ids=["batch norm", "mean"],
)
def test_samples_that_influence_one_another(model):
    said = (
        r"samples influence one another(: .* off by [\d.e-]+\. Batch norm|, or the model does "
        r"not take one alone: Exp)"
    )
    with pytest.raises(AssertionError, match=said):
        check_model(model, nn.CrossEntropyLoss(), torch.randn(N, 6), targets())


def test_a_loss_that_couples_samples():
    with pytest.raises(
        AssertionError, match="the loss couples samples: its Hessian between them is up to"
    ):
        check_model(nn.Linear(6, 3), lambda z: z.sum(0).square().sum(), torch.randn(N, 6))


def test_random_numbers():
    with pytest.raises(
        AssertionError, match=r"draws random numbers, or keeps a state. Use model.eval\(\)"
    ):
        check_model(
            nn.Sequential(nn.Linear(6, 3), nn.Dropout()),
            nn.CrossEntropyLoss(),
            torch.randn(N, 6),
            targets(),
        )


def test_a_model_with_several_outputs_and_a_loss_without_reduction():
    with pytest.raises(TypeError, match="this one gives tuple. Wrap it in a module"):
        check_model(
            nn.LSTM(6, 3, batch_first=True),
            nn.MSELoss(),
            torch.randn(N, 2, 6),
            torch.randn(N, 2, 3),
        )
    with pytest.raises(TypeError, match="takes a loss that gives a scalar"):
        check_model(
            nn.Linear(6, 3), nn.CrossEntropyLoss(reduction="none"), torch.randn(N, 6), targets()
        )


@pytest.fixture
def doubled():
    """A plugin beside ours whose rule is wrong in one slot."""
    former, other = manager(), nnj.PluginManager()
    rule = lambda m, x, y: {
        "input": nnj.Diagonal(m.weight.expand_as(x)),
        "weight": nnj.ScaleShift(m.weight.shape, y.shape[1:], y, m=lambda: 2 * x),
    }
    other.register(Plugin(lambda register: register(Doubled, rule)), "nnj-doubled")
    use(other)
    yield
    use(former)


def test_a_wrong_rule_is_named(doubled):
    """The layer, the product, the slot and the size of the error."""
    model = nn.Sequential(nn.Linear(6, 5), Doubled(), nn.Linear(5, 3))
    with pytest.raises(AssertionError) as caught:
        check_model(model, nn.CrossEntropyLoss(), torch.randn(N, 6), targets())
    said = str(caught.value)
    assert (
        "ggn_diag of '1.weight' is wrong: off by " in said and "where the largest entry is" in said
    )
    assert (
        "layer '1': " in said and "'weight'" in said and "Doubled" in said and "nnj-doubled" in said
    )


def test_model_and_loss_are_as_they_were():
    model, loss = nn.Sequential(nn.Linear(6, 5), Residual(), nn.Linear(5, 3)), nn.CrossEntropyLoss()
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_model(model, loss, torch.randn(N, 6), targets())
    check_model(model, F.cross_entropy, torch.randn(N, 6), targets())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and not hasattr(p, "ggn_diag")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), loss])


class Attention(nn.Module):
    """The softmax does not see the bias of the keys: its gradient is zero, of which rounding leaves
    something.
    """

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, o) for o in (4, 4, 4, 3))
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        weights = torch.einsum("nid,njd->nij", self.q(x), self.k(x)).softmax(-1)
        return self.head((weights @ self.v(x) * torch.tanh(self.gate)).mean(1))


@pytest.mark.parametrize("seed", range(5))
def test_parameters_without_influence_and_without_axes(seed):
    torch.manual_seed(seed)
    model = Attention()
    report = check_model(model, nn.CrossEntropyLoss(), torch.randn(N, 6, 4), targets())
    assert (
        not report.refused
        and max(report.errors[name] for name in ("ggn_diag", "ggn_block")) < 1e-10
    )


@pytest.mark.parametrize("factor", [1e-3, 1e-5])
def test_a_wrong_rule_of_little_influence(doubled, factor):
    """What rounding leaves of a zero is let pass, and no more."""

    class Faint(Residual):
        def __init__(self):
            super().__init__()
            self.wrong = Doubled()

        def forward(self, x):
            return super().forward(x) + factor * self.wrong(x)

    model = nn.Sequential(nn.Linear(6, 5), Faint(), nn.Linear(5, 3))
    with pytest.raises(AssertionError, match=r"ggn_diag of '1\.wrong\.weight' is wrong"):
        check_model(model, nn.CrossEntropyLoss(), torch.randn(N, 6), targets())


def test_check_model_tells_right_from_wrong():
    model = net()
    check_model(model, nn.CrossEntropyLoss(), X, Y)
    check_model(nnj.extend(model), lambda f, y: F.cross_entropy(f, y, reduction="sum"), X, Y)
    assert not hasattr(model[0].weight, "ggn_diag")
    broken = net()
    own = nnj.PatchMatmul.factor
    try:
        nnj.PatchMatmul.factor = lambda self, u, owner: own(self, 2 * u, owner)
        with pytest.raises(AssertionError, match="ggn_diag of '0.weight' is wrong"):
            check_model(broken, nn.CrossEntropyLoss(), X, Y)
    finally:
        nnj.PatchMatmul.factor = own


class Single(nn.Module):
    """Logits in single precision, whatever the precision of the model."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 3)

    def forward(self, x):
        return self.one(x).float()


def test_logits_in_single_precision():
    report = check_model(Single(), nn.CrossEntropyLoss(), X, Y)
    assert not report.refused and 0 < report.errors["ggn_diag"] < 1e-5
    own = nnj.PatchMatmul.factor
    try:
        nnj.PatchMatmul.factor = lambda self, u, owner: own(self, 1.01 * u, owner)
        with pytest.raises(AssertionError, match="ggn_diag of 'one.weight' is wrong"):
            check_model(Single(), nn.CrossEntropyLoss(), X, Y)
    finally:
        nnj.PatchMatmul.factor = own


def test_samples_in_another_order():
    """A permutation that a model never undoes is seen by nothing but running samples alone."""

    class Shuffled(nn.Linear):
        def forward(self, x):
            return super().forward(x).roll(1, 0)

    model, x, y = nn.Sequential(Shuffled(4, 3)), torch.randn(3, 4), torch.tensor([0, 2, 1])
    with pytest.raises(AssertionError, match="in another order.*sample 0.*is row 1"):
        check_model(model, nn.CrossEntropyLoss(), x, y)
    assert check_model(nn.Linear(4, 3), nn.CrossEntropyLoss(), x, y).samples == 3


def test_how_far_kfac_is_stands_in_the_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    report = check_model(model, nn.CrossEntropyLoss(), x, y)
    assert list(report.kfac_errors) == ["0", "2", "3"]
    assert report.kfac_errors["0"] > 0.1 and report.kfac_errors["2"] < 1e-12
    line = f"  0            {report.kfac_errors['0']:.2g}"
    assert "|G - KFAC| / |G|:\n" + line in str(report)
    model.double()
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("kfac", "ggn_block"):
        loss(model(x.double()), y).backward()
    block = model[0].ggn_block
    assert report.kfac_errors["0"] == pytest.approx(
        float((model[0].kfac.dense() - block).norm() / block.norm())
    )
