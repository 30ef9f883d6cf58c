"""When a record speaks for its call, and why it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from nnj.graph import acceptance
from nnj.graph.acceptance import BY_PRODUCTS, UNRECORDED, Accepted, accept
from nnj.registry.layer_rules import Declined

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Weighted(nn.Module):
    """The fallback's, with a tensor that belongs to it or to another layer."""

    def __init__(self, w: Tensor | None = None):
        super().__init__()
        self.own = nn.Parameter(torch.randn(4))
        self.others = [w]

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.own.tanh()).sin()
        return y if self.others[0] is None else y * self.others[0]


def answer(module: nn.Module, x: Tensor = X) -> Accepted | Declined:
    """What is said of a call of a module at an input that needs a gradient."""
    x = x.clone().requires_grad_() * 1
    y = nnj.extend(module)(x)
    return accept(y.grad_fn, y.output_nr, {module: "path"})


def test_a_record_that_is_accepted():
    module = nn.Linear(4, 2)
    said = answer(module)
    assert isinstance(said, Accepted)
    assert said.record.module is module and said.dtype is torch.float32
    assert list(said.jacobians) == ["input", "weight", "bias"]
    assert said.parameters == dict(module.named_parameters())


def test_the_fallback_is_accepted_where_autograd_agrees():
    assert isinstance(answer(Weighted()), Accepted)


class Uses(nn.Module):
    """A layer of a stranger that uses a matrix in some way."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(4, 4)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


ENTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, w: x @ w,
    "transposed, in rows": lambda x, w: torch.addmm(w[0, :2], x, w[2:].t()).tanh(),
    "scale": lambda x, w: x[:, None].mul(w).sum(1),
    "attention": lambda x, w: F.scaled_dot_product_attention(*[(x @ w)[:, None, None]] * 3)[
        :, 0, 0
    ],
}
COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda x, w: x @ w.softmax(0),
    "its own square": lambda x, w: x @ (w @ w),
    "one of two is": lambda x, w: (x @ w) @ w.exp(),
    "bilinear": lambda x, w: torch.einsum("ni,kij,nj->nk", x, w.reshape(1, 4, 4), x),
    "not trusted": lambda x, w: (x * w[0]).renorm(2, 0, 1e3),
}


@pytest.mark.parametrize("use", ENTERS.values(), ids=ENTERS)
def test_nodes_speak_where_weights_meet_the_data(use):
    """They cost less than the fallback, which computes the call anew for each sample."""
    assert answer(Uses(use)) == Declined(BY_PRODUCTS)


def test_the_fallback_speaks_where_another_axis_is_as_long():
    """It says that the samples are along axis 0, which nodes do not."""
    assert isinstance(answer(Uses(lambda x, w: x @ w), torch.randn(3, 3, 4)), Accepted)
    assert answer(Uses(lambda x, w: x @ w), torch.randn(3, 2, 4)) == Declined(BY_PRODUCTS)


@pytest.mark.parametrize("use", COMPUTED.values(), ids=COMPUTED)
def test_the_fallback_speaks_where_weights_are_computed(use):
    assert isinstance(answer(Uses(use)), Accepted)


def overwritten() -> Any:
    x = X.clone().requires_grad_() * 1
    y = nnj.extend(nn.GELU())(x)
    x.detach().add_(1)
    return accept(y.grad_fn, 0, {})


def without_input(m: nn.Module, x: Tensor, y: Tensor) -> dict[str, nnj.Jacobian]:
    return {}


class Forgetful(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def forgetful() -> Any:
    class Plugin:
        @nnj.hookimpl
        def nnj_register_layers(self, register: Any) -> None:
            register(Forgetful, without_input)

    from nnj.registry.manager import use

    manager = nnj.PluginManager(load=False)
    manager.register(Plugin(), "forgetful")
    former = use(manager)
    try:
        return answer(Forgetful())
    finally:
        use(former)


def hooked_gradient() -> nn.Module:
    module = Weighted()
    module.own.register_hook(lambda g: 2 * g)
    return module


@pytest.mark.parametrize(
    "ask, reason",
    [
        (lambda: accept((X.requires_grad_() * 2).grad_fn, 0, {}), UNRECORDED.reason),
        (overwritten, "what its rule reads was written over in place"),
        (lambda: answer(nn.MaxPool2d(2), torch.randn(2, 1, 4, 4)), "autograd's node has saved"),
        (lambda: answer(nn.Dropout(0.5)), "the mask of this call is known to autograd's node"),
        (forgetful, "its rule does not know its input"),
        (
            lambda: answer(Weighted(nn.Parameter(torch.randn(4)))),
            "for each sample alone it is not what autograd says",
        ),
    ],
    ids=["no record", "overwritten", "max pool", "rule", "no input", "another's tensor"],
)
def test_why_a_record_is_not_accepted(ask, reason):
    said = ask()
    assert isinstance(said, Declined) and said.reason.startswith(reason)


def test_parameters_that_are_narrower_than_what_they_gave():
    module = nn.Linear(4, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = answer(module)
    assert said == Declined("its parameters are narrower than its tensors")


def test_a_call_of_too_many_nodes(monkeypatch):
    monkeypatch.setattr(acceptance, "LARGEST_CALL", 2)
    assert isinstance(answer(Weighted()), Declined)


def test_a_refusal_names_the_layer():
    with pytest.raises(nnj.NNJError, match="^layer 'path': BatchNorm1d in training mode"):
        answer(nn.BatchNorm1d(4))
