"""What extend and collect leave behind: hooks, copies, state dicts, and nothing alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nnj
from tests.support.cases import CASES, MLP, Case, vectors
from tests.support.collecting import QUANTITIES, T, X, Y, base, intact, pair, same
from tests.support.oracle import Truth, build, data_of

# -- extend, retract, copies -----------------------------------------------------------------------


def hooks(module: nn.Module) -> list[dict[Any, Any]]:
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_state_dict_hooks",
    )
    return [dict(getattr(part, name)) for part in module.modules() for name in names]


def test_extend_and_retract():
    model, loss, function = build(base()), nn.CrossEntropyLoss(), F.cross_entropy
    keys, before = [list(vars(part)) for part in model.modules()], hooks(model)
    mine = model.one.register_forward_hook(lambda *args: None)
    with_mine = hooks(model)
    for _ in range(2):
        assert nnj.extend(model) is model and nnj.extend(loss) is loss
    once = nnj.extend(function)
    assert (
        isinstance(once, nn.Module) and nnj.extend(once) is once and len(once._forward_hooks) == 1
    )
    assert torch.equal(once(T, Y), F.cross_entropy(T, Y))
    assert nnj.retract(model) is model and nnj.retract(loss) is loss
    assert hooks(model) == with_mine
    mine.remove()
    assert (
        hooks(model) == before
        and not any(hooks(loss))
        and [list(vars(part)) for part in model.modules()] == keys
    )
    with pytest.raises(nnj.NNJError, match="nothing was collected"), nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    nnj.extend(model), nnj.extend(loss)
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("collected", [False, True])
def test_copies(how, collected):
    model, loss = pair()
    if collected:
        with nnj.collect("ggn_diag", "ggn_block"):
            loss(model(X), Y).backward()
    other, other_loss = COPIES[how](model), COPIES[how](loss)
    with nnj.collect("ggn_diag", "ggn_block"):
        other_loss(other(X), Y).backward()
    same(other, Truth(base()))
    assert not collected or getattr(model.one.weight, "ggn_diag", None) is None, (
        "a new `with` removes those of the same name"
    )
    nnj.retract(other)
    assert not any(hooks(other))
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_state_dicts():
    model, loss = pair()
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X), Y).backward()
    state = saved(model.state_dict())
    assert list(state) == list(build(base()).state_dict())
    fresh = MLP().double()
    fresh.load_state_dict(state)
    model.load_state_dict(state)
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    same(model, Truth(base()))


def test_moved_to_another_dtype_after_extend():
    model, loss = pair()
    model.float()
    with nnj.collect("ggn_diag", "ggn_block"):
        loss(model(X.float()), Y).backward()
    for name, p in model.named_parameters():
        assert p.ggn_diag.dtype == torch.float32
        torch.testing.assert_close(
            p.ggn_diag.double(), Truth(base()).diag(name), rtol=1e-4, atol=1e-7
        )


# -- nothing is kept -------------------------------------------------------------------------------


def leaky_step(model: nn.Module, loss: nn.Module, how: str) -> weakref.ref[Any]:
    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    z = model(X.clone())
    value = loss(z, Y)
    handle = None
    try:
        with nnj.collect(*QUANTITIES):
            if how == "refused":
                (-value).backward()
            elif how == "raised":
                handle = model.one.weight.register_hook(fail)
                value.backward()
            elif how == "no backward":
                loss(model(X), Y).backward()
            elif how == "retained":
                value.backward(retain_graph=True)
            else:
                value.backward()
    except (nnj.NNJError, ZeroDivisionError) as error:
        error.__traceback__ = None
    if handle is not None:
        handle.remove()
    return weakref.ref(z)


@pytest.mark.parametrize("how", ["backward", "retained", "no backward", "refused", "raised"])
@pytest.mark.parametrize("name", ["", "checkpoint", "transformer", "token-major-mixed"])
def test_nothing_is_kept_alive(how, name):
    case = CASES[name] if name else base()
    model, loss = pair(case)
    if name:
        model = nnj.extend(nn.ModuleDict({"one": nn.Linear(1, 1).double()}))
        inner, loss = pair(case)
        x, y = data_of(case)

        class Call(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner
                self.one = Holder(next(inner.parameters()))

            def forward(self, _: Tensor) -> Tensor:
                return self.inner(x)

        model, target = Call(), y
        real = loss
        loss = lambda z, _: real(z, target)  # type: ignore[assignment]
    count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(2):
        ref = leaky_step(model, loss, how)
    gc.collect()
    assert ref() is None
    before = count()
    for _ in range(10):
        leaky_step(model, loss, how)
    gc.collect()
    assert count() <= before


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


def test_results_hold_no_graph():
    model, loss = pair()
    z = model(X)
    ref = weakref.ref(z)
    gc.disable()
    try:
        with nnj.collect(*QUANTITIES):
            loss(z, Y).backward()
        del z
        assert ref() is None, "freed without the garbage collector"
    finally:
        gc.enable()
    for p in model.parameters():
        assert all(
            not getattr(p, q).requires_grad for q in ("ggn_diag", "ggn_diag_mc", "batch_grad")
        )


@pytest.mark.parametrize("wrong", [3, "model", nn.Linear, [nn.Linear(1, 1)], None])
def test_what_extend_does_not_take(wrong):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module or a function"):
        nnj.extend(wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "order", ["extend the compiled", "compile the extended", "compile in place", "compile a part"]
)
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
        from tests.support.oracle import Truth, close

        truth = Truth(Case("", MLP, vectors))
        assert all(close(p.ggn_diag, truth.diag(n)) == "" for n, p in model.named_parameters())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch._dynamo.reset()


class OwnLoss(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()


def test_a_script_of_an_extended_model():
    """torch compiles the hooks of a module; that it cannot is said, and how to go on."""
    model = nnj.extend(build(base()))
    with pytest.raises(
        nnj.NNJError, match=r"^torch\.jit\.script compiles the hooks .*nnj\.retract"
    ):
        torch.jit.script(model)
    hook = next(iter(model.one._forward_hooks.values()))
    assert not hasattr(hook, "__name__") and getattr(hook, "__name__", "none") == "none"
    scripted = torch.jit.script(nnj.retract(model))
    assert torch.equal(scripted(X), nnj.extend(model)(X))


@pytest.mark.parametrize(
    "make",
    [nn.CrossEntropyLoss, OwnLoss],
    ids=["of torch", "of one's own"],
)
def test_a_script_of_an_extended_loss(make):
    loss = nnj.extend(make(), loss=True)
    with pytest.raises(
        nnj.NNJError, match=r"^torch\.jit\.script compiles the hooks .*nnj\.retract"
    ):
        torch.jit.script(loss)
    torch.jit.script(nnj.retract(loss))
