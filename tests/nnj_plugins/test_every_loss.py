"""Every loss of torch, as module and as function: exact in a model, or refused in a sentence. None
is left out.
"""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj.registry.loss_rules import FunctionLoss, name_of, reference_of_loss
from nnj.registry.manager import manager
from nnj.testing import check_loss, check_model
from nnj_plugins.losses.functional import MODULES
from tests.support.losses import multi_label_margin, multi_margin, y

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:reduction:UserWarning"),
]
N, C = 5, 4


def of_logits(loss, z, *targets):
    return loss(z.log_softmax(1), *targets)


def rand():
    return torch.rand(N, C)


def signs():
    return torch.rand(N, C).round() * 2 - 1


def own(loss, z, *targets):
    return loss(z, *targets)


same = nn.Identity
labels = y(C, N)
# The loss: what makes its input, its targets, and what is differentiated twice in its place.
EXACT = {
    "L1Loss": (same, [rand], own),
    "NLLLoss": (lambda: nn.LogSoftmax(1), [labels], of_logits),
    "NLLLoss2d": (lambda: nn.LogSoftmax(1), [labels], of_logits),
    "PoissonNLLLoss": (same, [rand], own),
    "GaussianNLLLoss": (same, [rand, lambda: rand() + 0.1], own),
    "KLDivLoss": (lambda: nn.LogSoftmax(1), [rand], of_logits),
    "MSELoss": (same, [rand], own),
    "BCELoss": (nn.Sigmoid, [rand], own),
    "BCEWithLogitsLoss": (same, [rand], own),
    "HingeEmbeddingLoss": (same, [signs], own),
    "MultiLabelMarginLoss": (
        same,
        [lambda: torch.tensor([[3, 0, -1, 1], [2, -1, 0, 0]] * 2 + [[0, 1, -1, 2]])],
        multi_label_margin,
    ),
    "SmoothL1Loss": (same, [rand], own),
    "HuberLoss": (same, [rand], own),
    "SoftMarginLoss": (same, [signs], own),
    "CrossEntropyLoss": (same, [labels], own),
    "MultiLabelSoftMarginLoss": (same, [lambda: rand().round()], own),
    "MultiMarginLoss": (same, [labels], multi_margin),
}
# Of several outputs, with parameters of their own, or never convex.
OTHERS = {
    "LinearCrossEntropyLoss",
    "CosineEmbeddingLoss",
    "MarginRankingLoss",
    "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
    "CTCLoss",
}


def test_no_loss_of_torch_is_left_out():
    names = {
        name
        for name, cls in vars(nn).items()
        if isinstance(cls, type) and issubclass(cls, nn.modules.loss._Loss)
    }
    known = {name for name in (*EXACT, *OTHERS) if hasattr(nn, name)}  # an older torch has fewer
    assert names | set(nn.modules.loss.__all__) == known
    by_rule = {
        name for name in names if manager().find("loss", getattr(nn, name)).key is getattr(nn, name)
    }
    assert by_rule == set(EXACT) | {"CTCLoss"}


def test_no_function_of_torch_is_left_out():
    here = {
        f
        for name, f in vars(F).items()
        if name.endswith(("_loss", "_entropy", "kl_div", "_with_logits")) and callable(f)
    }
    without = {
        getattr(F, "linear_cross_entropy", F.cosine_embedding_loss),  # an older torch has none
        F.cosine_embedding_loss,
        F.margin_ranking_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
    }
    assert here == set(MODULES) | without


class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(3, 5), nn.Linear(5, C), last

    def forward(self, x):
        return self.last(self.two(torch.tanh(self.one(x))))


FUNCTIONS = {cls.__name__: function for function, cls in MODULES.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", EXACT)
def test_module_in_a_model(name, reduction):
    last, targets, reference = EXACT[name]
    loss = getattr(nn, name)(reduction=reduction)
    check_model(
        Net(last()), loss, torch.randn(N, 3), *[make() for make in targets], reference=reference
    )


@pytest.mark.parametrize("name", EXACT)
def test_what_a_rule_is_compared_with(name):
    """A user of check_model and check_loss has no reference: what rules declare is right, for
    modules and for functions.
    """
    last, targets, reference = EXACT[name]
    losses = [getattr(nn, name)(), getattr(nn, name)(reduction="sum")]
    losses += [functools.partial(FUNCTIONS[name], reduction="sum")] if name in FUNCTIONS else []
    for loss in losses:
        given = [make() for make in targets]
        check_model(Net(last()), loss, torch.randn(N, 3), *given)
        check_loss(loss, last()(torch.randn(N, C).double()), *given)
    loss, output = losses[0], last()(torch.randn(N, C))
    value = reference_of_loss(loss)(loss, output, *given)
    torch.testing.assert_close(value, loss(output, *given))
    torch.testing.assert_close(value, reference(loss, output, *given))


def test_a_loss_without_a_rule_is_its_own_reference():
    class Squares(nn.Module):
        def forward(self, output, target):
            return (output - target).square().sum()

    output, target = torch.randn(2, 3), torch.randn(2, 3)
    for loss in (
        Squares(),
        lambda y, t: (y - t).square().sum(),
        nnj.extend(lambda y, t: (y - t).square().sum()),
    ):
        assert torch.equal(
            reference_of_loss(loss)(loss, output, target), (output - target).square().sum()
        )


def test_a_reference_with_another_value():
    with pytest.raises(AssertionError, match="the reference is .* where the loss is"):
        check_model(
            nn.Linear(3, C),
            nn.MSELoss(),
            torch.randn(N, 3),
            torch.rand(N, C),
            reference=lambda loss, y, t: 2 * loss(y, t),
        )


@pytest.mark.parametrize("options", [{}, dict(reduction="sum")])
@pytest.mark.parametrize("name", sorted(set(EXACT) - {"NLLLoss2d"}))
def test_function_is_the_module(name, options, monkeypatch):
    """By the rule: were it differentiated twice, `twice` would be called."""
    last, targets, _ = EXACT[name]
    function, module = FUNCTIONS[name], getattr(nn, name)(**options)
    x, targets = torch.randn(N, 3), [make() for make in targets]
    model, found = nnj.extend(Net(last())), []
    monkeypatch.setattr("nnj.collecting.loss_columns.autodiff_hessian", None)
    monkeypatch.setattr("nnj.registry.loss_rules.autodiff_hessian", None)
    for loss in (nnj.extend(module), nnj.extend(functools.partial(function, **options))):
        with nnj.collect("ggn_diag"):
            loss(model(x), *targets).backward()
        found.append([p.ggn_diag for p in model.parameters()])
    loss = nnj.extend(function)
    with nnj.collect("ggn_diag"):
        loss(model(x), *targets, **options).backward()
    for other in (found[1], [p.ggn_diag for p in model.parameters()]):
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    "function, options",
    [
        (F.mse_loss, dict(weight=torch.rand(N, C).double())),
        (F.huber_loss, dict(weight=torch.rand(N, C).double(), delta=0.4)),
        (F.cross_entropy, dict(label_smoothing=0.1, weight=torch.rand(C).double(), ignore_index=1)),
        (F.multi_margin_loss, dict(margin=0.4)),
        (F.smooth_l1_loss, dict(beta=0.3)),
        (F.poisson_nll_loss, dict(full=True)),
        (F.binary_cross_entropy_with_logits, dict(pos_weight=torch.rand(C).double())),
    ],
)
def test_options_of_functions(function, options):
    target = labels() if function in (F.cross_entropy, F.multi_margin_loss) else torch.rand(N, C)
    reference = lambda loss, z, t: function(z, t, **options)
    if function is F.multi_margin_loss:
        reference = lambda loss, z, t: multi_margin(nn.MultiMarginLoss(**options), z, t)
    check_model(
        Net(same()),
        functools.partial(function, **options),
        torch.randn(N, 3),
        target,
        reference=reference,
    )


def two_heads():
    return nnj.extend(nn.Linear(3, 2 * C).double())


def run(loss, split, *targets):
    model, x = two_heads(), torch.randn(N, 3).double()
    with nnj.collect("ggn_diag"):
        nnj.extend(loss)(*split(model(x)), *targets).backward()
    return model.weight.ggn_diag


def halves(z):
    return z[:, :C], z[:, C:]


@pytest.mark.parametrize(
    "loss, targets",
    [
        (nn.CosineEmbeddingLoss(), [torch.ones(N)]),
        (nn.TripletMarginLoss(margin=9.0), [torch.randn(N, C)]),
        (nn.TripletMarginWithDistanceLoss(margin=9.0), [torch.randn(N, C)]),
        (F.triplet_margin_loss, [torch.randn(N, C)]),
        (nn.CosineEmbeddingLoss(margin=-0.9), [-torch.ones(N)]),
    ],
)
def test_distances_are_not_convex(loss, targets):
    name = name_of(nnj.extend(loss))
    with pytest.raises(
        nnj.NNJError,
        match=rf"{name}: its Hessian .*not positive semi-definite \(smallest eigenvalue -",
    ):
        run(loss, halves, *targets)


def test_ranking_is_piecewise_linear():
    assert not run(nn.MarginRankingLoss(), lambda z: (z[:, 0], z[:, 1]), torch.ones(N)).any()


def test_a_triplet_that_is_far_enough_has_no_curvature():
    far = lambda z: (z[:, :C], z[:, :C] + 0.01)
    assert not run(nn.TripletMarginLoss(margin=1e-3), far, torch.full((N, C), 100.0)).any()


@pytest.mark.parametrize(
    "loss",
    [nn.GaussianNLLLoss(), F.gaussian_nll_loss, nn.GaussianNLLLoss(full=True, reduction="sum")],
)
def test_a_variance_that_is_learned_is_not_convex(loss):
    model, x = two_heads(), torch.randn(N, 3).double()
    z = model(x)
    with (
        pytest.raises(
            nnj.NNJError,
            match="(GaussianNLLLoss|gaussian_nll_loss): its Hessian .*not positive semi-definite",
        ),
        nnj.collect("ggn_diag"),
    ):
        nnj.extend(loss)(z[:, :C], torch.randn(N, C), z[:, C:].exp()).backward()


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has no LinearCrossEntropyLoss yet"
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_loss_that_holds_a_layer(inside):
    model, loss, x, t = (
        nnj.extend(Net(same())),
        nn.LinearCrossEntropyLoss(C, 6),
        torch.randn(N, 3),
        y(6, N)(),
    )
    if inside:
        model.loss = loss
    nnj.extend(loss)
    with (
        pytest.raises(
            nnj.NNJError, match="LinearCrossEntropyLoss: the loss reaches parameters of the model"
        ),
        nnj.collect("ggn_diag"),
    ):
        loss(model(x), t).backward()


# -- functions -------------------------------------------------------------------------------------


def test_a_function_extended_in_a_loop_is_one_module():
    gc.collect()
    first = nnj.extend(F.cross_entropy)
    before = len(FunctionLoss._known)
    for _ in range(5):
        assert nnj.extend(F.cross_entropy) is first and len(first._forward_hooks) == 1
    assert len(FunctionLoss._known) == before
    assert nnj.extend(F.mse_loss) is not first
    gone = weakref.ref(nnj.extend(lambda z, t: (z - t).square().mean()))
    gc.collect()
    assert gone() is None and len(FunctionLoss._known) == before
    nnj.retract(first)
    assert not first._forward_hooks and len(nnj.extend(F.cross_entropy)._forward_hooks) == 1


def test_functions_are_named_in_errors():
    def wave(z):
        return z.sin().sum()

    model = nnj.extend(nn.Linear(3, 2))
    named = {
        "wave": wave,
        r"the loss \(a lambda\)": lambda z: z.sin().sum(),
        ".*wave.*": functools.partial(wave),
    }
    for name, loss in named.items():
        with pytest.raises(nnj.NNJError, match=rf"^{name}: its Hessian"), nnj.collect("ggn_diag"):
            nnj.extend(loss)(model(torch.full((2, 3), 10.0))).backward()
