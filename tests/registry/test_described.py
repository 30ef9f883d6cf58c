"""A rule is taken only where it describes the module: hooks, pruning, replaced forwards; and mixed
precision.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import nnj
from nnj.testing import check_model
from tests.support.truth import Truth

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randint(0, 3, (6,), generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()


def truth(model=None, x=X, y=Y, scale=1.0, loss=F.cross_entropy):
    model = net() if model is None else model
    found = Truth(model, lambda run: [run(x)], lambda f: scale * loss(f[0], y))
    return {name: found.diag(name) for name in found.names}


def changed_output(m):
    m[0].register_forward_hook(lambda module, args, y: y * 2)


def changed_input(m):
    m[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def changed_in_place(m):
    m[0].register_forward_hook(lambda module, args, y: y.mul_(3))


def replaced_forward(m):
    own = m[0].forward
    m[0].forward = lambda x: own(x).sin()


def pruned(m):
    prune.random_unstructured(m[0], "weight", 0.4)


def old_weight_norm(m):
    torch.nn.utils.weight_norm(m[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", [True, False], ids=["then extended", "after extend"])
@pytest.mark.parametrize(
    "change",
    [changed_output, changed_input, changed_in_place, replaced_forward, pruned, old_weight_norm],
)
def test_a_rule_is_taken_only_where_it_describes_the_module(change, first):
    model, plain = net(), net()
    if not first:
        nnj.extend(model)
    for m in (model, plain):
        torch.manual_seed(3)
        change(m)
    if first:
        nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        loss(model(X), Y).backward()
    params = list(plain.parameters())
    f = plain(X)
    rows = torch.eye(f.numel()).double().reshape(-1, *f.shape)
    dense = [
        torch.stack([torch.autograd.grad(f, p, r, retain_graph=True)[0] for r in rows])
        for p in params
    ]
    h = torch.func.hessian(lambda z: F.cross_entropy(z.reshape(f.shape), Y))(f.detach().reshape(-1))
    for p, d in zip(model.parameters(), dense, strict=True):
        d = d.reshape(len(d), -1)
        torch.testing.assert_close(p.ggn_diag, ((h @ d) * d).sum(0).reshape(p.shape))


def test_a_layer_that_changed_after_its_call_is_not_taken_at_its_word():
    act = nn.LeakyReLU(0.1)
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 3)).double()
    found = Truth(copy.deepcopy(model), lambda run: [run(X)], lambda f: F.cross_entropy(f[0], Y))
    nnj.extend(model)
    loss = nnj.extend(nn.CrossEntropyLoss())
    value = loss(model(X), Y)
    act.negative_slope = 0.9
    with nnj.collect("ggn_diag"):
        value.backward()
    torch.testing.assert_close(model[0].weight.ggn_diag, found.diag("0.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_the_dtype_of_the_parameter(dtype):
    model, loss = nnj.extend(net().to(dtype)), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag", "ggn_block", "batch_grad", "ggn_diag_mc"):
        loss(model(X.to(dtype)), Y).backward()
    expected = truth(net().to(dtype).double())
    for name, p in model.named_parameters():
        assert p.ggn_diag.dtype == dtype
        torch.testing.assert_close(p.ggn_diag.double(), expected[name], rtol=0.1, atol=2e-3)


def test_autocast():
    model, loss = nnj.extend(net().float()), nnj.extend(nn.CrossEntropyLoss())
    with nnj.collect("ggn_diag"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model(X.float()), Y)
        value.backward()
    for name, expected in truth().items():
        torch.testing.assert_close(
            model.get_parameter(name).ggn_diag.double(), expected, rtol=0.1, atol=2e-3
        )


def test_check_model_tells_right_from_wrong():
    model = net()
    check_model(model, nn.CrossEntropyLoss(), X, Y)
    check_model(nnj.extend(model), lambda f, y: F.cross_entropy(f, y, reduction="sum"), X, Y)
    assert not hasattr(model[0].weight, "ggn_diag")
    broken = net()
    own = nnj.PatchMatmul.factor
    try:
        nnj.PatchMatmul.factor = lambda self, u, owner: own(self, 2 * u, owner)
        with pytest.raises(AssertionError, match="ggn_diag of '0.weight' is wrong"):
            check_model(broken, nn.CrossEntropyLoss(), X, Y)
    finally:
        nnj.PatchMatmul.factor = own
