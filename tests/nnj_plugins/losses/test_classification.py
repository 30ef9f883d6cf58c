"""NLLLoss and KLDivLoss are linear in log probabilities: their curvature is that of cross entropy,
or they are refused.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import nnj
from nnj.registry.loss_rules import hessian_of_loss
from nnj.testing import check_loss, check_model
from tests.support.losses import ignoring, made, soft, y, z

pytestmark = pytest.mark.usefixtures("seeded")

ONE = torch.tensor(1.0)


def log_p(*shape, axis=1, size=1.0):
    """Log probabilities along an axis."""
    return lambda: (size * z(*shape)()).log_softmax(axis)


def nll(**options):
    weight = torch.linspace(0.2, 2.0, 4) if options.pop("weighted", False) else None
    return lambda: nn.NLLLoss(weight, **options)


def kl(**options):
    return lambda: nn.KLDivLoss(**options)


RULES = {
    "nll": (nn.NLLLoss, 1, log_p(5, 4), y(4, 5)),
    "nll, two classes": (nn.NLLLoss, 1, log_p(5, 2), y(2, 5)),
    "nll, one class": (nn.NLLLoss, 1, log_p(5, 1), y(1, 5)),
    "nll, one sample": (nn.NLLLoss, 0, log_p(4, axis=0), y(4)),
    "nll, weights": (nll(weighted=True), 1, log_p(5, 4), y(4, 5)),
    "nll, ignored, weights": (nll(weighted=True, ignore_index=2), 1, log_p(9, 4), y(4, 9)),
    "nll, ignored beyond": (nll(ignore_index=-7), 1, log_p(9, 4), ignoring(-7, 4, 9)),
    "nll, all ignored": (nll(), 1, log_p(2, 4), lambda: torch.full((2,), -100)),
    "nll, two axes, all": (nll(weighted=True, ignore_index=1), 1, log_p(2, 4, 3, 2), y(4, 2, 3, 2)),
    "nll, sure": (nll(weighted=True), 1, log_p(5, 4, size=1000.0), y(4, 5)),
    "nll 2d": (lambda: nn.NLLLoss2d(), 1, log_p(2, 4, 3, 2), y(4, 2, 3, 2)),
    "kl": (kl(reduction="batchmean"), 1, log_p(5, 4), soft(5, 4)),
    "kl, log target": (kl(reduction="batchmean", log_target=True), 1, log_p(5, 4), log_p(5, 4)),
    "kl, log target, any": (kl(reduction="batchmean", log_target=True), 1, log_p(5, 4), z(5, 4)),
    "kl, one sample": (kl(), 0, log_p(4, axis=0), soft(4)),
    "kl, zero targets": (kl(), 1, log_p(5, 4), lambda: F.one_hot(torch.arange(5) % 4, 4).double()),
    "kl, places": (kl(reduction="batchmean"), 1, log_p(2, 3, 2, 2), soft(2, 3, 2, 2)),
    "kl, last axis": (
        kl(reduction="batchmean", log_target=True),
        2,
        log_p(3, 2, 4, axis=2),
        log_p(3, 2, 4, axis=2),
    ),
    "kl, middle axis": (kl(reduction="batchmean"), 2, log_p(2, 3, 4, 2, axis=2), soft(2, 3, 4, 2)),
    "kl, last axis, one place": (
        kl(reduction="batchmean"),
        2,
        log_p(3, 1, 4, axis=2),
        soft(3, 1, 4),
    ),
    "kl, target of all rows": (kl(reduction="batchmean"), 1, log_p(3, 4), soft(1, 4)),
    "kl, sure": (kl(), 1, log_p(5, 4, size=1000.0), soft(5, 4)),
}


@pytest.mark.filterwarnings("ignore:reduction:UserWarning", "ignore:Using a target size")
@pytest.mark.parametrize("loss, given", made(RULES))
def test_curvature_is_that_in_what_log_softmax_is_given(loss, given):
    axis, *given = given
    check_loss(
        loss(),
        *[make() for make in given],
        reference=lambda loss, z, t: loss(z.log_softmax(axis), t),
    )


class Head(nn.Module):
    """A way to log probabilities of 4 classes."""

    def __init__(self, last, size=1.0):
        super().__init__()
        self.one, self.two, self.last, self.size = nn.Linear(3, 5), nn.Linear(5, 4), last, size

    def forward(self, x):
        return self.last(self.size * self.two(torch.tanh(self.one(x))))


LASTS = {
    "module": nn.LogSoftmax(1),
    "function": lambda z: F.log_softmax(z, -1),
    "method": lambda z: z.log_softmax(1),
    "log of softmax": lambda z: z.softmax(1).log(),
    "logsumexp": lambda z: z - z.logsumexp(1, keepdim=True),
}


def collected(model, loss, *args):
    model = nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad"):
        nnj.extend(loss)(model(*args[:-1]), args[-1]).backward()
    return [p.ggn_diag for p in model.parameters()] + [
        model.one.ggn_block,
        model.two.ggn_block,
        model.one.weight.batch_grad,
    ]


def one_hot(y):
    return F.one_hot(y, 4)


OF = {
    "module": (nn.NLLLoss(), lambda y: y, 1.0),
    "function": (F.nll_loss, lambda y: y, 1.0),
    "partial": (functools.partial(F.nll_loss, reduction="sum"), lambda y: y, 6.0),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), lambda y: one_hot(y).double(), 1.0),
    "divergence, sum": (
        functools.partial(F.kl_div, reduction="sum"),
        lambda y: one_hot(y).double(),
        6.0,
    ),
}


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("which", OF)
def test_same_as_cross_entropy_of_logits(last, which):
    loss, target, factor = OF[which]
    model, x, t = Head(LASTS[last]).double(), z(6, 3)(), y(4, 6)()
    found = collected(model, loss, x, target(t))
    model.last = nn.Identity()
    expected = collected(model, nn.CrossEntropyLoss(), x, t)
    torch.testing.assert_close(found, [factor * e for e in expected], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [100.0, 1000.0, 1e5])
def test_sure_models_are_finite_and_right(dtype, size):
    model, x, t = Head(LASTS["module"], size).to(dtype), z(6, 3)().to(dtype), y(4, 6)()
    found = collected(model, nn.NLLLoss(), x, t)
    model.last = nn.Identity()
    expected = collected(model, nn.CrossEntropyLoss(), x, t)
    assert all(bool(f.isfinite().all()) for f in found) and found[-1].any()
    # beyond, every probability that is not the largest has underflown
    assert size > 100 or found[0].any()
    torch.testing.assert_close(found, expected)


def test_by_name():
    model, x, t = nnj.extend(Head(LASTS["module"])).double(), z(6, 3)(), y(4, 6)()
    loss, w, found = nnj.extend(F.nll_loss), torch.rand(4).double(), []
    for call in (
        lambda: loss(model(x), t, w, reduction="sum"),
        lambda: loss(target=t, input=model(x), weight=w, reduction="sum"),
        lambda: loss(model(x), t, weight=w, reduction="none").sum(),
    ):
        with nnj.collect("ggn_diag"):
            call().backward()
        found.append(model.one.weight.ggn_diag)
    check = nnj.extend(nn.CrossEntropyLoss(w, reduction="sum"))
    with nnj.collect("ggn_diag"):
        check(model(x), t).backward()
    for f in found:
        torch.testing.assert_close(f, model.one.weight.ggn_diag)


def test_adaptive_log_softmax_by_its_log_probabilities():
    class Adaptive(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.softmax = (
                nn.Linear(3, 5),
                nn.AdaptiveLogSoftmaxWithLoss(5, 9, [3, 6], div_value=2.0),
            )

        def forward(self, x):
            return self.softmax.log_prob(torch.tanh(self.one(x)))

    model, x, t = Adaptive().double(), z(6, 3)(), y(9, 6)()
    params = {name: p.detach() for name, p in model.named_parameters()}
    p = model(x).exp().detach()
    assert torch.allclose(
        nn.NLLLoss()(model(x), t), model.softmax(torch.tanh(model.one(x)), t).loss
    )
    j = jacrev(lambda q: functional_call(model, q, (x,)))(params)
    nnj.extend(model)
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.NLLLoss())(model(x), t).backward()
    for name, q in model.named_parameters():
        flat = j[name].reshape(6, 9, -1)
        own = (p[:, :, None] * flat.square()).sum((0, 1)) - (p[:, None] @ flat)[:, 0].square().sum(
            0
        )
        torch.testing.assert_close(q.ggn_diag.flatten(), own / 6, rtol=1e-9, atol=1e-12)


def test_the_loss_inside_adaptive_log_softmax_is_not_taken():
    model, asm = nnj.extend(nn.Linear(3, 5)), nn.AdaptiveLogSoftmaxWithLoss(5, 9, [3, 6])
    nnj.extend(asm, loss=True)
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        asm(model(torch.randn(6, 3)), y(9, 6)()).loss.backward()


def test_check_model_with_a_reference():
    model = Head(LASTS["module"])
    check_model(
        model,
        nn.NLLLoss(),
        z(3, 3)(),
        y(4, 3)(),
        reference=lambda loss, z, t: loss(z.log_softmax(1), t),
    )


@pytest.mark.parametrize(
    "dtype, classes",
    [
        (torch.float32, 50_000),
        (torch.bfloat16, 1000),
        (torch.float16, 1000),
        (torch.float64, 50_000),
    ],
)
def test_rounding_of_many_classes_is_no_reason_to_refuse(dtype, classes):
    for size in (1e-3, 1.0, 30.0):
        output = (size * torch.randn(3, classes, dtype=torch.float64)).to(dtype).log_softmax(1)
        h = hessian_of_loss(nn.NLLLoss(), ONE, output, torch.tensor([0, 1, 2]))
        p = output.double().softmax(1)
        torch.testing.assert_close(
            h.diagonal()[:, 0].double(), p * (1 - p) / 3, rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4),
        lambda: torch.randn(3, 4).softmax(1),
        lambda: torch.zeros(3, 4),
        lambda: torch.randn(3, 4).log_softmax(0),
        lambda: torch.randn(3, 4).log_softmax(1) + 1e-4,
        lambda: torch.randn(3, 4).log_softmax(1).double() + 1e-10,
    ],
)
@pytest.mark.parametrize(
    "loss", [nn.NLLLoss(), nn.KLDivLoss(reduction="batchmean"), F.nll_loss, F.kl_div]
)
@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
def test_what_is_no_log_probability_is_refused(make, loss):
    target = torch.rand(3, 4) if loss is F.kl_div or isinstance(loss, nn.KLDivLoss) else y(4, 3)()
    loss = nnj.extend(loss)
    with pytest.raises(
        nnj.NNJError,
        match=r"(NLLLoss|KLDivLoss): exp of its input does not sum to one over .*CrossEntropyLoss",
    ):
        hessian_of_loss(loss, ONE, make(), target)


def test_a_divergence_of_which_the_classes_cannot_be_told():
    output = torch.full((2, 4, 4), 0.25).log()
    with pytest.raises(nnj.NNJError, match=r"sums to one over each of the axes \[1, 2\]"):
        hessian_of_loss(nn.KLDivLoss(reduction="batchmean"), ONE, output, torch.rand(2, 4, 4))


def test_negative_weights_are_refused():
    with pytest.raises(nnj.NNJError, match="NLLLoss: .*not positive semi-definite"):
        hessian_of_loss(nn.NLLLoss(-torch.rand(4), reduction="sum"), ONE, log_p(3, 4)(), y(4, 3)())
    with pytest.raises(nnj.NNJError, match="KLDivLoss: .*not positive semi-definite"):
        hessian_of_loss(nn.KLDivLoss(reduction="sum"), ONE, log_p(3, 4)(), -soft(3, 4)())


@pytest.mark.parametrize("signed", [False, True])
def test_a_divergence_from_a_target_that_is_learned_is_refused(signed):
    model, x = nnj.extend(nn.Linear(3, 4)), torch.randn(6, 3)
    with (
        pytest.raises(nnj.NNJError, match="KLDivLoss is linear in log probabilities"),
        nnj.collect("ggn_diag", signed=signed),
    ):
        nnj.extend(nn.KLDivLoss(reduction="sum"))(
            model(x).log_softmax(1), model(-x).softmax(1)
        ).backward()


class Own(nn.NLLLoss):
    def forward(self, z, t):
        return 0.9 * super().forward(z, t)


@pytest.mark.parametrize(
    "loss", [Own(), lambda z, t: F.nll_loss(z, t), lambda z, t: -z.gather(1, t[:, None]).mean()]
)
def test_what_is_linear_in_log_probabilities_otherwise_is_refused(loss):
    model, x, t = nnj.extend(Head(LASTS["module"])), torch.randn(6, 3), y(4, 6)()
    with (
        pytest.raises(
            nnj.NNJError, match=r"(Own|a lambda\)) is linear in log probabilities.*logits"
        ),
        nnj.collect("ggn_diag"),
    ):
        nnj.extend(loss)(model(x), t).backward()


class Two(nn.Module):
    """Log probabilities of 3 classes, and 2 numbers beside them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 5)

    def forward(self, x):
        z = self.one(x)
        return z[:, :3].log_softmax(1), z[:, 3:]


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, m, t: F.nll_loss(z, t) + m.square().mean(),
        lambda z, m, t: F.nll_loss(z, t) + m.logsumexp(1).square().sum(),
        lambda z, m, t: F.kl_div(z, F.one_hot(t, 3).to(z), reduction="sum") + 0 * m.sum(),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_one_of_several_outputs_that_is_log_probabilities_is_not_left_out(loss, signed):
    """Beside another term with curvature the zero would not be seen."""
    model, t = nnj.extend(Two()), y(3, 6)()
    with (
        pytest.raises(
            nnj.NNJError, match=r"a lambda\) is linear in log probabilities.*loss of its own"
        ),
        nnj.collect("ggn_diag", signed=signed),
    ):
        nnj.extend(loss)(*model(torch.randn(6, 3)), t).backward()


def test_terms_as_losses_of_their_own():
    model, x, t = nnj.extend(Two()).double(), z(6, 3)(), y(3, 6)()
    nll, mse = nnj.extend(nn.NLLLoss()), nnj.extend(nn.MSELoss())
    with nnj.collect("ggn_diag"):
        p, m = model(x)
        (nll(p, t) + mse(m, torch.zeros_like(m))).backward()
    together = lambda f, t: F.cross_entropy(f[:, :3], t) + f[:, 3:].square().mean()
    apart = model.one.weight.ggn_diag
    with nnj.collect("ggn_diag"):
        nnj.extend(together)(model.one(x), t).backward()
    torch.testing.assert_close(apart, model.one.weight.ggn_diag, rtol=1e-9, atol=1e-12)


def test_log_probabilities_that_a_loss_does_not_use():
    model, x = nnj.extend(Two()), torch.randn(6, 3)
    with nnj.collect("ggn_diag"):
        nnj.extend(lambda z, m: 0 * z.detach().sum() + m.square().mean())(*model(x)).backward()
    assert model.one.weight.ggn_diag[3:].all() and not model.one.weight.ggn_diag[:3].any()


def test_sure_logits_are_not_taken_for_log_probabilities():
    output = torch.tensor([[0.0, -1000.0, -1000.0], [-2000.0, 0.0, -1e4]])
    h = nnj.autodiff_hessian(lambda o: F.cross_entropy(o, torch.tensor([0, 0])), (output,))
    assert not h.diagonal().any()


def test_a_linear_loss_of_outputs_that_are_zero_is_not_refused():
    model, x = nnj.extend(nn.Linear(3, 1)), torch.randn(6, 3)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    with nnj.collect("ggn_diag"):
        nnj.extend(lambda z, t: torch.maximum(0.9 * (t - z), 0.1 * (z - t)).mean())(
            model(x), torch.randn(6, 1)
        ).backward()
    assert model.weight.ggn_diag.shape == (1, 3) and not model.weight.ggn_diag.any()


def test_ctc():
    args = (torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 5]), torch.tensor([2, 2]))
    for loss in (nn.CTCLoss(), nnj.extend(F.ctc_loss)):
        with pytest.raises(nnj.NNJError, match=r"CTCLoss: .*concave in the log probabilities"):
            hessian_of_loss(loss, torch.tensor(1.0), torch.randn(5, 2, 3).log_softmax(2), *args)
