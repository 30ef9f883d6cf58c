"""Each refusal: nnj's own error, a sentence with subject, fact and remedy; gradients intact, nothing half collected, and the next
`with` as if nothing had been."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nnj
from nnj import plugins
from nnj_plugins import losses
from tests.cases import EITHER, MLP, Attention, Case, Do, N, classes, do, linear, plain, r, vectors
from tests.oracle import build, data_of, losses_of, run
from tests.test_models import QUANTITIES, collected, extended

REFUSED: dict[str, tuple[Case, str]] = {}


def refused(name: str, words: str, make: Callable[[], nn.Module], data: Any = vectors, how: Any = plain,
            loss: Any = nn.CrossEntropyLoss, **options: Any) -> None:
    assert name not in REFUSED
    REFUSED[name] = Case(name, make, data, how, loss, **options), words


def coupled(name: str, how: Callable[..., Any], data: Any = vectors, loss: Any = nn.CrossEntropyLoss, call: Any = plain,
            **parts: Callable[[], Any]) -> None:
    refused(name, "samples influence one another", do(how, **parts), data, call, loss)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(a) @ F.normalize(b).T, torch.arange(len(a)))


def batch_hard(s: Any, x: Tensor) -> Tensor:
    z = s.one(x)
    return torch.cdist(z, z)


def memory_bank(s: Any, x: Tensor) -> Tensor:
    """Prototypes made of the batch itself."""
    z = s.one(x)
    return -(z[:, None] - torch.stack([z[:2].mean(0), z[2:].mean(0), z.mean(0)])).square().sum(-1)


class Counted(nn.Module):
    """Statistics of the batch by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


# -- samples that influence one another --------------------------------------------------------------------------------

refused(
    "batch norm in training", "BatchNorm1d.*training", lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
)
refused("batch norm in training, images", "BatchNorm2d.*training", lambda: nn.Sequential(
    nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)),
    lambda: (r(N, 2, 4, 4), classes()))
refused("batch norm without statistics, in eval", "BatchNorm1d|influence", lambda: nn.Sequential(
    nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 3)).eval())
refused("lazy batch norm", "BatchNorm1d.*training", lambda: lazy())
refused("batch norm in a frozen layer in training", "BatchNorm1d.*training", lambda: nn.Sequential(
    nn.Linear(4, 3), nn.BatchNorm1d(3).requires_grad_(False), nn.Linear(3, 3)))
coupled("functional batch norm", lambda s, x: s.head(F.batch_norm(s.one(x), None, None, training=True)), one=linear(4, 3),
        head=linear(3, 3))
coupled("batch norm by hand", lambda s, x: s.head(Counted()(s.one(x))), one=linear(4, 3), head=linear(3, 3))
coupled("centred", lambda s, x: s.head(s.one(x) - s.one(x).mean(0)), one=linear(4, 3), head=linear(3, 3))
coupled("centred output", lambda s, x: (lambda z: z - z.mean(0, keepdim=True))(s.one(x)), one=linear(4, 3))
coupled(
    "batch attention", lambda s, x: s.head((s.one(x) @ s.one(x).T).softmax(-1) @ s.one(x)), one=linear(4, 3), head=linear(3, 3)
)
coupled(
    "batch attention, fused", lambda s, x: s.head(s.attention(x[None])[0]), attention=lambda: Attention(4, 2), head=linear(4, 3)
)
coupled("batch attention, as many tokens", lambda s, x: s.head(s.attention(x.transpose(0, 1)).transpose(0, 1).mean(1)),
        lambda: (r(3, 3, 4), classes()), attention=lambda: Attention(4, 2), head=linear(4, 3))
coupled("contrastive", lambda s, x: s.one(x) @ s.one(x).T, one=linear(4, 2))
coupled("contrastive, two towers", lambda s, a, b: F.normalize(s.one(a)) @ F.normalize(s.two(b)).T,
        lambda: (r(N, 4), r(N, 2), torch.arange(N)), call=lambda m, l, a, b, y: l(m(a, b), y), one=linear(4, 3), two=linear(2, 3))
coupled("distances in the batch", batch_hard, one=linear(4, 2))
coupled("prototypes of the batch", memory_bank, one=linear(4, 2))
coupled(
    "graph of nodes",
    lambda s, x: s.head(torch.tensor([[0.0, 1, 1], [1, 0, 0], [0.5, 0, 0]]).to(x) @ s.one(x)),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled("cumulative over the batch", lambda s, x: s.head(s.one(x).cumsum(0)), one=linear(4, 3), head=linear(3, 3))
coupled("rolled and added", lambda s, x: s.head(s.one(x) + s.one(x).roll(1, 0)), one=linear(4, 3), head=linear(3, 3))
coupled("softmax over the batch", lambda s, x: s.head(s.one(x).softmax(0)), one=linear(4, 3), head=linear(3, 3))
coupled("largest of the batch", lambda s, x: s.head(s.one(x) / s.one(x).abs().max()), one=linear(4, 3), head=linear(3, 3))
coupled(
    "mixup in the hidden layer",
    lambda s, x: s.head(0.7 * s.one(x) + 0.3 * s.one(x)[torch.tensor([1, 2, 0])]),
    one=linear(4, 3),
    head=linear(3, 3),
)
coupled("norm of the whole batch", lambda s, x: s.head(F.layer_norm(s.one(x), (3, 3))), one=linear(4, 3), head=linear(3, 3))
coupled("coupled in the derivative alone", lambda s, x: s.head(s.one(x) * s.one(x).mean(0).detach() + (
    s.one(x).sum(0) - s.one(x).sum(0).detach())), one=linear(4, 3), head=linear(3, 3))
refused("a loss that couples rows", "couples rows|influence", MLP, lambda: (r(N, 4), r(N, 4)), lambda m, l, a, b: l(m(a), m(b)),
        lambda: info_nce)
refused("a loss of the mean output", "couples rows|influence", MLP, lambda: (r(N, 4), r(3)), plain,
        lambda: lambda z, y: (z.mean(0) - y).square().sum())

# -- the loss ----------------------------------------------------------------------------------------------------------

refused("negative factor", "negative", MLP, how=lambda m, l, x, y: -l(m(x), y))
refused("difference of losses", "negative", MLP, how=lambda m, l, x, y: l(m(x), y) - 0.1 * l(m(x), (y + 1) % 3))
refused("negative weight of a row", "negative", MLP, loss=lambda: nn.CrossEntropyLoss(reduction="none"),
        how=lambda m, l, x, y: (l(m(x), y) * torch.tensor([1.0, -1.0, 1.0]).double()).sum())
refused("not convex", "not positive semi-definite", MLP, loss=lambda: lambda z, y: torch.sin(z).sum())
refused("concave", "not positive semi-definite", MLP, loss=lambda: lambda z, y: -z.square().sum())
refused("gaussian nll of two outputs", "not positive semi-definite", MLP, lambda: (r(N, 4), r(N)),
        loss=lambda: lambda z, y: F.gaussian_nll_loss(z[:, 0], y, z[:, 1].exp()))
refused("random numbers in the loss", "another value", MLP,
        loss=lambda: lambda z, y: F.cross_entropy(F.dropout(z, 0.5), y))
refused("infinite output", "not finite", do(lambda s, x: s.one(x) / torch.zeros(3).double(), one=linear(4, 3)),
        loss=nn.MSELoss, data=lambda: (r(N, 4), r(N, 3)))
refused("nan in the output", "not finite", do(lambda s, x: s.one(x) * torch.tensor([1.0, float("nan"), 1.0]), one=linear(4, 3)))
refused(
    "masked with -inf",
    "not finite.*mask",
    do(lambda s, x: s.one(x).masked_fill(torch.tensor([False, False, True]), -torch.inf), one=linear(4, 3)),
    lambda: (r(N, 4), classes(N, 2)),
)
refused(
    "complex output",
    "complex.*view_as_real",
    do(lambda s, x: torch.complex(s.one(x), s.two(x)), one=linear(4, 3), two=linear(4, 3)),
    lambda: (r(N, 4), r(N, 3)),
    loss=lambda: lambda z, y: (z - y).abs().square().mean(),
)
refused("complex model", "complex.*view_as_real", do(lambda s, x: torch.fft.fft(s.one(x)), one=linear(4, 3)),
        lambda: (r(N, 4), r(N, 3)), loss=lambda: lambda z, y: (z - y).abs().square().mean())
refused("a loss with a way past its arguments", "otherwise than through its arguments", MLP,
        loss=lambda: lambda box, y: F.cross_entropy(box.z, y), how=lambda m, l, x, y: l(Box(m(x)), y))
refused("an argument changed in place", "in place", MLP, loss=nn.L1Loss, data=lambda: (r(N, 4), r(N, 3)),
        how=lambda m, l, x, y: (lambda z: (lambda v: (z.add_(1), v)[1])(l(z, y)))(m(x) + 0))

# -- the model ---------------------------------------------------------------------------------------------------------

refused("reentrant checkpoint", "use_reentrant=False", do(lambda s, x: s.head(checkpoint(s.one, x, use_reentrant=True)),
                                                          one=linear(4, 3), head=linear(3, 3)),
        lambda: (r(N, 4).requires_grad_(), classes()))
refused(
    "rows that do not divide",
    "influence|divide|rows",
    do(lambda s, x: s.head(torch.tanh(s.one(x)).reshape(4, 9)), one=linear(4, 12), head=linear(9, 3)),
    lambda: (r(N, 4), classes(4)),
)


class Box:
    def __init__(self, z: Tensor):
        self.z = z


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(3, 3))
    model(torch.zeros(3, 4))
    return model


def intact(model: nn.Module) -> None:
    """Nothing half collected."""
    for part in model.modules():
        assert not hasattr(part, "ggn_block")
    for p in model.parameters():
        assert not any(hasattr(p, q) for q in QUANTITIES)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    case, words = REFUSED[name]
    alone = build(case)
    run(case, alone, losses_of(case)).backward()
    model, losses = extended(case)
    with pytest.raises(nnj.NNJError, match=re.compile(words, re.S)) as error, nnj.collect(*QUANTITIES):
        run(case, model, losses).backward()
    assert len(str(error.value)) > 40 and "sweep failed" not in str(error.value)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (
            p.grad is None or torch.equal(p.grad, q.grad) or bool(q.grad.isnan().any())
        )
    intact(model)
    for first, second in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(first, second), "running statistics are those of one forward pass"
    after(model)


def after(model: nn.Module) -> None:
    """The next `with`, on another model and on the same parameters, is as if nothing had been."""
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []
    p = next(p for p in model.parameters() if p.requires_grad)
    weight = nnj.extend(Do(lambda s, x: x * s.p.sum(), p=p))
    with nnj.collect("ggn_diag"):
        nnj.extend(nn.MSELoss())(weight(torch.ones(2, 1).double()), torch.zeros(2, 1).double()).backward()
    torch.testing.assert_close(p.ggn_diag, torch.full_like(p, 2.0))


@pytest.mark.parametrize("name", EITHER)
def test_exact_or_refused(name):
    try:
        found = collected(EITHER[name], "ggn_diag", "ggn_block", "batch_grad")
    except nnj.NNJError as error:
        assert re.search("influence one another|whose|belong", str(error)) and "sweep failed" not in str(error)
        assert "influence" in str(error) or collected(EITHER[name], "ggn_diag", "ggn_block") == [], (
            "the gradient alone is not known"
        )
    else:
        assert found == []


def test_a_refused_pass_among_others_adds_nothing():
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(x), y).backward()
        there = {n: (p.ggn_diag.clone(), p.batch_grad.clone()) for n, p in model.named_parameters()}
        with pytest.raises(nnj.NNJError, match="negative"):
            (-loss(model(x), y)).backward()
        for n, p in model.named_parameters():
            assert torch.equal(p.ggn_diag, there[n][0]) and torch.equal(p.batch_grad, there[n][1])
        loss(model(x), y).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, 2 * there[n][0])
        assert p.batch_grad.shape[0] == 2 * N


def test_one_refused_loss_of_two():
    model, losses = extended(Case("", MLP, vectors, loss=lambda: (nn.CrossEntropyLoss(), nn.MSELoss())))
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"MSELoss.*negative"), nnj.collect("ggn_diag"):
        z = model(x)
        (losses[0](z, y) - losses[1](z, torch.zeros(N, 3).double())).backward()
    intact(model)


# -- what is asked for -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "names, options, words",
    [
        (
            ("ggn_diagonal",),
            {},
            r"unknown quantity 'ggn_diagonal'.*did you mean 'ggn_diag'.*Known: batch_grad, ggn_block, ggn_diag, ",
        ),
        (("diag",), {}, "unknown quantity 'diag'.*Known"),
        ((), {}, "name of a quantity"),
        ((3,), {}, "unknown quantity 3"),
        (("ggn_diag",), {"samples": 2}, "unknown option 'samples'"),
        (("ggn_diag_mc",), {"sample": 2}, "unknown option 'sample'.*did you mean 'samples'"),
        (("ggn_diag_mc",), {"samples": 0}, "samples=0"),
        (("ggn_diag_mc",), {"samples": 1.5}, "samples=1.5"),
        (("ggn_diag",), {"modules": ["head"]}, "modules="),
    ],
)
def test_what_collect_does_not_know(names, options, words):
    with pytest.raises(nnj.NNJError, match=words):
        nnj.collect(*names, **options)


def test_nothing_collected_is_said_at_the_end_of_the_with():
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"nothing was collected for ggn_diag, ggn_block.*nnj\.extend"), \
            nnj.collect("ggn_diag", "ggn_block"):
        pass
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        loss(model(x), y)
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"), torch.no_grad():
        loss(model(x), y)
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []


def test_an_extended_loss_on_a_model_that_is_not():
    """It must not end silently with nothing collected."""
    model, loss = build(Case("", MLP, vectors)), nnj.extend(nn.CrossEntropyLoss())
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(nnj.NNJError, match=r"extend"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()


def test_modules_that_the_pass_does_not_reach():
    """As with .grad: None."""
    model, (loss,) = extended(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    other = nn.Linear(2, 2)
    with nnj.collect("ggn_diag", modules=[other]):
        loss(model(x), y).backward()
    assert other.weight.ggn_diag is None and not hasattr(model.one.weight, "ggn_diag")


def test_everything_frozen():
    """A loss without a graph raises torch's own error; nnj adds no other."""
    model, (loss,) = extended(Case("", MLP, vectors))
    model.requires_grad_(False)
    x, y = data_of(Case("", MLP, vectors))
    with pytest.raises(RuntimeError, match="does not require grad"), nnj.collect("ggn_diag"):
        loss(model(x), y).backward()
    with nnj.collect("ggn_diag"):
        loss(model(x.requires_grad_()), y).backward()
    intact(model)


@pytest.mark.parametrize("wrong", [3, "model", nn.Linear, [nn.Linear(1, 1)], None])
def test_what_extend_does_not_take(wrong):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or a function"):
        nnj.extend(wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["extend the compiled", "compile the extended", "compile in place", "compile a part"])
def test_compiled(backend, order):
    torch._dynamo.reset()
    model, loss = build(Case("", MLP, vectors)), nnj.extend(nn.CrossEntropyLoss())
    alone = build(Case("", MLP, vectors))
    x, y = data_of(Case("", MLP, vectors))
    F.cross_entropy(alone(x), y).backward()
    if order == "extend the compiled":
        with pytest.raises(nnj.NNJError, match=r"compile.*_orig_mod"):
            nnj.extend(torch.compile(model, backend=backend))
        return
    called: Any = nnj.extend(model)
    if order == "compile the extended":
        called = torch.compile(model, backend=backend)
    elif order == "compile in place":
        model.compile(backend=backend)
    else:
        model.two.compile(backend=backend)
    try:
        with nnj.collect("ggn_diag"):
            loss(called(x), y).backward()
    except nnj.NNJError as error:
        assert "compile" in str(error)
        intact(model)
    else:  # a backend that leaves autograd's own nodes may be exact
        from tests.oracle import Truth, close
        truth = Truth(Case("", MLP, vectors))
        assert all(close(p.ggn_diag, truth.diag(n)) == "" for n, p in model.named_parameters())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch._dynamo.reset()


# -- broken rules ------------------------------------------------------------------------------------------------------

class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Broken(nnj.Jacobian):
    """A map of the right shapes that gives others."""

    def jvp(self, v: Tensor) -> Tensor:
        return v[..., :2]

    def vjp(self, u: Tensor) -> Tensor:
        return u[..., :2]


def fault_dict(m: Any, x: Tensor, y: Tensor) -> Any:
    return [nnj.Diagonal(torch.ones_like(x))]


def fault_name(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)), "wieght": nnj.Diagonal(x)}


def fault_kind(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": torch.ones_like(x), "weight": torch.ones_like(x)}


def fault_raises(m: Any, x: Tensor, y: Tensor) -> Any:
    return {}["input"]


def fault_shape(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Dense(torch.ones(len(x), 3, 2).to(x), (2,), (3,)), "weight": nnj.Diagonal(x)}


def fault_rows(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)[:1]), "weight": nnj.Diagonal(x)}


def fault_vjp(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": Broken((3,), (3,), x), "weight": nnj.Diagonal(x)}


@pytest.mark.parametrize(
    "rule, words",
    [
        (fault_dict, "returned list, expected a dict"),
        (fault_name, "'wieght'.*neither"),
        (fault_kind, "Tensor, expected a nnj.Jacobian"),
        (fault_raises, "failed with KeyError"),
        (fault_shape, r"\(2,\).*expected \(3,\)"),
        (fault_rows, "1 rows.*expected"),
        (fault_vjp, r"vjp of 'input' returned .*, expected"),
    ],
)
def test_a_broken_rule_is_named(rule, words):
    from nnj import quantities
    from nnj_plugins import linear as linear_rule

    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register: Any) -> None:
            register(Toy, rule)

    manager = nnj.PluginManager(load=False)
    for name, plugin in (
        ("nnj-losses", losses),
        ("nnj-quantities", quantities),
        ("nnj-linear", linear_rule),
        ("nnj-toy", Plugin()),
    ):
        manager.register(plugin, name)
    former = plugins.use(manager)
    try:
        model = nnj.extend(nn.Sequential(nn.Linear(4, 3), Toy(), nn.Linear(3, 3)))
        alone = nn.Sequential(nn.Linear(4, 3), Toy(), nn.Linear(3, 3))
        alone.load_state_dict(model.state_dict())
        loss, (x, y) = nnj.extend(nn.CrossEntropyLoss()), vectors()
        F.cross_entropy(alone(x), y).backward()
        with pytest.raises(nnj.PluginError, match=words) as error, nnj.collect("ggn_diag"):
            loss(model(x), y).backward()
        assert "plugin 'nnj-toy' (layer '1')" in str(error.value)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
        intact(model)
    finally:
        plugins.use(former)
    assert collected(Case("mlp", MLP, vectors), *QUANTITIES) == []
