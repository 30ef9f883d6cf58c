"""What a user may do with collect: several passes, several losses, nesting, copies, restrictions; and nothing is kept alive."""
from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnj
from nnj import contribution
from tests.truth import Truth

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def truth(model=None, x=X, y=Y, scale=1.0, loss=F.cross_entropy):
    model = net() if model is None else model
    found = Truth(model, lambda run: [run(x)], lambda f: scale * loss(f[0], y))
    return {name: found.diag(name) for name in found.names}


def check(model, expected):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.ggn_diag, expected[name], rtol=1e-9, atol=1e-12)


@pytest.fixture
def pair():
    return nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss())


def test_passes_add_up_and_a_new_with_starts_from_nothing(pair):
    model, loss = pair
    with nnj.collect("ggn_diag"):
        for part in (slice(0, 2), slice(2, 6)):
            (loss(model(X[part]), Y[part]) * (part.stop - part.start) / 6).backward()
    check(model, truth())
    for _ in range(2):
        with nnj.collect("ggn_diag"):
            loss(model(X), Y).backward()
        check(model, truth())


@pytest.mark.parametrize("scale", [0.5, 1 / 8, 3.0])
def test_scale(pair, scale):
    model, loss = pair
    with nnj.collect("ggn_diag"):
        (scale * loss(model(X), Y)).backward()
    check(model, truth(scale=scale))


def test_reduction_none_with_weights():
    model, loss, w = nnj.extend(net()), nnj.extend(nn.CrossEntropyLoss(reduction="none")), torch.rand(6).double()
    with nnj.collect("ggn_diag"):
        (loss(model(X), Y) * w).sum().backward()
    check(model, truth(loss=lambda f, y: (F.cross_entropy(f, y, reduction="none") * w).sum()))


def test_two_losses_of_one_and_of_two_forward_passes(pair):
    model, loss = pair
    mse, target = nnj.extend(nn.MSELoss()), torch.randn(6, 3).double()
    a, b = truth(), truth(loss=F.mse_loss, y=target)
    both = {name: a[name] + 2 * b[name] for name in a}
    with nnj.collect("ggn_diag"):
        f = model(X)
        (loss(f, Y) + 2 * mse(f, target)).backward()
    check(model, both)
    with nnj.collect("ggn_diag", "batch_grad"):
        (loss(model(X), Y) + 2 * mse(model(X), target)).backward()
    check(model, both)
    assert model[0].weight.batch_grad.shape == (12, 5, 4)


def test_weight_decay_has_no_part(pair):
    model, loss = pair
    with nnj.collect("ggn_diag"):
        (loss(model(X), Y) + sum(p.square().sum() for p in model.parameters())).backward()
    check(model, truth())


def test_autograd_grad_and_backward_inputs(pair):
    model, loss = pair
    with nnj.collect("ggn_diag"):
        torch.autograd.grad(loss(model(X), Y), list(model.parameters()))
    check(model, truth())
    assert all(p.grad is None for p in model.parameters())
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward(inputs=[model[2].weight])
    assert model[0].weight.ggn_diag is None and model[2].bias.ggn_diag is None
    torch.testing.assert_close(model[2].weight.ggn_diag, truth()["2.weight"])


def test_forward_before_the_with_retain_graph_and_create_graph(pair):
    model, loss = pair
    value = loss(model(X), Y)
    with nnj.collect("ggn_diag"):
        value.backward(retain_graph=True)
        value.backward(retain_graph=True)
    check(model, {name: 2 * t for name, t in truth().items()})
    with nnj.collect("ggn_diag"):
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    check(model, truth())
    assert all(g.requires_grad for g in grads) and not model[0].weight.ggn_diag.requires_grad


def test_nested_and_repeated(pair):
    model, loss = pair
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
        with nnj.collect("ggn_diag", "batch_grad", modules=[model[2]]):
            loss(model(X), Y).backward()
            torch.testing.assert_close(model[2].weight.ggn_diag, truth()["2.weight"])
        assert not hasattr(model[0].weight, "batch_grad") and model[2].weight.batch_grad.shape == (6, 3, 5)
    check(model, {name: 2 * t for name, t in truth().items()})
    with nnj.collect("batch_grad"):
        loss(model(X), Y).backward()
    assert model[0].weight.ggn_diag is not None, "deleted by a `with` of another name"
    with nnj.collect("ggn_diag"):
        assert not hasattr(model[0].weight, "ggn_diag")
        loss(model(X), Y).backward()


def test_batch_grad_is_concatenated_in_order(pair):
    model, loss = pair
    with nnj.collect("batch_grad"):
        loss(model(X[:2]), Y[:2]).backward()
        loss(model(X[2:]), Y[2:]).backward()
    joined = model[0].weight.batch_grad
    with nnj.collect("batch_grad"):
        nnj.extend(nn.CrossEntropyLoss(reduction="sum"))(model(X), Y).backward()
    scale = torch.tensor([1 / 2] * 2 + [1 / 4] * 4).double().reshape(-1, 1, 1)
    torch.testing.assert_close(joined, model[0].weight.batch_grad * scale)


def test_modules_and_frozen_prefixes_are_not_walked(pair, monkeypatch):
    model, loss = pair
    walked = []
    original = contribution.Graph.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        walked.append([unit.name for unit in self.units])

    monkeypatch.setattr(contribution.Graph, "__init__", spy)
    with nnj.collect("ggn_diag", "ggn_block", modules=[model[2]]):
        loss(model(X), Y).backward()
    assert walked == [["Linear"]] and not hasattr(model[0].weight, "ggn_diag") and model[2].ggn_block.shape == (18, 18)
    torch.testing.assert_close(model[2].weight.ggn_diag, truth()["2.weight"])
    model[0].requires_grad_(False)
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    assert walked[1] == ["Linear"] and not hasattr(model[0].weight, "ggn_diag")


def test_four_quantities_are_one_backward_pass(pair, monkeypatch):
    model, loss = pair
    calls = []
    original = contribution.Graph.__init__
    monkeypatch.setattr(contribution.Graph, "__init__", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    with nnj.collect("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad"):
        loss(model(X), Y).backward()
    assert calls == [1]
    check(model, truth())


def test_a_shared_parameter_has_one_quantity_and_a_block_on_each_module():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    found = Truth(copy.deepcopy(model), lambda run: [run(X)], lambda f: F.cross_entropy(f[0], Y))
    nnj.extend(model)
    with nnj.collect("ggn_diag", "ggn_block"):
        nnj.extend(nn.CrossEntropyLoss())(model(X), Y).backward()
    torch.testing.assert_close(model[0].weight.ggn_diag, found.diag("0.weight"))
    for module in (model[0], model[2]):
        torch.testing.assert_close(module.ggn_block, found.block(["0.weight"]))


def test_extend_is_idempotent_and_retract_undoes_it():
    model, loss = net(), nn.CrossEntropyLoss()
    hooks = lambda m: [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in m.modules()]
    assert nnj.extend(model) is model and nnj.extend(loss) is loss
    once = hooks(model), hooks(loss)
    nnj.extend(model), nnj.extend(loss)
    assert (hooks(model), hooks(loss)) == once
    nnj.retract(model), nnj.retract(loss)
    assert hooks(model) == [0] * 4 and hooks(loss) == [0]
    assert not any(part._forward_hooks_with_kwargs or part._forward_hooks_always_called for part in model.modules())


def test_what_extend_takes():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.loss = net(), nn.CrossEntropyLoss()

        def forward(self, x, y):
            return self.loss(self.net(x), y)

    whole = nnj.extend(WithLoss())
    with nnj.collect("ggn_diag"):
        whole(X, Y).backward()
    check(whole.net, truth())
    function = nnj.extend(lambda f, y: F.cross_entropy(f, y))
    assert isinstance(function, nn.Module)
    model = nnj.extend(net())
    with nnj.collect("ggn_diag"):
        function(model(X), Y).backward()
    check(model, truth())

    class Mine(nn.Module):
        def forward(self, f, y):
            return F.cross_entropy(f, y)

    mine = nnj.extend(Mine(), loss=True)
    with nnj.collect("ggn_diag"):
        mine(model(X), y=Y).backward()
    check(model, truth())
    with pytest.raises(TypeError, match="takes a torch.nn.Module or a function"):
        nnj.extend(3)


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_extended(pair, copied):
    model, loss = pair
    assert list(model.state_dict()) == list(net().state_dict())
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    other = copied(model)
    with nnj.collect("ggn_diag"):
        copied(loss)(other(X), Y).backward()
    check(other, truth())
    net().load_state_dict(other.state_dict())


def test_nothing_is_kept_alive(pair):
    model, loss = pair

    def step(fail=False):
        with nnj.collect("ggn_diag", "ggn_block", "ggn_diag_mc", "batch_grad"):
            output = model(X)
            value = loss(output, Y)
            ref = weakref.ref(output)
            (-value if fail else value).backward()
        return ref

    def refused():
        with pytest.raises(nnj.NNJError):
            step(fail=True)

    step(), refused()
    gc.collect()
    gc.disable()  # what only the garbage collector frees is a leak on a GPU
    try:
        assert step()() is None
        count = lambda: sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        before = count()
        for _ in range(20):
            step()
            model(X)  # a graph that no backward pass consumes
        assert count() <= before
    finally:
        gc.enable()
    refused(), gc.collect()
    before = count()
    for _ in range(5):
        refused()
    gc.collect()
    assert count() <= before


def test_an_interrupted_forward_leaves_no_trace(pair):
    model, loss = pair

    class Stop(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nnj.extend(nn.Sequential(nn.Linear(4, 4).double(), Stop()))(X)
    with nnj.collect("ggn_diag", "batch_grad"):
        loss(model(X), Y).backward()
    check(model, truth())


def test_threads_do_not_meet():
    results = {}

    models = [nnj.extend(net()) for _ in range(4)]

    def work(i):
        model, loss = models[i], nnj.extend(nn.CrossEntropyLoss())
        for _ in range(5):
            with nnj.collect("ggn_diag"):
                (loss(model(X), Y) * (i + 1)).backward()
        results[i] = model[0].weight.ggn_diag

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    for i in range(4):
        torch.testing.assert_close(results[i], (i + 1) * truth()["0.weight"])
