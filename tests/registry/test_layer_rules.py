"""Which rule describes a module, and what it may answer."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import nnj
from nnj.registry.claim import DISABLED
from nnj.registry.layer_rules import Declined, Described, ask_rule, checked, find_rule
from nnj.registry.manager import PluginManager, manager, use
from nnj.testing import check_layer, layer_jacobians
from nnj_plugins.quantities import batch_grad
from tests.support.distributions import Plugin, Squash, load, twice

# -- which rule describes a module -----------------------------------------------------------------


@pytest.fixture
def rules():
    """`rules(cls, rule)`: a manager in use that knows only this."""
    former = manager()

    def only(cls, rule, name="nnj-squash", **options) -> None:
        mine = PluginManager(load=False)
        mine.register(Plugin(lambda register: register(cls, rule, **options)), name)
        use(mine)

    yield only
    use(former)


class Renamed(nn.Linear):
    """Overrides nothing that matters."""

    def __init__(self, size: int):
        super().__init__(size, size, bias=False)

    def extra_repr(self) -> str:
        return "renamed"


class Named:
    """A mixin with an attribute of its own, and a table for it."""

    name = ""


class Mixed(Named, nn.Linear):
    """Takes nothing from the mixin that a layer has."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Grandchild(Doubled):
    """Inherits a forward that is not nn.Linear's."""


def test_a_rule_holds_for_its_class_and_harmless_subclasses(rules):
    rules(nn.Linear, twice)
    check_layer(nn.Linear(4, 3, bias=False), torch.randn(5, 4))
    check_layer(Renamed(4), torch.randn(5, 4))
    check_layer(Mixed(4, 3, bias=False), torch.randn(5, 4))


def replaced() -> nn.Module:
    module = nn.Linear(4, 3, bias=False)
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)
    return module


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 3, bias=False), "weight", amount=0.5)


def old_weight_norm() -> nn.Module:
    module = nn.Linear(4, 3, bias=False)
    weight = module._parameters.pop("weight")  # as torch.nn.utils.weight_norm does
    module.register_parameter("weight_v", nn.Parameter(weight.detach()))
    module.weight = module.weight_v * 2
    return module


NOT_ITS_CLASS = {
    "a subclass overrides forward": lambda: Doubled(4, 3, bias=False),
    "a parent overrides forward": lambda: Grandchild(4, 3, bias=False),
    "an instance has another forward": replaced,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3, bias=False)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3, bias=False)),
}


@pytest.mark.parametrize("make", NOT_ITS_CLASS.values(), ids=NOT_ITS_CLASS)
def test_a_module_is_not_taken_for_its_class(rules, make):
    rules(nn.Linear, twice)
    module = make()
    assert find_rule(module) is None
    with pytest.raises(nnj.NNJError, match=rf"^no plugin knows {type(module).__name__} "):
        check_layer(module, torch.randn(5, 4))


@pytest.mark.parametrize("make", [pruned, old_weight_norm])
def test_a_weight_that_is_no_parameter(rules, make):
    """What a rule says of `weight` is not taken where the parameter is another one: it is left to
    others, or refused.
    """
    rules(nn.Linear, twice)
    module, x = make(), torch.randn(5, 4)
    entry = find_rule(module)
    try:
        assert entry is None or isinstance(ask_rule(entry, module, x, module(x).detach()), Declined)
    except nnj.PluginError as error:
        assert (
            "the rule names 'weight', which is neither 'input' nor a parameter of the layer"
            in str(error)
        )


def test_an_unknown_layer(fakes, monkeypatch):
    fakes.claim("nnj-linear")
    fakes.claim("nnj-fallback", "torch.nn.Module")
    monkeypatch.setenv(DISABLED, "nnj-fallback")
    former = use(load())
    try:
        with pytest.raises(nnj.NNJError) as caught:
            check_layer(nn.GELU(), torch.randn(2, 3))
    finally:
        use(former)
    assert str(caught.value) == (
        "no plugin knows GELU ('GELU'). Installed: nnj-linear (disabled: nnj-fallback). "
        "Enable what is disabled, or write a rule for it (see nnj.registry.hookspecs)"
    )


def test_the_nearest_class_has_the_rule(rules):
    rules(nn.Module, lambda m, x, y: {})
    assert manager().find("layer", nn.Linear).key is nn.Module
    manager().register(Plugin(lambda register: register(nn.Linear, twice)))
    assert manager().find("layer", nn.Linear).key is nn.Linear
    assert manager().find("layer", nn.ReLU).key is nn.Module
    assert manager().find("layer", int) is None


# -- what a rule answers ---------------------------------------------------------------------------


class Short(nnj.Jacobian):
    """The vjp forgets the last entry."""

    def dense(self) -> Tensor:
        return layer_jacobians(Squash(), self.like)["input"]

    def vjp(self, u: Tensor) -> Tensor:
        return super().vjp(u)[..., :-1]


def eye(x: Tensor, outputs: int = 4) -> Tensor:
    return torch.eye(outputs, 4, dtype=x.dtype).expand(len(x), -1, -1)


@pytest.mark.parametrize(
    "rule, message",
    [
        (lambda m, x, y: [], "the rule returned list, expected a dict of Jacobians"),
        (
            lambda m, x, y: {"inputs": nnj.Dense(eye(x), (4,), (4,))},
            "the rule names 'inputs', which is neither 'input' nor a parameter of the layer",
        ),
        (lambda m, x, y: {"input": eye(x)}, "'input' is Tensor, expected a nnj.Jacobian"),
        (
            lambda m, x, y: {"input": nnj.Dense(eye(x, 3), (4,), (3,))},
            "'input' maps (4,) to (3,) for 5 rows, expected (4,) to (4,) for 5",
        ),
        (
            lambda m, x, y: {"input": nnj.Dense(eye(x[:2]), (4,), (4,))},
            "'input' maps (4,) to (4,) for 2 rows, expected (4,) to (4,) for 5",
        ),
        (
            lambda m, x, y: {"input": x.nothing},
            "the rule failed with AttributeError: 'Tensor' object has no attribute 'nothing'",
        ),
    ],
    ids=["list", "slot", "tensor", "outputs", "rows", "failure"],
)
def test_an_answer_that_is_none(rules, rule, message):
    rules(Squash, rule)
    module, x = Squash(), torch.randn(5, 4)
    with pytest.raises(nnj.PluginError) as caught:
        ask_rule(find_rule(module), module, x, module(x), {module: "head"})
    assert str(caught.value) == f"plugin 'nnj-squash' (layer 'head'): {message}"
    with pytest.raises(
        nnj.PluginError, match=re.escape(f"plugin 'nnj-squash' (layer 'Squash'): {message}")
    ):
        check_layer(module, x)


class Mine(BaseException):
    pass


@pytest.mark.parametrize("error", [SystemExit(3), Mine(3)])
def test_a_rule_that_would_end_the_program(rules, error):
    def rule(m, x, y):
        raise error

    rules(Squash, rule)
    message = (
        rf"^plugin 'nnj-squash' \(layer 'Squash'\): the rule failed with {type(error).__name__}: 3"
    )
    with pytest.raises(nnj.PluginError, match=message):
        nnj.jacobian(Squash(), torch.randn(5, 4))


def test_the_shape_of_a_product():
    who = "plugin 'nnj-squash' (layer 'head')"
    right = torch.zeros(5, 4)
    assert checked("vjp of 'input'", right, (5, 4), who) is right
    for wrong, found in ((torch.zeros(5, 3), r"\(5, 3\)"), (None, "NoneType")):
        with pytest.raises(
            nnj.PluginError,
            match=rf"^{re.escape(who)}: vjp of 'input' returned {found}, expected \(5, 4\)$",
        ):
            checked("vjp of 'input'", wrong, (5, 4), who)


def test_products_of_another_shape(rules):
    rules(Squash, lambda m, x, y: {"input": Short((4,), (4,), x)})
    message = (
        r"^plugin 'nnj-squash' \(layer 'Squash'\).*vjp.* returned \(3, 5, 3\), expected \(3, "
        r"5, 4\)$"
    )
    with pytest.raises(nnj.PluginError, match=message):
        check_layer(Squash(), torch.randn(5, 4))


def test_a_rule_that_is_wrong(rules):
    rules(Squash, lambda m, x, y: {"input": nnj.Dense(eye(x), (4,), (4,))})
    with pytest.raises(AssertionError, match=r"plugin 'nnj-squash' .*'input': vjp is wrong"):
        check_layer(Squash(), torch.randn(5, 4))


def test_a_rule_that_declines(rules):
    def rule(m, x, y):
        raise NotImplementedError("odd option")

    rules(Squash, rule)
    module, x = Squash(), torch.randn(5, 4)
    assert isinstance(ask_rule(find_rule(module), module, x, module(x)), Declined)
    with pytest.raises(AssertionError, match="^Squash: its rule declines it: odd option$"):
        check_layer(module, x)


def test_a_rule_that_leaves_out_a_parameter_is_not_taken(rules):
    rules(nn.Linear, twice)
    module, x = nn.Linear(4, 3), torch.randn(5, 4)
    declined = ask_rule(find_rule(module), module, x, module(x))
    assert isinstance(declined, Declined)
    assert declined.reason == "its rule gives no Jacobian in bias"
    module.bias.requires_grad_(False)
    assert isinstance(ask_rule(find_rule(module), module, x, module(x)), Described)


def test_a_rule_sees_what_it_uses(rules):
    seen = []
    rules(Squash, lambda m, x, y: seen.append((x.device.type, y.device.type)) or {}, uses="y")
    module, x = Squash(), torch.randn(5, 4)
    ask_rule(find_rule(module), module, x, module(x))
    assert seen == [("meta", "cpu")]


def test_a_rule_that_reads_more_than_it_says(rules):
    rules(Squash, lambda m, x, y: {"input": nnj.Diagonal(x + y)}, uses="y")
    message = (
        r"failed with .* \(it was registered with uses='y', so that .* the shape alone of x\)$"
    )
    with pytest.raises(nnj.PluginError, match=message):
        check_layer(Squash(), torch.randn(5, 4))


# -- what was known of a module at its last call ---------------------------------------------------


def reparametrized(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def given_another_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: torch.tanh(nn.Linear.forward(layer, x))


def made_another_class(layer: nn.Linear) -> None:
    layer.__class__ = Doubled


def cut(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize("change", [reparametrized, given_another_forward, made_another_class, cut])
def test_a_layer_that_became_another_since_its_last_call(change):
    model = nnj.extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    x = torch.randn(5, 4).double()
    for _ in range(2):
        model(x)
    change(model[0])
    nnj.testing.check_model(model, nn.MSELoss(), x, torch.randn(5, 2).double())


def test_a_rule_that_came_after_the_first_call(rules):
    layer = nnj.extend(nn.Linear(4, 3, bias=False))
    layer(torch.randn(5, 4))
    seen = []
    rules(nn.Linear, lambda m, x, y: seen.append(m) or twice(m, x, y))
    manager().register(batch_grad, "nnj-batch-grad")
    with nnj.collect("batch_grad"):
        nnj.extend(nn.MSELoss())(layer(torch.randn(5, 4)), torch.randn(5, 3)).backward()
    assert seen


class Averages(nn.Module):
    """One number for each channel, the same for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))[:, None, None].expand(-1, x.shape[1], 1)


def test_channels_that_are_said_to_be_apart_and_are_not(rules):
    def rule(m, x, y):
        forward = lambda v: v.mean((1, 2))[:, None, None].expand(-1, x.shape[1], 1)
        adjoint = lambda u: (u.mean((1, 2)) / x.shape[2])[:, None, None].expand(-1, *x.shape[1:])
        j = nnj.LinearMap(forward, adjoint, x.shape[1:], y.shape[1:], x, by_channel=True)
        return {"input": j}

    rules(Averages, rule)
    with pytest.raises(AssertionError, match="spreads, channel by channel"):
        check_layer(Averages(), torch.randn(3, 5, 7))


def test_check_layer_finds_a_result_that_is_not_memory_of_its_own(rules):
    def rule(m, x, y):
        shapes = x.shape[1:], y.shape[1:]
        return {"input": nnj.LinearMap(lambda v: v, lambda u: u, *shapes, x, makes_new=True)}

    rules(nn.Identity, rule)
    with pytest.raises(AssertionError, match="makes_new, the cotangent"):
        check_layer(nn.Identity(), torch.randn(3, 4))
