"""What of torch's own machinery is refused, by its name; the forward pass and .grad are those of
torch.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nnj
from tests.support.collecting import X, Y, net


def CE(z: Tensor, y: Tensor) -> Tensor:
    """A function of Python: torch 2.6 compiles none of its own."""
    return nn.functional.cross_entropy(z, y)


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    if hasattr(torch, "_dynamo"):
        torch._dynamo.reset()


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, backend=backend)


def of_a_model(model: nn.Module, loss: Any) -> None:
    loss(model(X), Y).backward()


def loss_given_to_compile(model: nn.Module) -> None:
    with nnj.collect("ggn_diag"):
        of_a_model(model, compiled(nnj.extend(nn.CrossEntropyLoss())))


def loss_that_calls_compiled(model: nn.Module) -> None:
    inner = compiled(CE)
    with nnj.collect("ggn_diag"):
        of_a_model(model, nnj.extend(lambda z, y: inner(z, y) + 0 * z.sum()))


def extended_compiled_function(model: nn.Module) -> None:
    with nnj.collect("ggn_diag"):
        of_a_model(model, nnj.extend(compiled(CE)))


def extended_compiled_loss(model: nn.Module) -> None:
    nnj.extend(compiled(nn.CrossEntropyLoss()))


def step(model: nn.Module) -> None:
    loss = nnj.extend(nn.CrossEntropyLoss())
    forward = compiled(lambda x, y: loss(model(x), y))
    with nnj.collect("ggn_diag"):
        forward(X, Y).backward()


def step_with_backward(model: nn.Module) -> None:
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        compiled(lambda x, y: loss(model(x), y).backward())(X, Y)


def backward_alone(model: nn.Module) -> None:
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        compiled(lambda value: value.backward())(loss(model(X), Y))


def step_with_collect(model: nn.Module, backend: str = "aot_eager") -> None:
    loss = nnj.extend(nn.CrossEntropyLoss())

    def whole(x: Tensor, y: Tensor) -> None:
        with nnj.collect("ggn_diag"):
            loss(model(x), y).backward()

    compiled(whole, backend)(X, Y)


def step_with_collect_in_eager(model: nn.Module) -> None:
    step_with_collect(model, "eager")


def model_given_to_compile(model: nn.Module) -> None:
    with nnj.collect("ggn_diag"):
        of_a_model(compiled(model), nnj.extend(nn.CrossEntropyLoss()))


@pytest.mark.parametrize(
    "run",
    [
        loss_given_to_compile,
        loss_that_calls_compiled,
        extended_compiled_function,
        extended_compiled_loss,
        step,
        step_with_backward,
        backward_alone,
        step_with_collect,
        step_with_collect_in_eager,
        model_given_to_compile,
    ],
    ids=lambda run: run.__name__,
)
def test_torch_compile(run):
    model, plain = nnj.extend(net()), net()
    with pytest.raises(nnj.NNJError, match=r"torch\.compile"):
        run(model)
    of_a_model(plain, CE)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert not hasattr(p, "ggn_diag")
        if run is not extended_compiled_loss:
            torch.testing.assert_close(p.grad, q.grad)
    with nnj.collect("ggn_diag"):  # nothing of nnj was traced, and changed for good
        of_a_model(model, nnj.extend(nn.CrossEntropyLoss()))
    assert all(p.ggn_diag.any() for p in model.parameters())


def test_a_model_without_numbers():
    model, x, y = nnj.extend(net().to("meta")), X.to("meta"), Y.to("meta")
    loss = nnj.extend(nn.CrossEntropyLoss())
    with pytest.raises(nnj.NNJError, match=r"on the device 'meta'.*to_empty"):
        with nnj.collect("ggn_diag"):
            loss(model(x), y).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    for product in (lambda: nnj.jvp(model, x, x), lambda: nnj.jacobian(model, x, "weight")):
        with pytest.raises(nnj.NNJError, match="on the device 'meta'"):
            product()
    with pytest.raises(nnj.NNJError, match="on the device 'meta'"):
        nnj.fit(model, loss, [(x, y)], "ggn_diag")


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(layout):
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    model, loss = nnj.extend(copy.deepcopy(plain)), nnj.extend(nn.CrossEntropyLoss())
    parts = [t.float() for t in X.split([2, 4])]
    x = torch.nested.nested_tensor(parts, layout=layout)
    rows = lambda z: torch.cat(z.unbind())
    with pytest.raises(nnj.NNJError, match=r"nested tensors.*to_padded_tensor"):
        with nnj.collect("ggn_diag"):
            loss(rows(model(x)), Y).backward()
    CE(rows(plain(x)), Y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with pytest.raises(nnj.NNJError, match="nested tensors"):
        nnj.jvp(plain, x, x)


def owned_by(module: str, name: str) -> Any:
    """A function like one of torch's, which needs several GPUs."""

    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), body | {"__module__": module})


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("torch.nn.parallel._functions", "Gather", r"DataParallel.*device_ids=\[0\]"),
        ("torch.nn.modules._functions", "SyncBatchNorm", "samples influence one another"),
        ("torch.distributed.fsdp._fully_shard._x", "RegisterPostBackwardFunction", "by FSDP"),
        ("torch.utils.checkpoint", "CheckpointFunction", "use_reentrant=False"),
        ("mine", "Gather", ""),
    ],
)
def test_functions_of_torch(module, name, said):
    function, model = owned_by(module, name), net()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return function.apply(self.model(x))

    whole, loss = nnj.extend(Model()), nnj.extend(nn.CrossEntropyLoss())
    value = loss(whole(X), Y)
    if said:
        with pytest.raises(nnj.NNJError, match=said), nnj.collect("ggn_diag"):
            value.backward()
    else:
        with nnj.collect("ggn_diag"):
            value.backward()
        assert all(p.ggn_diag is not None for p in model.parameters())


def test_data_parallel_on_one_device():
    """It calls the model, and no more."""
    plain = nnj.extend(net())
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        of_a_model(plain, loss)
    expected = [p.ggn_diag for p in plain.parameters()]
    for wrap in (
        lambda m: nn.DataParallel(nnj.extend(m)),
        lambda m: nnj.extend(nn.DataParallel(m)),
    ):
        model = wrap(net())
        with nnj.collect("ggn_diag"):
            of_a_model(model, loss)
        for p, e in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p.ggn_diag, e)
