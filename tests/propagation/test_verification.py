"""A sweep that is not what autograd computes is refused, whoever's fault it is; and to find out
does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import nnj
from nnj.graph import node_vjp
from nnj.graph.nodes import node_name
from nnj.propagation import sample_axes, verification
from nnj.registry.layer_rules import RuleLookup, find_rule
from nnj.registry.manager import use
from tests.support.cases import CASES, MLP
from tests.support.collecting import T, X, Y, base, exact, extended, pair
from tests.support.oracle import run


class Scaling(nn.Module):
    """x * weight, for which tests register rules."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, size).double())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def net(middle: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    middle = Scaling() if middle is None else middle
    return nn.Sequential(nn.Linear(4, 3), middle, nn.Tanh(), nn.Linear(3, 3)).double()


@contextmanager
def rule_of(cls: type[nn.Module], rule: Any) -> Iterator[None]:
    """The installed plugins, and one more rule."""

    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register: Any) -> None:
            register(cls, rule)

    manager = nnj.PluginManager()
    manager.register(Plugin(), "nnj-odd")
    former = use(manager)
    try:
        yield
    finally:
        use(former)


def backward(model: nn.Module, *quantities: str, **options: Any) -> None:
    nnj.extend(model)
    loss = nnj.extend(nn.MSELoss())
    with nnj.collect(*(quantities or ("ggn_diag",)), **options):
        loss(model(X), T).backward()


def refused(model: nn.Module, words: str) -> None:
    """Collect and products refuse, and the gradient is torch's own."""
    with pytest.raises(nnj.NNJError, match=words):
        backward(model)
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    nnj.retract(model)
    F.mse_loss(model(X), T).backward()
    for grad, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(grad, p.grad)
    for wrt in ("weight", "input"):
        with pytest.raises(nnj.NNJError, match=words):
            nnj.jacobian(model, X, wrt)


# -- rules -----------------------------------------------------------------------------------------


def right(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)), "weight": nnj.Diagonal(x)}


def twice(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(2 * m.weight.detach().expand_as(x)), "weight": nnj.Diagonal(x)}


def twice_at_the_weight(m: Any, x: Tensor, y: Tensor) -> Any:
    return {"input": nnj.Diagonal(m.weight.detach().expand_as(x)), "weight": nnj.Diagonal(2 * x)}


def by_chance(m: Any, x: Tensor, y: Tensor) -> Any:
    class Random(nnj.Jacobian):
        def jvp(self, v: Tensor) -> Tensor:
            return v * torch.randn(3).double()

        def vjp(self, u: Tensor) -> Tensor:
            return u * torch.randn(3).double()

    return {"input": Random((3,), (3,), x), "weight": nnj.Diagonal(x)}


def mixing(m: Any, x: Tensor, y: Tensor) -> Any:
    class Mixing(nnj.Jacobian):
        def jvp(self, v: Tensor) -> Tensor:
            return m.weight.detach() * v.flip(1)

        vjp = jvp

    return {"input": Mixing((3,), (3,), x), "weight": nnj.Diagonal(x)}


def wrong_for_negative_samples(m: Any, x: Tensor, y: Tensor) -> Any:
    odd = x[:, :1] < 0
    return {
        "input": nnj.Diagonal(m.weight.detach().expand_as(x) * (1 + odd.to(x))),
        "weight": nnj.Diagonal(x),
    }


@pytest.mark.parametrize(
    "rule", [twice, twice_at_the_weight, by_chance, mixing, wrong_for_negative_samples]
)
def test_a_wrong_rule_is_named(rule):
    with rule_of(Scaling, rule), pytest.raises(nnj.NNJError) as error:
        backward(net())
    assert "plugin 'nnj-odd' (layer '1'): the rule does not say what this call does" in str(
        error.value
    )


@pytest.mark.parametrize("rule", [twice, by_chance, mixing, wrong_for_negative_samples])
@pytest.mark.parametrize("wrt", ["weight", "input"])
def test_a_wrong_rule_is_named_by_products(rule, wrt):
    with rule_of(Scaling, rule), pytest.raises(nnj.NNJError, match="nnj-odd.*layer '1'"):
        nnj.jacobian(net(), X, wrt)


def test_a_right_rule_is_taken():
    with rule_of(Scaling, right):
        exact(base(make=net, loss=nn.MSELoss, data=lambda: (X, T)))


# -- layers that do something else than their class says ------------------------------------------


def test_forward_patched_on_the_class(monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3 * plain(self, x))
    refused(net(nn.ReLU()), "layer '[03]'")


def test_a_function_patched(monkeypatch):
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: plain(x, w.tanh(), b))
    refused(net(nn.ReLU()), "layer '[03]'")


class Rounded(nn.Parameter):
    """A weight that is quantised where it is used."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                x, w, b = args
                return F.linear(x, 2 * w, b)
            return func(*args, **(kwargs or {}))


def test_a_parameter_with_functions_of_its_own(monkeypatch):
    """Known by its type, and, where that is not looked at, by what it does."""
    monkeypatch.setattr(RuleLookup, "rule", lambda self, module: find_rule(module))
    model = net(nn.ReLU())
    model[3].weight = Rounded(model[3].weight.detach())
    with pytest.raises(nnj.NNJError, match="layer '3'"):
        backward(model)


def test_an_active_mode():
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            return 2 * found if func is F.linear else found

    model, loss = nnj.extend(net(nn.ReLU())), nnj.extend(nn.MSELoss())
    with pytest.raises(nnj.NNJError, match="layer '[03]'"), nnj.collect("ggn_diag"):
        with Doubling():
            z = model(X)
        loss(z, T).backward()


# -- hooks on gradients ----------------------------------------------------------------------------


class Hooked(MLP):
    """A hook on a tensor within the forward pass."""

    def __init__(self, hook: Any):
        super().__init__()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h.register_hook(self.hook)
        return self.three(torch.tanh(self.two(torch.tanh(h))))


def test_a_hook_on_a_tensor():
    """Columns go through those that are linear (test_hooks.py)."""
    torch.manual_seed(0)
    model = Hooked(lambda g: g.clamp(-1e-3, 1e-3)).double()
    refused(model, "a gradient hook on the output of layer 'one' is not linear")


def test_a_full_backward_hook(monkeypatch):
    """Columns go through it (test_hooks.py), unless nobody looks for hooks."""
    monkeypatch.setattr(verification, "find_hooks", lambda *given: None)
    model = net(nn.ReLU())
    model[1].register_full_backward_hook(lambda m, given, out: (3 * given[0],))
    refused(model, "a gradient hook (at|on|in)")


def test_a_full_backward_pre_hook(monkeypatch):
    monkeypatch.setattr(verification, "find_hooks", lambda *given: None)
    model = net(nn.ReLU())
    model[1].register_full_backward_pre_hook(lambda m, out: (3 * out[0],))
    refused(model, "a gradient hook (at|on|in)")


def test_hooks_that_look_are_called_twice_more():
    seen: list[Tensor] = []
    torch.manual_seed(0)
    model, loss = nnj.extend(Hooked(seen.append).double()), nnj.extend(nn.CrossEntropyLoss())
    for times in (3, 4):
        with nnj.collect("ggn_diag"):
            loss(model(X), Y).backward()
        assert len(seen) == times
    with nnj.collect("ggn_diag", verify=False):
        loss(model(X), Y).backward()
    assert len(seen) == 5


# -- functions -------------------------------------------------------------------------------------


class Relu(torch.autograd.Function):
    """Has the name of an operation of torch, and mixes rows."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Relu.apply(x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, x):
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx, g):
        return None, ctx.factor * g


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(2.0, x)


def test_a_misnamed_function_that_mixes_rows():
    with pytest.raises(nnj.NNJError, match="influence one another"):
        backward(net(Centred()))


def test_a_function_that_is_taken_for_what_its_name_says(monkeypatch):
    """The check of names switched off: the plan keeps rows apart, and verification alone sees that
    they are not.
    """
    named = lambda node: node_name(node).removesuffix("Backward")
    monkeypatch.setattr(sample_axes, "node_name", named)
    backward(net(Centred()), verify=False)  # a number, and not the right one
    with pytest.raises(nnj.NNJError):
        backward(net(Centred()))


def test_arguments_of_a_function_that_are_no_tensors():
    exact(
        base(
            make=lambda: net(Doubled()),
            twin=lambda: net(Times(2.0)),
            loss=nn.MSELoss,
            data=lambda: (X, T),
        )
    )


def test_shifted_arguments_of_a_function(monkeypatch):
    """The matching of results to arguments switched off."""
    in_order = lambda node, results: tuple(results[: len(node.next_functions)])
    monkeypatch.setattr(node_vjp, "_by_edge", in_order)
    backward(model := net(Doubled()), verify=False)
    assert getattr(model[0].weight, "ggn_diag", None) is None or not model[0].weight.ggn_diag.any()
    with pytest.raises(nnj.NNJError):
        backward(net(Doubled()))


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Coupled(nn.Module):
    """Rows that mix, which the names of nodes do not show."""

    def forward(self, x: Tensor) -> Tensor:
        q = x - x.mean(0, keepdim=True)
        return torch.cat(q.split(1))


def test_coupling_in_products_with_respect_to_the_input():
    with pytest.raises(nnj.NNJError, match="influence one another"):
        nnj.jacobian(Coupled(), X)


# -- no harm ---------------------------------------------------------------------------------------


def test_a_retained_gradient_is_that_of_the_pass():
    model, loss = nnj.extend(net()), nnj.extend(nn.MSELoss())
    h = model[0](X)
    h.retain_grad()
    z = model[3](torch.tanh(model[1](h)))
    with nnj.collect("ggn_diag"):
        loss(z, T).backward()
    again = h.detach().requires_grad_()
    F.mse_loss(model[3](torch.tanh(model[1](again))), T).backward()
    assert torch.equal(h.grad, again.grad)


class Segment(nn.Module):
    """Under a checkpoint: counts its calls in a buffer, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def body(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1)
        return torch.sin(x) * x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False, preserve_rng_state=False)


def test_buffers_and_generators_over_a_checkpoint():
    found = []
    for verify in (False, True):
        model, loss = nnj.extend(net(Segment())), nnj.extend(nn.MSELoss())
        torch.manual_seed(1)
        with nnj.collect("ggn_diag", verify=verify):
            loss(model(X), T).backward()
        grads = [p.grad for p in model.parameters()]
        found.append([model[1].calls, torch.rand(1), model[0].weight.ggn_diag, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda value, params: torch.autograd.grad(value, params),
        lambda value, params: torch.autograd.grad(value, params, create_graph=True),
        lambda value, params: torch.autograd.grad(value, params[:1]),
        lambda value, params: value.backward(inputs=params[2:]),
        lambda value, params: value.backward(retain_graph=True),
        lambda value, params: value.backward(create_graph=True),
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_are_what_they_would_be(differentiate):
    outcomes = []
    for collecting in (False, True):
        model = net()
        params = list(model.parameters())
        if collecting:
            loss = nnj.extend(nn.MSELoss())
            nnj.extend(model)
            with nnj.collect("ggn_diag"):
                found = differentiate(loss(model(X), T), params)
        else:
            found = differentiate(F.mse_loss(model(X), T), params)
        outcomes.append([*(found or ()), *(p.grad for p in params)])
    for one, other in zip(*outcomes, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("n", [1, 2])
def test_few_samples(n):
    model, loss = nnj.extend(net(nn.ReLU())), nnj.extend(nn.MSELoss(reduction="sum"))
    with nnj.collect("batch_grad"):
        loss(model(X[:n]), T[:n]).backward()
    for p in model.parameters():
        if p.batch_grad is not None:
            torch.testing.assert_close(p.batch_grad.sum(0), p.grad)


def test_a_gradient_that_is_zero_but_for_rounding():
    """The bias of keys has none; what rounding leaves of it is no reason to refuse."""
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.query(x), self.key(x), self.value(x)
            return self.out((q @ k.mT).softmax(-1) @ v).mean(1)

    for dtype in (torch.float64, torch.float32):
        model, loss = nnj.extend(Attention().to(dtype)), nnj.extend(nn.CrossEntropyLoss())
        with nnj.collect("ggn_diag"):
            loss(model(torch.randn(5, 7, 4, dtype=dtype)), torch.tensor([0, 1, 2, 0, 1])).backward()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_jacobian_that_is_zero_but_for_rounding(norm):
    """Of a norm over one feature: the rounding of its forward pass is the same for every cotangent,
    so that no other one shows it to be what it is.
    """
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 1), norm(1), nn.Linear(1, 3)).double()
        model, loss = nnj.extend(model), nnj.extend(nn.MSELoss(reduction="sum"))
        with nnj.collect("ggn_diag"):
            loss(model(X), T).backward()
        assert (model[0].weight.ggn_diag < 1e-18).all()
        expected = 2 * model[1](model[0](X)).square().sum(0).expand(3, 1)
        torch.testing.assert_close(model[2].weight.ggn_diag, expected.detach())


def normed_and_averaged() -> nn.Sequential:
    """What the norm takes away is all that the average would see: the Jacobian in x is zero."""
    layers = [nn.InstanceNorm2d(2), nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_all_that_is_left_is_rounding(dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = normed_and_averaged().to(dtype), torch.randn(3, 2, 4, 4, dtype=dtype)
        assert nnj.jacobian(model, x).abs().max() < 10 * torch.finfo(dtype).eps


class Tiny(Scaling):
    """Scaling by so little that it could be rounding."""

    def __init__(self) -> None:
        super().__init__(4)
        self.weight = nn.Parameter(torch.full((4,), 1e-13).double())


def by_chance_and_tiny(m: Any, x: Tensor, y: Tensor) -> Any:
    class Random(nnj.Jacobian):
        def jvp(self, v: Tensor) -> Tensor:
            return v * m.weight.detach() * torch.rand(4).double()

        vjp = jvp

    return {"input": Random((4,), (4,), x), "weight": nnj.Diagonal(x)}


@pytest.mark.parametrize("first", [True, False])
def test_what_differs_each_time_is_no_rounding(first):
    """However small it is."""
    tiny = Tiny()
    layers = [tiny, Scaling(4)] if first else [Scaling(4), tiny]
    with rule_of(Tiny, by_chance_and_tiny):
        with pytest.raises(nnj.NNJError, match="does not say what this call does"):
            nnj.jacobian(nn.Sequential(*layers), X)


def test_a_residual_layer_is_not_blamed():
    """The engine adds up the branch and what goes past it; of neither is there a hook."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.branch = nn.Linear(4, 3), Scaling()
            self.after = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            return self.after(h + self.branch(h).tanh())

    torch.manual_seed(0)
    with rule_of(Scaling, twice):
        with pytest.raises(nnj.NNJError, match="'branch'.*another gradient at its input"):
            nnj.jacobian(Residual().double(), X)


# -- when it is asked ------------------------------------------------------------------------------


def test_once_for_each_structure():
    model, loss = pair()
    before = verification.runs
    with nnj.collect("ggn_diag"):
        for _ in range(3):
            loss(model(X), Y).backward()
    assert verification.runs == before + 1
    with nnj.collect("ggn_diag"):
        loss(model(X[:4]), Y[:4]).backward()
    assert verification.runs == before + 2
    for _ in range(2):
        nnj.jacobian(model, X[:3], "weight")
    assert verification.runs == before + 3
    nnj.fit(model, nn.CrossEntropyLoss(), [(X[:5], Y[:5])] * 3, "ggn_diag")
    assert verification.runs == before + 4


RETAINED = ["mlp", "cnn", "transformer", "checkpoint", "lstm", "autograd-function", "lm-tied"]


@pytest.mark.parametrize("name", RETAINED)
def test_once_for_all_passes_over_a_graph_that_is_kept(name):
    """What nnj itself runs on a graph is not taken for a hook that somebody put on it."""
    case = CASES[name]
    model, losses = extended(case)
    value, before = run(case, model, losses), verification.runs
    for _ in range(3):
        with nnj.collect("ggn_diag"):
            value.backward(retain_graph=True)
    assert verification.runs == before + 1


def test_a_hook_put_on_a_kept_graph_is_found():
    torch.manual_seed(0)
    first, last, loss = nn.Linear(4, 3).double(), nn.Linear(3, 3).double(), nn.CrossEntropyLoss()
    model = nnj.extend(nn.Sequential(first, nn.Tanh(), last))
    middle: list[Tensor] = []
    model[1].register_forward_hook(lambda _, x, y: middle.append(y))
    value = nnj.extend(loss)(model(X), Y)
    found = []
    for factor in (1.0, 2.0):
        if factor > 1:
            middle[0].register_hook(lambda g: 2.0 * g)
        with nnj.collect("ggn_diag"):
            value.backward(retain_graph=True)
        found.append(first.weight.ggn_diag)
    torch.testing.assert_close(found[1], 4 * found[0])


def test_a_verified_structure_calls_no_second_backward_pass(monkeypatch):
    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        monkeypatch.setattr(verification, "_Verification", None)
        loss(model(X), Y).backward()


def test_the_environment(monkeypatch):
    model, loss = pair()
    before = verification.runs
    for mode, times in (("never", 0), ("first", 1), ("always", 3)):
        monkeypatch.setenv("NNJ_VERIFY", mode)
        with nnj.collect("ggn_diag"):
            loss(model(X), Y).backward()
            loss(model(X), Y).backward()
        assert verification.runs == before + times
    monkeypatch.setenv("NNJ_VERIFY", "sometimes")
    with pytest.raises(nnj.NNJError, match="NNJ_VERIFY='sometimes'"), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()


def test_nothing_is_kept_of_a_model():
    import gc
    import weakref

    model, loss = pair()
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    nnj.jacobian(model, X)
    ref = weakref.ref(model)
    del model, loss
    gc.collect()
    assert ref() is None


def test_fit_passes_it_on():
    with rule_of(Scaling, twice):
        model = net()
        with pytest.raises(nnj.NNJError, match="nnj-odd"):
            nnj.fit(model, nn.MSELoss(), [(X, T)], "ggn_diag")
        nnj.fit(model, nn.MSELoss(), [(X, T)], "ggn_diag", verify=False)


def test_large_parameters(monkeypatch):
    """No share of theirs is formed."""
    monkeypatch.setattr(nnj.jacobians.outer_product.OuterProduct, "dense", None)
    model = nn.Linear(4, 3).double()
    backward(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_numbers(dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()] * 6
    model = nnj.extend(nn.Sequential(*layers, nn.Linear(16, 3)).to(dtype))
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss(model(torch.randn(40, 16, dtype=dtype)), torch.arange(40) % 3).backward()


def test_parameters_of_other_models_are_not_compared(monkeypatch):
    """All extended models are asked for; only one takes part."""
    other = nnj.extend(nn.Linear(300, 300))
    model, loss = nnj.extend(nn.Sequential(nn.Linear(3, 2))), nnj.extend(nn.MSELoss())
    seen, run = [], verification._Verification.run
    monkeypatch.setattr(
        verification._Verification, "run", lambda v, *given: (seen.append(v.leaves), run(v, *given))
    )
    with nnj.collect("ggn_diag"):
        loss(model(torch.randn(4, 3)), torch.randn(4, 2)).backward()
    (leaves,) = seen
    assert set(leaves) == set(model.parameters()) and other.weight not in set(leaves)
