"""nnj.compile: what a step gives, where it puts it, and when it is another case."""

from __future__ import annotations

import shutil
import types
import warnings

import pytest
import torch
from torch import nn

import nnj
from tests.support.oracle import close

Q = ("ggn_diag", "ggn_block", "batch_grad")
N = 5
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler on a CPU",
)


class Net(nn.Module):
    """An MLP that divides by a temperature."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.dropout, self.temperature = nn.Dropout(dropout), 1.0
        self.register_buffer("shift", torch.full((4,), 0.5))

    def forward(self, x):
        return self.two(self.dropout(self.one(x + self.shift).tanh())) / self.temperature


def batch(seed, n=N, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=dtype), torch.randint(3, (n,), generator=g)


def twin(model):
    """A model that is the same."""
    other = Net().double()
    other.load_state_dict(model.state_dict())
    other.temperature = model.temperature
    return other.train(model.training)


def eager(model, loss, *given, names=Q, **options):
    """What collect gives for a twin: (value, gradients, {quantity: {name: value}})."""
    other, loss = nnj.extend(twin(model)), nnj.extend(loss)
    with nnj.collect(*names, **options):
        value = loss(other(given[0]), *given[1:])
        value.backward()
    found = {}
    for name in names:
        named = other.named_modules() if name == "ggn_block" else other.named_parameters()
        found[name] = {n: getattr(h, name) for n, h in named if getattr(h, name, None) is not None}
    return value.detach(), {n: p.grad for n, p in other.named_parameters()}, found


def check(step, model, loss, *given, names=Q, **options):
    """One pass of a step, with no gradients before it, is what collect gives."""
    for p in model.parameters():
        p.grad = None
    value, results = step(*given)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    attributes = {name: {n: results[name][n].clone() for n in results[name]} for name in names}
    for name in names:
        named = dict(model.named_modules() if name == "ggn_block" else model.named_parameters())
        for n, result in attributes[name].items():
            assert torch.equal(getattr(named[n], name), result)
    expected, wanted, found = eager(model, loss, *given, names=names, **options)
    assert close(value, expected) == ""
    for n, g in wanted.items():
        assert close(grads[n], g) == ""
    assert set(results) == set(names)
    for name in names:
        assert attributes[name].keys() == found[name].keys()
        for n, v in found[name].items():
            assert close(attributes[name][n], v) == "", f"{name} of {n}"


def compiled(model=None, loss=None, *names, backend="aot", **options):
    model = Net().double() if model is None else model
    step = nnj.compile(
        model, loss or nn.CrossEntropyLoss(), *(names or Q), backend=backend, **options
    )
    return model, step


def replaying(model=None, loss=None, *names, calls=3, **options):
    """A step that replays from now on."""
    model, step = compiled(model, loss, *names, **options)
    for i in range(calls):
        step(*batch(i))
    assert step.replays == 0 and step.reasons == []
    return model, step


def test_every_pass_of_a_life_is_what_collect_gives():
    model, step = compiled()
    for i in range(6):
        check(step, model, nn.CrossEntropyLoss(), *batch(i))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad)
    assert step.replays == 3 and step.reasons == []


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MultiMarginLoss])
def test_float32(loss):
    model, step = compiled(Net(), loss())
    for i in range(5):
        x, y = batch(i, dtype=torch.float32)
        value, _ = step(x, y)
        torch.testing.assert_close(value, loss()(model(x), y).detach())
    assert step.replays == 2


@needs_compiler
def test_inductor():
    model, step = compiled(None, None, "ggn_diag", "batch_grad", backend="inductor")
    for i in range(5):
        check(step, model, nn.CrossEntropyLoss(), *batch(i), names=("ggn_diag", "batch_grad"))
    assert step.replays == 2 and step.reasons == []


def test_gradients_add_up_and_results_do_not():
    model, step = replaying()
    for p in model.parameters():
        p.grad = None
    given = batch(9)
    step(*given)
    once = [p.grad.clone() for p in model.parameters()]
    diag = [p.ggn_diag.clone() for p in model.parameters()]
    _, results = step(*given)
    assert repr(step) == "Step(ggn_diag, ggn_block, batch_grad, 2 replays)"
    assert repr(results) == "Results(ggn_diag, ggn_block, batch_grad)"
    for p, g, d in zip(model.parameters(), once, diag, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
        assert torch.equal(p.ggn_diag, d) and len(p.batch_grad) == N
    assert step.replays == 2


def test_inside_a_collect_results_add_up():
    model, step = replaying()
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect(*Q) as both:
        step(*batch(7))
        step(*batch(8))
        x, y = batch(9)
        loss(model(x), y).backward()  # an ordinary pass between
    assert (both.samples, both.passes, step.replays) == (3 * N, 3, 2)
    assert len(model.one.weight.batch_grad) == 3 * N


def test_inside_a_collect_from_the_first_pass_on():
    """Eager, traced, compared and replayed passes add up alike."""
    model, step = compiled()
    expected = [eager(model, nn.CrossEntropyLoss(), *batch(i))[2] for i in range(5)]
    with nnj.collect("ggn_diag", "batch_grad") as both:
        for i in range(5):
            step(*batch(i))
    assert (both.samples, both.passes, step.replays) == (5 * N, 5, 2)
    for n, p in model.named_parameters():
        assert close(p.ggn_diag, sum(one["ggn_diag"][n] for one in expected)) == ""
        assert close(p.batch_grad, torch.cat([one["batch_grad"][n] for one in expected])) == ""


def test_inside_a_collect_the_sum_is_exact():
    model, step = replaying()
    with nnj.collect("ggn_diag", "batch_grad"):
        step(*batch(7))
        step(*batch(8))
    found = {n: (p.ggn_diag, p.batch_grad) for n, p in model.named_parameters()}
    block = model.one.ggn_block  # which nothing that is open asks for: that of the last pass
    one, two = (eager(model, nn.CrossEntropyLoss(), *batch(i))[2] for i in (7, 8))
    for n, (diag, rows) in found.items():
        assert close(diag, one["ggn_diag"][n] + two["ggn_diag"][n]) == ""
        assert close(rows, torch.cat([one["batch_grad"][n], two["batch_grad"][n]])) == ""
    assert close(block, two["ggn_block"]["one"]) == ""
    assert step.replays == 2


@pytest.mark.parametrize(
    "names, options",
    [(("ggn_diag_mc",), {}), (("ggn_block",), {"block_limit": 50}), (("ggn_diag",), {"tol": 1e-3})],
)
def test_a_collect_that_asks_for_more_is_refused(names, options):
    _, step = replaying()
    with pytest.raises(nnj.NNJError, match="was not compiled"):
        with nnj.collect(*names, **options):
            step(*batch(7))


def test_another_temperature_is_another_case():
    """A plain value is baked into a graph, so it is a guard."""
    model, step = replaying()
    model.temperature = 0.1
    for i in range(5):
        check(step, model, nn.CrossEntropyLoss(), *batch(i))
    assert step.replays == 2


def test_an_option_of_the_loss_is_a_guard():
    loss = nn.CrossEntropyLoss()
    model, step = replaying(None, loss)
    loss.reduction = "sum"
    for i in range(4):
        check(step, model, nn.CrossEntropyLoss(reduction="sum"), *batch(i))
    loss.label_smoothing = 0.3
    check(step, model, nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.3), *batch(0))


def test_the_mode_of_the_model_is_a_guard():
    model, step = replaying(Net(0.5).double().eval())
    model.train()
    values = {float(step(*batch(0))[0]) for _ in range(6)}
    assert len(values) == 6  # other masks in each pass, replayed or not
    model.eval()
    check(step, model, nn.CrossEntropyLoss(), *batch(4))


def test_other_sizes_of_batches():
    model, step = replaying()
    for i in range(5):
        check(step, model, nn.CrossEntropyLoss(), *batch(i, n=2))
    check(step, model, nn.CrossEntropyLoss(), *batch(1))
    assert step.replays == 3


def test_parameters_that_are_other_tensors():
    model, step = replaying()
    model.load_state_dict({n: 0.5 * t for n, t in model.state_dict().items()}, assign=True)
    check(step, model, nn.CrossEntropyLoss(), *batch(3))
    assert step.replays == 1


def test_a_frozen_parameter_has_no_result():
    model, step = replaying()
    model.one.weight.requires_grad_(False)
    model.one.weight.grad = None
    for i in range(5):
        _, results = step(*batch(i))
    assert "one.weight" not in results["ggn_diag"] and "one.bias" in results["ggn_diag"]
    assert model.one.weight.grad is None and step.replays == 2


def test_dictionaries_and_forward():
    model = Net().double()
    step = nnj.compile(
        model,
        nn.CrossEntropyLoss(),
        "ggn_diag",
        backend="aot",
        forward=lambda m, b: m(b["inputs"]["x"] * b["scale"]),
        target="classes",
    )
    for i in range(5):
        x, y = batch(i)
        value, _ = step({"inputs": {"x": x}, "classes": y, "scale": 2.0})
        assert close(value, nn.functional.cross_entropy(model(2 * x), y).detach()) == ""
    assert step.replays == 2
    value, _ = step({"inputs": {"x": x}, "classes": y, "scale": 3.0})
    assert close(value, nn.functional.cross_entropy(model(3 * x), y).detach()) == ""
    assert step.replays == 2


def test_a_configuration_is_a_guard():
    class Configured(Net):
        def __init__(self):
            super().__init__()
            self.config = types.SimpleNamespace(scale=1.0)

        def forward(self, x):
            return super().forward(x) * self.config.scale

    model, step = replaying(Configured().double(), None, "ggn_diag")
    x, y = batch(0)
    step(x, y)
    assert step.replays == 1
    model.config.scale = 4.0
    value, _ = step(x, y)
    assert close(value, nn.functional.cross_entropy(model(x), y).detach()) == ""
    assert step.replays == 1


# -- errors are those of the eager pass ------------------------------------------------------------


def test_outputs_that_are_not_finite():
    model, step = replaying()
    x, y = batch(0)
    for p in model.parameters():
        p.grad = None
    with pytest.raises(nnj.NNJError, match="entries that are not finite"):
        step(x / 0, y)
    assert all(p.grad is not None for p in model.parameters())  # as a backward pass leaves them
    check(step, model, nn.CrossEntropyLoss(), *batch(1))
    assert step.replays == 1


def test_log_probabilities_that_are_none():
    """A check on numbers, of a rule."""

    class Normed(Net):
        on = None

        def __init__(self):
            super().__init__()
            self.factor = torch.ones((), dtype=torch.float64)

        def forward(self, x):
            return super().forward(x).log_softmax(1) * self.factor

    model, step = replaying(Normed().double(), nn.NLLLoss(), "ggn_diag")
    step(*batch(0))
    assert step.replays == 1
    model.factor = torch.full((), 0.5, dtype=torch.float64)
    with pytest.raises(nnj.NNJError, match="does not sum to one"):
        step(*batch(0))


def test_a_loss_that_is_not_convex():
    def loss(output, target):
        return (output.square() * target).sum()

    model = nn.Linear(4, 2).double()
    step = nnj.compile(model, loss, "ggn_diag", backend="aot")
    x = batch(0)[0]
    for _ in range(5):
        step(x, torch.ones(N, 2).double())
    assert step.replays == 2 and step.reasons == []
    with pytest.raises(nnj.NNJError, match="not positive semi-definite"):
        step(x, -torch.ones(N, 2).double())
    step(x, torch.ones(N, 2).double())
    assert step.replays == 3


def test_the_error_is_no_empty_collect():
    _, step = replaying()
    x, y = batch(0)
    with nnj.collect(*Q):
        with pytest.raises(nnj.NNJError, match="not finite"):
            step(x / 0, y)


# -- random numbers --------------------------------------------------------------------------------


def test_monte_carlo_columns_are_drawn_anew_as_the_eager_pass_draws_them():
    model, step = replaying(None, None, "ggn_diag_mc")
    torch.manual_seed(5)
    found = [step(*batch(0))[1]["ggn_diag_mc"]["one.weight"] for _ in range(3)]
    assert step.replays == 3
    other, loss = nnj.extend(twin(model)), nnj.extend(nn.CrossEntropyLoss())
    x, y = batch(0)
    torch.manual_seed(5)
    for one in found:
        with nnj.collect("ggn_diag_mc"):
            loss(other(x), y).backward()
        assert close(one, other.one.weight.ggn_diag_mc) == ""
    assert not torch.equal(found[0], found[1])


def test_a_generator_of_yours():
    def of(seed):
        return torch.Generator().manual_seed(seed)

    model, loss = Net().double(), nn.CrossEntropyLoss()
    step = nnj.compile(model, loss, "ggn_diag_mc", backend="aot", generator=of(3), samples=2)
    found = [step(*batch(0))[1]["ggn_diag_mc"]["one.weight"] for _ in range(6)]
    assert step.replays == 3
    other = nnj.extend(twin(model))
    generator = of(3)
    for one in found:
        with nnj.collect("ggn_diag_mc", generator=generator, samples=2):
            x, y = batch(0)
            nnj.extend(loss)(other(x), y).backward()
        assert close(one, other.one.weight.ggn_diag_mc) == ""


# -- what is eager, and says why -------------------------------------------------------------------


def hooked(model):
    model.one.register_forward_hook(lambda m, x, y: None)


def with_a_hook_on_a_parameter(model):
    model.one.weight.register_hook(lambda g: None)


class Counting(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Telling(Net):
    def forward(self, x):
        return super().forward(x) / float(x.abs().max())


@pytest.mark.parametrize(
    "make, change, options, said",
    [
        (Net, hooked, {}, "has a hook"),
        (Net, with_a_hook_on_a_parameter, {}, "has a hook"),
        (Counting, None, {}, "changes Counting.calls"),
        (Telling, None, {}, "asks a tensor for a number"),
        (Net, None, {"tol": 1e-2}, "the number of columns follows the data"),
    ],
)
def test_what_runs_eagerly_says_why_and_is_exact(make, change, options, said):
    model = make().double()
    if change is not None:
        change(model)
    step = nnj.compile(model, nn.CrossEntropyLoss(), "ggn_diag", backend="aot", **options)
    with pytest.warns(UserWarning, match=said):
        for i in range(5):
            value, results = step(*batch(i))
    assert step.replays == 0 and len(step.reasons) == 1
    if make is Net:
        expected = eager(model, nn.CrossEntropyLoss(), *batch(4), names=("ggn_diag",), **options)
        assert close(value, expected[0]) == ""
        for n, v in expected[2]["ggn_diag"].items():
            assert close(results["ggn_diag"][n], v) == ""


def test_without_gradients_it_is_as_eager():
    _, step = compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), pytest.raises(RuntimeError):
            step(*batch(0))


def test_unknown_names_and_backends():
    with pytest.raises(nnj.NNJError, match="unknown quantity"):
        compiled(None, None, "ggn_dialog")
    with pytest.raises(nnj.NNJError, match="known are 'inductor'"):
        compiled(backend="tpu")


# -- few questions ---------------------------------------------------------------------------------


def test_a_replayed_pass_asks_one_question(monkeypatch):
    """`bool, item, nonzero, unique, tolist, int` of tensors: on a GPU each waits for all work."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []
    _, step = replaying()
    monkeypatch.setattr("nnj.compiling.surroundings.torch._C._len_torch_dispatch_stack", lambda: 0)

    class Asking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
            numbers = func is torch.ops.aten.index.Tensor and not any(
                t is not None and t.dtype == torch.bool for t in args[1]
            )
            if tags & set(func.tags) and not numbers:
                asked.append(str(func))
            return func(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: asked.append("tolist") or tolist(t))
    with Asking():
        step(*batch(5))
    assert step.replays == 1
    assert asked == ["aten._local_scalar_dense.default"]
