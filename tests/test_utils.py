"""The interface of the original nnj: converted models, layers with a Jacobian of their own, its
further layers.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import nnj
from nnj.registry.layer_rules import find_rule
from tests.support.products import MODELS, N, case, dense_jacobian, r, same


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_the_readme_of_the_original():
    network_nn, x = network(), r(N, 3)
    network_nnj = nnj.utils.convert_to_nnj(network_nn)
    val = network_nnj(x)
    Jt_J = network_nnj._jTmjp(x, val, None, wrt="weights", to_diag=True, diag_backprop=True)
    Jt_J = torch.mean(Jt_J, dim=0)
    same(Jt_J, nnj.jTmjp(network_nn, x, None, "weight", to_diag=True, diag_backprop=True).mean(0))
    layer = network_nnj[0]
    v, m = r(N, 4), r(N, 3, 5)
    j, w = dense_jacobian(network_nn[0], x, "input"), dense_jacobian(network_nn[0], x, "weight")
    same(layer._vjp(x=x, value=None, vector=v, wrt="weight"), torch.einsum("no,nop->np", v, w))
    same(
        layer._jvp(x=x, value=None, vector=m[..., 0], wrt="input"),
        torch.einsum("noi,ni->no", j, m[..., 0]),
    )
    same(layer._jmp(x=x, matrix=m, wrt="input"), j @ m)
    same(layer._mjp(x=x, matrix=v[:, None], wrt="input"), v[:, None] @ j)
    m = r(N, 3, 3)
    same(layer._jmjTp(x=x, matrix=m, wrt="input"), j @ m @ j.mT)
    m = r(N, 4, 4)
    same(layer._jTmjp(x=x, matrix=m, wrt="weight"), w.mT @ m @ w)
    x1, x2, metrics = x, r(N, 3), (r(N, 4, 4), r(N, 4, 4), r(N, 4, 4))
    found = layer._jTmjp_batch2(x1=x1, x2=x2, matrixes=metrics)
    same(list(found), [j.mT @ m @ j for m in metrics])
    same(layer._jacobian(x=x, wrt="weight"), w)
    weight = network_nnj.get_weight()
    assert weight.shape == (network_nnj._n_params,) == (26,)
    network_nnj.set_weight(weight + 1)
    same(network_nn[0].weight.detach().flatten(), weight[:12] + 1)
    same(network_nnj.get_weight(), weight + 1)


def test_positions_names_and_forms():
    model = nnj.utils.convert_to_nnj(network())
    x, x2 = r(N, 3), r(N, 3)
    val, val2 = model(x), model(x2)
    m = r(N, 2, 2)
    for name in ("_jTmjp", "jTmjp"):
        product = getattr(model, name)
        same(
            product(x, val, m, "weights", False, True),
            nnj.jTmjp(model, x, m, "weight", to_diag=True),
        )
        same(product(x, val=val, matrix=m), nnj.jTmjp(model, x, m))
        blocks = product(x, None, m, "weight")
        assert isinstance(blocks, list) and [b.shape for b in blocks] == [(N, 16, 16), (N, 10, 10)]
    for name in ("jacobian", "_jacobian"):
        same(getattr(model, name)(x, val, "input"), nnj.jacobian(model, x))
        same(getattr(model, name)(x, value=val, wrt="weights"), nnj.jacobian(model, x, "weight"))
    for name in ("jvp", "vjp", "jmp", "mjp", "jmjTp", "jTmjp", "jTmjp_batch2"):
        assert getattr(type(model), name) is getattr(type(model), "_" + name)
    metrics = (m, r(N, 2, 2), r(N, 2, 2))
    found = model._jTmjp_batch2(x, x2, val, val2, metrics, "weight", False, True)
    assert isinstance(found, tuple) and all(
        isinstance(part, list) and len(part) == 2 for part in found
    )
    for part, expected in zip(
        found, nnj.jTmjp_pair(model, x, x2, metrics, "weight", diag_backprop=True), strict=True
    ):
        same(part, expected)
    found = model._jTmjp_batch2(x, x2, val, val2, None, "weight", True, True)
    assert [part.shape for part in found] == [(N, 26)] * 3
    assert isinstance(model[0].jTmjp(x, None, None, "weight"), torch.Tensor)


def test_what_has_no_parameters_has_no_products_in_them():
    model = nnj.utils.convert_to_nnj(
        nn.Sequential(nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Identity())).double()
    )
    x, v = r(N, 2), r(N, 2)
    for layer in (model, model[0], model[1]):
        assert layer._n_params == 0 and layer.get_weight() is None
        layer.set_weight(None)
        for name, given in (
            ("jvp", v),
            ("vjp", v),
            ("jmp", None),
            ("mjp", None),
            ("jmjTp", None),
            ("jTmjp", None),
        ):
            assert getattr(layer, name)(x, None, given, "weight") is None
        assert layer._jacobian(x, None, "weight") is None
        assert layer._jTmjp_batch2(x, x, None, None, None, "weight", True, True) is None
        same(layer._jTmjp(x, None, None), nnj.jTmjp(layer, x))


@pytest.mark.parametrize("name", MODELS)
def test_converted_models(name):
    """They compute what the model does, by the same rules; the model is left as it was, and shares
    its weights.
    """
    model, x, j = case(name, "weight")
    classes = [type(m) for m in model.modules()]
    before = {key: id(t) for key, t in model.state_dict(keep_vars=True).items()}
    converted = nnj.utils.convert_to_nnj(model)
    assert nnj.utils.convert_to_nnj(converted) is converted
    assert [type(m) for m in model.modules()] == classes
    assert {key: id(t) for key, t in converted.state_dict(keep_vars=True).items()} == before
    assert (
        converted is not model
        and type(converted).__name__ == type(model).__name__
        and isinstance(converted, type(model))
    )
    assert all(
        isinstance(m, nnj.AbstractJacobian) and not isinstance(n, nnj.AbstractJacobian)
        for m, n in zip(converted.modules(), model.modules(), strict=True)
    )
    assert [find_rule(m) for m in converted.modules()] == [find_rule(m) for m in model.modules()]
    same(converted(x), model(x))
    assert converted._n_params == j.shape[2]
    if j.shape[2]:
        same(converted._jacobian(x, None, "weight"), j)
        v = r(N, j.shape[1])
        same(converted.vjp(x, None, v, "weight"), nnj.vjp(model, x, v, "weight"))
        twin = copy.deepcopy(converted)
        twin.set_weight(twin.get_weight() * 2)
        assert not twin.get_weight().equal(converted.get_weight())


def test_copies_pickles_and_slices():
    model, x = nnj.utils.convert_to_nnj(network()), r(N, 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(twin) is type(model) and type(twin[0]) is type(model[0])
        same(twin._jTmjp(x), model._jTmjp(x))
    assert isinstance(model[:2], nnj.AbstractJacobian)
    same(model[:2]._jacobian(x), dense_jacobian(network()[:2], x, "input"))
    model.train(False)
    model[0] = nn.Linear(3, 4).double()
    again = nnj.utils.convert_to_nnj(model)
    assert (
        again is not model
        and isinstance(again[0], nnj.AbstractJacobian)
        and again[2] is not model[2]
    )


def test_conversion_keeps_what_is_used_twice_and_what_a_class_has():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2)
            self.two, self.none = self.one, None

        def forward(self, x):
            return self.two(self.one(x))

        def jvp(self):
            return "mine"

    model = Odd().double()
    hook = model.one.register_forward_hook(lambda m, i, o: o * 2)
    converted = nnj.utils.convert_to_nnj(model)
    assert converted.one is converted.two is not model.one and converted.jvp() == "mine"
    x = r(N, 2)
    same(converted(x), model(x))
    same(converted._jacobian(x), dense_jacobian(model, x, "input"))
    hook.remove()
    converted.eval()
    assert model.training and not converted.training and converted.one._forward_hooks


def test_collect_with_a_converted_model():
    model, x, y = network(), r(N, 3), torch.tensor([0, 1, 1])
    loss = nnj.extend(nn.CrossEntropyLoss())
    found = []
    for net in (nnj.extend(model), nnj.extend(nnj.utils.convert_to_nnj(model))):
        with nnj.collect("ggn_diag"):
            loss(net(x), y).backward()
        found.append([p.ggn_diag.clone() for p in net.parameters()])
        for p in net.parameters():
            del p.ggn_diag
    same(*found)


def test_what_is_refused():
    model, x = nnj.utils.convert_to_nnj(network()), r(N, 3)
    with pytest.raises(TypeError, match=r"convert_to_nnj takes a torch\.nn\.Module, not 3"):
        nnj.utils.convert_to_nnj(3)
    with pytest.raises(
        nnj.NNJError,
        match=r"val is \(2, 2\), expected the output of the module at x, \(3, ...\), or None",
    ):
        model._jTmjp(x, r(2, 2))
    with pytest.raises(nnj.NNJError, match=r"w has shape \(3,\), expected \(26,\)"):
        model.set_weight(r(3))
    with pytest.raises(nnj.NNJError, match="wrt='bias'; expected 'input' or 'weight'"):
        model._jacobian(x, None, "bias")
    with pytest.raises(nnj.NNJError, match="x is NoneType, expected a tensor"):
        model._jacobian(None)

    class Alone(nnj.AbstractJacobian):
        pass

    with pytest.raises(nnj.NNJError, match=r"Alone is no nn\.Module"):
        Alone().jacobian(x)
