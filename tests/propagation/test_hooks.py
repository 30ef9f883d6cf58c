"""Columns go through hooks that are linear; all others are refused. The truth is that of a model in
which the hook is written as a function, or of rows of J with the hook done to each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import nnj
from nnj.propagation import hooks, verification
from tests.support.cases import MLP
from tests.support.collecting import X, Y
from tests.support.oracle import Dense, close, dense

Hook = Callable[[Tensor], Any]
QUANTITIES = ("ggn_diag", "ggn_block", "batch_grad")
HIDDEN, OUT = 5, 3
MIX = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
WEIGHTS = torch.linspace(0.5, 2, len(X)).double()
MASK = (torch.arange(HIDDEN * 4).reshape(HIDDEN, 4) % 3 > 0).double()


class Written(torch.autograd.Function):
    """The identity, with a hook as its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, hook):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.hook = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return ctx.hook(g), None


class Net(MLP):
    """A hook on the hidden tensor, and one on the output."""

    def __init__(self, hidden: Hook | None = None, out: Hook | None = None, written: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.three = nn.Linear(HIDDEN, OUT)
        self.hidden, self.out, self.written = hidden, out, written
        self.double()

    def hooked(self, t: Tensor, hook: Hook | None) -> Tensor:
        if hook is None:
            return t
        if self.written:
            return Written.apply(t, hook)
        if t.requires_grad:
            t.register_hook(hook)
        return t

    def forward(self, x: Tensor) -> Tensor:
        h = self.hooked(self.one(x), self.hidden)
        z = self.three(torch.tanh(self.two(torch.tanh(h))))
        return self.hooked(z, self.out)


def truth(model: nn.Module) -> Dense:
    """That of a model without hooks."""
    of: Any = lambda z: nn.functional.cross_entropy(z[0], Y)
    return dense(model, lambda run: [run(X)], of, torch.arange(len(X)).repeat_interleave(OUT))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Torch's own."""
    model.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def collected(model: nn.Module, **options: Any) -> None:
    model, loss = nnj.extend(model), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*QUANTITIES, **options):
        loss(model(X), Y).backward()


def check(model: nn.Module, expected: Dense, times: int = 1) -> None:
    for name, p in model.named_parameters():
        assert close(p.ggn_diag, times * expected.diag(name)) == "", name
        assert p.grad is not None
        if times == 1:
            assert close(p.batch_grad, expected.batch_grad(name)) == "", name
            assert close(p.batch_grad.sum(0), p.grad) == "", name
    for path, m in model.named_modules():
        names = [f"{path}.{name}".strip(".") for name, _ in m.named_parameters(recurse=False)]
        if names:
            assert close(m.ggn_block, times * expected.block(names)) == "", path


LINEAR: dict[str, Hook] = {
    "a factor": lambda g: 2 * g,
    "a mask": lambda g: g * (torch.arange(g.shape[-1]) % 2),
    "a weight of each sample": lambda g: g * WEIGHTS[:, None],
    "a mean": lambda g: g - g.mean(-1, keepdim=True),
    "a matrix": lambda g: g @ MIX[: g.shape[-1], : g.shape[-1]],
    "nothing": lambda g: torch.zeros_like(g),
}


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("where", ["hidden", "out"])
@pytest.mark.parametrize("hook", LINEAR.values(), ids=LINEAR)
def test_a_linear_hook_on_a_tensor(hook, where, memory):
    model = Net(**{where: hook})
    grads = gradients(model)
    collected(model, memory=memory)
    check(model, truth(Net(**{where: hook}, written=True)))
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, grads[name])


def test_hooks_on_several_tensors():
    both = {"hidden": LINEAR["a matrix"], "out": LINEAR["a factor"]}
    model = Net(**both)
    collected(model)
    check(model, truth(Net(**both, written=True)))


def test_what_else_hooks_see_of_it():
    """They are given plain gradients of the tensor's shape, and .grad that is retained stays."""
    seen: list[Tensor] = []
    kept: list[Tensor] = []

    def hook(g: Tensor) -> Tensor:
        seen.append(g)
        return g @ MIX

    class Retaining(Net):
        def hooked(self, t: Tensor, hook: Hook | None) -> Tensor:
            found = super().hooked(t, hook)
            if hook is not None:
                found.retain_grad()
                kept.append(found)
            return found

    model = Retaining(hook)
    gradients(model)
    collected(model)
    assert torch.equal(kept[0].grad, kept[1].grad)
    assert len(seen) > 4 and all(type(g) is Tensor and g.shape == (6, HIDDEN) for g in seen)
    assert all(g.isfinite().all() for g in seen)


# -- parameters ------------------------------------------------------------------------------------

OF_WEIGHTS: dict[str, Hook] = {
    "a mask": lambda g: g * MASK,
    "a factor": lambda g: 0.5 * g,
    "centred": lambda g: g - g.mean(0),
}


def behind(expected: Dense, name: str, hook: Hook) -> Dense:
    """Rows of J behind a hook."""
    expected.jacobian[name] = vmap(hook)(expected.jacobian[name])
    return expected


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("hook", OF_WEIGHTS.values(), ids=OF_WEIGHTS)
def test_a_hook_on_a_parameter(hook, memory):
    """batch_grad is what arrives at .grad."""
    model = Net()
    model.one.weight.register_hook(hook)
    collected(model, memory=memory)
    check(model, behind(truth(Net()), "one.weight", hook))


@pytest.mark.parametrize("name", ["three.weight", "three.bias"])
def test_a_hook_on_a_parameter_of_the_last_layer(name):
    model, hook = Net(), lambda g: g * torch.arange(1, OUT + 1).reshape(-1, *[1] * (g.dim() - 1))
    model.get_parameter(name).register_hook(hook)
    collected(model)
    check(model, behind(truth(Net()), name, hook))


class Bare(nn.Module):
    """Parameters without a layer: of a product that is used twice, and of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4).double())
        self.b = nn.Parameter(torch.randn(4).double())
        self.three = nn.Linear(4, OUT).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(torch.tanh(x @ self.w + self.b.exp()) @ self.w))


@pytest.mark.parametrize("name", ["w", "b"])
@pytest.mark.parametrize("hook", [lambda g: g * torch.arange(4), lambda g: g.cumsum(-1)])
def test_a_hook_on_a_bare_parameter(name, hook):
    model = Bare()
    model.get_parameter(name).register_hook(hook)
    collected(model)
    check(model, behind(truth(Bare()), name, hook))


# -- from pass to pass -----------------------------------------------------------------------------


def test_a_hook_comes_changes_and_goes():
    """What a hook does is no part of a graph's structure, and is asked in each pass."""
    torch.manual_seed(0)
    model, loss = nnj.extend(Net()), nnj.extend(nn.CrossEntropyLoss())
    handle: Any = None
    for hook in (None, OF_WEIGHTS["a mask"], OF_WEIGHTS["centred"], lambda g: 1 * g, None):
        if handle is not None:
            handle.remove()
        handle = None if hook is None else model.one.weight.register_hook(hook)
        for _ in range(2):
            model.zero_grad()
            with nnj.collect(*QUANTITIES):
                loss(model(X), Y).backward()
            expected = truth(Net())
            check(model, expected if hook is None else behind(expected, "one.weight", hook))


def test_a_hook_on_a_tensor_changes_and_goes():
    torch.manual_seed(0)
    model, loss = nnj.extend(Net(LINEAR["a factor"])), nnj.extend(nn.CrossEntropyLoss())
    for hook in (LINEAR["a factor"], LINEAR["a matrix"], None, LINEAR["a mask"]):
        model.hidden = hook
        model.zero_grad()
        with nnj.collect(*QUANTITIES):
            loss(model(X), Y).backward()
        check(model, truth(Net(hook, written=True)))


def test_a_hook_on_a_tensor_of_a_structure_that_is_known():
    """By how many hooks are registered from the call to the backward pass it is another one."""
    torch.manual_seed(0)
    model, loss = nnj.extend(Net()), nnj.extend(nn.CrossEntropyLoss())
    before = verification.runs
    for hook, runs in ((None, 1), (None, 1), (LINEAR["a factor"], 2), (None, 2)):
        model.hidden = hook
        model.zero_grad()
        with nnj.collect(*QUANTITIES):
            loss(model(X), Y).backward()
        check(model, truth(Net(hook, written=True)))
        assert verification.runs == before + runs
    model.hidden, out = None, model(X)
    out.register_hook(NOT_LINEAR["clamped"]())
    with pytest.raises(nnj.NNJError, match="is not linear"), nnj.collect("ggn_diag"):
        loss(out, Y).backward()


def test_passes_add_up():
    model, loss = nnj.extend(Net(LINEAR["a mean"])), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*QUANTITIES):
        for _ in range(2):
            loss(model(X), Y).backward()
    check(model, truth(Net(LINEAR["a mean"], written=True)), 2)


def test_without_hooks_nothing_is_looked_for(monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("hooks were looked for")

    monkeypatch.setattr(verification, "find_hooks", fail)
    model = Net(lambda g: None)
    collected(model)
    check(model, truth(Net()))


class Equilibrium(nn.Module):
    """z = w z + x, with the gradient of the fixed point in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5).double())

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.detach()
        z = self.w * (x / (1 - w)) + x
        z.register_hook(lambda g: g / (1 - w))
        return z


def test_a_deep_equilibrium():
    """z = x / (1 - w), so that dz/dw = x / (1 - w)^2."""
    model, loss = nnj.extend(Equilibrium()), nnj.extend(nn.MSELoss(reduction="sum"))
    x = torch.ones(3, 1).double()
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(x), torch.zeros_like(x)).backward()
    assert model.w.grad == 48
    assert close(model.w.ggn_diag, torch.tensor(96.0).double()) == ""
    assert close(model.w.batch_grad, torch.full((3,), 16.0).double()) == ""


# -- what is refused -------------------------------------------------------------------------------


class Counting:
    """A factor that is another one each time."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, g: Tensor) -> Tensor:
        self.times += 1
        return g * self.times


NOT_LINEAR: dict[str, Callable[[], Hook]] = {
    "clamped": lambda: lambda g: g.clamp(-1e-3, 1e-3),
    "normalised": lambda: lambda g: g / g.norm(),
    "clipped": lambda: lambda g: g * (1 / g.norm()).clamp(max=0.5),
    "positive": lambda: lambda g: g.clamp(min=0),
    "noisy": lambda: lambda g: g + torch.randn_like(g),
    "dropped": lambda: lambda g: nn.functional.dropout(g, 0.5),
    "decayed": lambda: lambda g: g + 0.1,
    "counting": Counting,
}


@pytest.mark.parametrize("where", ["hidden", "out", "parameter"])
@pytest.mark.parametrize("make", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_a_hook_that_is_not_linear(make, where):
    model = Net() if where == "parameter" else Net(**{where: make()})
    if where == "parameter":
        model.one.weight.register_hook(make())
    said = "on parameter 'one.weight'" if where == "parameter" else "on the output of layer"
    with pytest.raises(nnj.NNJError, match=f"a gradient hook {said}.*is not linear"):
        collected(model)
    assert not hasattr(model.one.weight, "ggn_diag")


@pytest.mark.parametrize(
    "hook", [lambda g: g - g.mean(0), lambda g: g.flip(0), lambda g: g + g.sum(0)]
)
@pytest.mark.parametrize("where", ["hidden", "out"])
def test_a_hook_that_mixes_samples(hook, where):
    model = Net(**{where: hook})
    with pytest.raises(nnj.NNJError, match="samples influence one another by a gradient hook"):
        collected(model)


class Once(Net):
    """A hook that removes itself, as those of deep equilibria do, whose solver comes by them."""

    def hooked(self, t: Tensor, hook: Hook | None) -> Tensor:
        def once(g: Tensor) -> Any:
            self.handle.remove()
            return None if hook is None else hook(g)

        if hook is not None:
            self.handle = t.register_hook(once)
        return t


@pytest.mark.parametrize("name", LINEAR)
def test_a_hook_that_removes_itself(name):
    """It is there each time that nnj asks, and for .grad."""
    model = Once(LINEAR[name])
    grads = gradients(model)
    for _ in range(2):
        model.zero_grad()
        collected(model)
        check(model, truth(Net(LINEAR[name], written=True)))
        assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_one_that_is_refused_is_there_for_the_gradient(name):
    made = NOT_LINEAR[name]
    torch.manual_seed(0)
    model = Once(made())
    torch.manual_seed(5)
    grads = gradients(model)
    model.hidden = made()
    model.zero_grad()
    torch.manual_seed(5)
    with pytest.raises(nnj.NNJError, match="on the output of layer 'one' is not linear"):
        collected(model)
    if name != "counting":  # what it counts nobody can give back
        assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_of_two_hooks_the_one_at_fault_is_named():
    model = Net(LINEAR["a factor"], NOT_LINEAR["clamped"]())
    with pytest.raises(nnj.NNJError, match="on the output of layer 'three' is not linear"):
        collected(model)


def test_a_hook_inside_of_a_layer():
    """Of a class whose forward is its own."""

    class Inside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.T
            return (Written.apply(y, twice) if self.written else hooked(y)) + self.bias

    def twice(g: Tensor) -> Tensor:
        return g * 2

    def hooked(y: Tensor) -> Tensor:
        y.register_hook(twice)
        return y

    models = []
    for written in (False, True):
        model = Net(LINEAR["a matrix"], written=written)
        two = Inside(HIDDEN, HIDDEN).double()
        two.load_state_dict(model.two.state_dict())
        two.written = written
        model.two = two
        models.append(model)
    collected(models[0])
    check(models[0], truth(models[1]))


# -- hooks of modules ------------------------------------------------------------------------------

KINDS = ("register_full_backward_hook", "register_full_backward_pre_hook")


def hook_on(module: nn.Module, kind: str, hook: Hook) -> Any:
    return getattr(module, kind)(lambda m, given, out=None: (hook(given[0]),))


class Around(Net):
    """A hook written as a function before or behind the layer in the middle."""

    def __init__(self, kind: str, middle: Hook, hidden: Hook | None = None):
        super().__init__(hidden, written=True)
        layer, full = self.two.forward, kind == KINDS[0]
        before = lambda x: layer(Written.apply(x, middle))
        self.two.forward = before if full else lambda x: Written.apply(layer(x), middle)


@pytest.mark.parametrize("memory", [2**28, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_hook_of_a_layer(name, kind, memory):
    """Beside one on a tensor."""
    model = Net(LINEAR["a mask"])
    hook_on(model.two, kind, LINEAR[name])
    grads = gradients(model)
    collected(model, memory=memory)
    check(model, truth(Around(kind, LINEAR[name], LINEAR["a mask"])))
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_layer_come_change_and_go(kind):
    """One that only looks, too; each is asked though the structure is known."""
    torch.manual_seed(0)
    model, loss = nnj.extend(Net()), nnj.extend(nn.CrossEntropyLoss())
    for hook in (None, lambda g: g, LINEAR["a factor"], LINEAR["a matrix"], None):
        handle = None if hook is None else hook_on(model.two, kind, hook)
        model.zero_grad()
        with nnj.collect(*QUANTITIES):
            loss(model(X), Y).backward()
        check(model, truth(Net() if hook is None else Around(kind, hook)))
        if handle is not None:
            handle.remove()


def looks_at_the_output(m: nn.Module, given: Any, out: Any) -> Any:
    return (given[0] + out[0] @ MIX,)


def refused_hooks() -> dict[str, Callable[[Net], Any]]:
    made: dict[str, Callable[[Net], Any]] = {
        "of the output's gradient": lambda net: net.two.register_full_backward_hook(
            looks_at_the_output
        ),
        "of a model": lambda net: hook_on(net, KINDS[1], LINEAR["a factor"]),
    }
    for kind in KINDS:
        for hook in ("clamped", "noisy", "counting"):
            made[f"{kind} {hook}"] = lambda net, kind=kind, hook=hook: hook_on(
                net.two, kind, NOT_LINEAR[hook]()
            )
    return made


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("put", refused_hooks().values(), ids=refused_hooks())
def test_hooks_of_modules_that_are_refused(put):
    """Also where columns go through another one, which is not blamed."""
    model = Net(LINEAR["a factor"], LINEAR["a matrix"])
    put(model)
    model.one.weight.register_hook(OF_WEIGHTS["a mask"])
    with pytest.raises(nnj.NNJError, match="a gradient hook (at|on|in)") as caught:
        collected(model)
    assert all(f"'{name}'" not in str(caught.value) for name in ("one", "three", "one.weight"))


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_products_refuse_hooks(wrt):
    """A hook has no forward, and J is that of the function."""
    model = Net(LINEAR["a factor"])
    collected(model)  # also where it is known
    for product in (nnj.jTmjp, nnj.jmjTp):
        for given in ((model, X), (nn.Sequential(model), X)):  # known, and new
            with pytest.raises(
                nnj.NNJError, match="a gradient hook on the output of layer '(0.)?one"
            ):
                product(*given, wrt=wrt, diag_backprop=True)
    for product, size in ((nnj.vjp, OUT), (nnj.jvp, 4 if wrt == "input" else None)):
        count = sum(p.numel() for p in model.parameters()) if size is None else size
        with pytest.raises(nnj.NNJError, match="a gradient hook on the output of layer 'one'"):
            product(model, X, torch.ones(len(X), count).double(), wrt=wrt)


def test_complex_gradients():
    """Linear over the complex numbers, as a factor is and a conjugation is not."""
    w = torch.randn(3, dtype=torch.complex128).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for hook, linear in ((lambda g: 1j * g, True), (lambda g: g.conj(), False)):
        y = w * 2
        y.register_hook(hook)
        assert hooks.EdgeMap((y.grad_fn, 0), lambda: None).is_linear(generator) == linear
